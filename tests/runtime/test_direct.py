"""A call that goes to a graph's replay, past AOTAutograd and Inductor: eager's numbers after every change."""

from __future__ import annotations

import functools
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gawscompile.backend import gaws
from gawscompile.demo.decoding import Decoder
from gawscompile.runtime import bound, ops
from gawscompile.watch import unchanged
from tests.graphs import small_llama, tokens
from tests.runtime.test_replay import at_once

pytestmark = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


@pytest.fixture
def directly():
    """How many calls went to the steps directly."""
    counts = [0]
    plain = bound.Direct.__call__

    def counting(self, others):
        results = plain(self, others)
        counts[0] += bool(results)
        return results

    bound.skip_code(counting.__code__)
    with mock.patch.object(bound.Direct, "__call__", counting):
        yield counts


def deciding(model, run, kind="static"):
    """What decodes by `run`, a compiled `model`, and a check of the next token's logits against the model itself."""
    decoder = Decoder(model, run, 32, kind)
    decoder.fill(tokens(1, 7)[0].tolist())

    def check():
        decoder.seek()
        got = decoder.step(5)
        decoder.seek()
        decoder.run = model
        want = decoder.step(5)
        decoder.run = run
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    return decoder, check


def compiled(model, backend="gaws"):
    return torch.compile(model, backend=backend, dynamic=False)


class Seen(TorchDispatchMode):
    """Compiled code runs under it."""

    ops = ()

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops = (*self.ops, func)
        return func(*args, **(kwargs or {}))


def test_a_decode_step_goes_directly_and_follows_every_change(directly):
    model = small_llama()
    _, check = deciding(model, compiled(model))
    for _ in range(6):
        check()
    before = directly[0]
    assert before >= 2
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    norm = model.base_model.model.model.norm
    first, second = layer.lora_A["default"], layer.lora_B["default"]
    for change in (
        lambda: layer.base_layer.weight.data.mul_(1.5),
        lambda: setattr(first.weight, "data", torch.randn_like(first.weight)),
        lambda: setattr(norm.weight, "data", torch.rand_like(norm.weight)),
    ):
        change()
        check()
    assert directly[0] == before + 3
    second.weight = torch.nn.Parameter(torch.randn_like(second.weight))
    for _ in range(4):
        check()
    assert directly[0] >= before + 5


def test_no_parameter_is_kept_alive(directly):
    model = small_llama()
    _, check = deciding(model, compiled(model))
    for _ in range(6):
        check()
    assert directly[0]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    old = weakref.ref(layer.base_layer.weight), weakref.ref(layer.base_layer.weight.untyped_storage())
    layer.base_layer.weight = torch.nn.Parameter(torch.randn_like(layer.base_layer.weight))
    gc.collect()
    assert old[0]() is None and old[1]() is None
    check()


def test_who_stands_around_the_backend_sees_every_call(directly):
    calls = []

    def around(gm, inputs):
        ours = gaws(gm, inputs)

        def run(*arguments):
            calls.append(len(arguments))
            return ours(*arguments)

        return run

    model = small_llama()
    _, check = deciding(model, compiled(model, around))
    for _ in range(5):
        check()
    assert len(calls) == 5 and not directly[0]


def test_a_mode_sees_every_op(directly):
    model = small_llama()
    decoder, check = deciding(model, compiled(model))
    for _ in range(5):
        check()
    before = directly[0]
    with Seen() as seen:
        decoder.seek()
        decoder.step(5)
    assert torch.ops.gaws.project.default in seen.ops and directly[0] == before
    check()
    assert directly[0] == before + 1


def test_a_call_that_does_not_go_directly_holds_nothing(directly):
    model = small_llama()
    decoder, check = deciding(model, compiled(model))
    for _ in range(5):
        check()
    with Seen():
        decoder.seek()
        decoder.step(5)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    old = weakref.ref(layer.weight.untyped_storage())
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    gc.collect()
    assert old() is None


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.count = torch.nn.Linear(6, 6, bias=False), torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.w(x)


def test_what_a_call_does_beside_its_results_is_done_in_every_call(directly):
    class Turning(Small):
        def forward(self, x):
            y = self.w(x)
            torch._C._set_grad_enabled(True)
            return y

    class Counting(Small):
        def forward(self, x):
            self.count.add_(1)
            return self.w(x) + self.count

    class Buffered(Counting):
        def __init__(self) -> None:
            super().__init__()
            del self.count
            self.register_buffer("count", torch.zeros(()))

    for kind in (Turning, Counting, Buffered):
        model = kind()
        call, before = compiled(model), directly[0]
        for _ in range(6):
            version = model.count._version
            with torch.no_grad():
                torch.testing.assert_close(call(torch.ones(2, 6)) - model.count, model.w(torch.ones(2, 6)))
                assert torch.is_grad_enabled() is (kind is Turning)
            assert model.count._version == version + (kind is not Turning)
        assert (directly[0] > before) is (kind is not Turning)


def test_threads_that_meet_a_model_first_at_once(directly):
    for _ in range(4):
        model, x = Small(), torch.randn(2, 6)
        call = compiled(model)
        with torch.no_grad():
            want = model(x)
            call(x)

        def run(call=call, x=x, want=want):
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(call(x), want)

        at_once(*[run] * 4)
        before = directly[0]
        run()
        assert directly[0] > before
        torch._dynamo.reset()


def test_models_of_one_class_and_threads(directly):
    checks = [deciding(model, compiled(model))[1] for model in (small_llama(), small_llama())]
    for check in checks * 5:
        check()

    def run(check):
        for _ in range(30):
            check()

    at_once(*(functools.partial(run, check) for check in checks))
    assert directly[0] > 30
