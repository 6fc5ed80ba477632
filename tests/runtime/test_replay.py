"""A graph of constant sizes run again: the same numbers as by its steps, wherever inputs and results lie."""

from __future__ import annotations

import gc
import threading
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
from tests.runtime.test_executor import both

PAIR = "gemv_cpp | k=6 x=f32; n=6 w=f32 out=f32 lora(r=2 f32 s=2.0); n=3 w=f32 out=f32"
ADDED = "gemv_cpp | k=6 x=f32; n=6 w=f32 out=f32 residual=f32"
LIBRARY = "gemm_accumulate | k=6 x=f32; n=6 w=f32 out=f32 lora(r=2 f32 s=2.0)"
W, A, B, V = (torch.randn(*shape) for shape in ((6, 6), (2, 6), (6, 2), (3, 6)))


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


def project(out, x, operands, program):
    return f"{out} = torch.ops.gaws.project.default({x}, [{operands}], {program!r})"


LINES = {
    "projections one after the other": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1, arg4_1", PAIR),
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "del buf0",
        project("buf3", "reinterpret_tensor(buf1, (2, 6), (6, 1), 0)", "arg1_1, arg0_1", ADDED),
        "del buf1",
        "buf4 = buf3[0]",
        "assert_size_stride(buf4, (2, 6), (6, 1), 'project')",
        "return (buf4, buf2, )",
    ],
    "results are inputs, views and twice the same": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1, arg4_1", PAIR),
        "buf1 = buf0[0]",
        "buf2 = buf0[1]",
        "buf3 = reinterpret_tensor(buf1, (2, 3), (6, 1), 2)",
        "return (arg0_1, buf3, buf2, reinterpret_tensor(arg1_1, (3, ), (2, ), 1), buf1, None, )",
    ],
    "memory is shared by liveness": [
        project("buf0", "arg0_1", "arg1_1, arg0_1", ADDED),
        "buf1 = buf0[0]; del buf0",
        *(
            line
            for i in range(2, 14, 2)
            for line in (
                project(f"buf{i}", f"buf{i - 1}", f"arg1_1, buf{max(i - 3, 1)}", ADDED),
                f"buf{i + 1} = buf{i}[0]",
                f"del buf{i}",
            )
        ),
        "return (buf13, )",
    ],
    "by the library, with places for results": [
        project("buf0", "arg0_1", "arg1_1, arg2_1, arg3_1", LIBRARY),
        "buf1 = buf0[0]",
        project("buf2", "buf1", "arg1_1, arg0_1", ADDED),
        "buf3 = buf2[0]",
        "return (buf3, )",
    ],
    "attention": [
        "buf0 = torch.ops.gaws.attend.default(reinterpret_tensor(arg0_1, (1, 2, 1, 6), (12, 6, 6, 1), 0), "
        "reinterpret_tensor(arg1_1, (1, 1, 6, 6), (36, 36, 6, 1), 0), "
        "reinterpret_tensor(arg1_1, (1, 1, 6, 6), (36, 36, 6, 1), 0), None, 0.5, 'attend d=6 x=f32')",
        "buf1 = buf0",
        "assert_size_stride(buf1, (1, 2, 1, 6), (12, 6, 6, 1), 'attend')",
        project("buf2", "reinterpret_tensor(buf1, (2, 6), (6, 1), 0)", "arg1_1, arg0_1", ADDED),
        "buf3 = buf2[0]",
        "return (buf3, )",
    ],
}


def drawn():
    return [torch.randn(2, 6), *(one.clone() for one in (W, A, B, V))]


def compare(python, steps, inputs):
    want, got = python(list(inputs)), steps(list(inputs))
    assert len(want) == len(got)
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one, other) and one.stride() == other.stride()
    return got


@pytest.mark.parametrize("name", LINES)
def test_every_call_gives_the_numbers_of_the_first(name):
    inputs = drawn()
    python, steps = both(LINES[name], *inputs)
    kept = []
    for call in range(5):
        inputs = drawn()
        inputs[1].mul_(call + 1)  # weights are read in every call, wherever they are by then
        kept.append((python(list(inputs)), compare(python, steps, inputs)))
        assert steps.replays() == (call > 0)
    for want, got in kept:  # results are the caller's: no later call writes to them
        assert all(one is None or torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_an_input_that_is_returned_is_itself():
    inputs = drawn()
    _, steps = both(LINES["results are inputs, views and twice the same"], *inputs)
    for _ in range(3):
        got = steps(list(inputs))
        assert got[0] is inputs[0]
        assert got[1].untyped_storage().data_ptr() == got[4].untyped_storage().data_ptr()
        assert got[3].untyped_storage().data_ptr() == inputs[1].untyped_storage().data_ptr()


def test_other_inputs_are_laid_out_for_themselves_and_bad_ones_are_the_same_error():
    inputs = drawn()
    python, steps = both(LINES["projections one after the other"], *inputs)
    for _ in range(3):
        compare(python, steps, inputs)
    assert steps.replays() == 1
    bad = [*inputs[:3], inputs[3].double(), inputs[4]]
    with pytest.raises(RuntimeError, match="no longer has the dtype, shape or device"):
        steps(list(bad))
    turned = [inputs[0], inputs[1].t().contiguous().t(), *inputs[2:]]  # by its own copy, as before
    compare(python, steps, turned)
    compare(python, steps, inputs)
    assert steps.replays() == 1
    many = torch.randn(9, 2, 6)
    for one in many:  # at other offsets
        compare(python, steps, [one, *inputs[1:]])
    assert steps.replays() == 1
    with torch.inference_mode():
        compare(python, steps, [one.clone() for one in inputs])  # of other dispatch keys
    assert steps.replays() == 2


@pytest.mark.parametrize(
    "lines",
    [
        ["buf0 = aten.relu.default(arg0_1)", "return (buf0, )"],
        [
            "buf0 = empty_strided_cpu((1024, 1024), (1024, 1), torch.float32)",
            "buf1 = reinterpret_tensor(buf0, (2, ), (1, ), 0)",
            project("buf2", "arg0_1", "arg1_1, arg0_1", ADDED),
            "buf3 = buf2[0]",
            "return (buf3, )",
        ],
    ],
    ids=["an op of aten", "more memory than is kept"],
)
def test_what_is_not_laid_out_runs_by_its_steps(lines):
    inputs = drawn()
    python, steps = both(lines, *inputs)
    for _ in range(4):
        compare(python, steps, inputs)
    assert steps.replays() == 0


def test_threads_run_one_graph_at_once():
    inputs = drawn()
    python, steps = both(LINES["memory is shared by liveness"], *inputs)
    failed = []

    def run():
        try:
            for _ in range(200):
                compare(python, steps, drawn())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert 1 <= steps.replays() <= 4


def test_the_profiler_sees_it():
    inputs = drawn()
    _, steps = both(LINES["projections one after the other"], *inputs)
    steps(list(inputs))
    with torch.profiler.profile() as profile:
        steps(list(inputs))
    assert [event.name for event in profile.events()].count("gaws::project") == 2


# ---- directly, from a frame whose parameters are watched -------------------------------------------------------------

watched = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")


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


def deciding(model, backend="gaws"):
    """`model` and what decodes it, and a check of the next token's logits against the model itself."""
    decoder = Decoder(model, torch.compile(model, backend=backend, dynamic=False), 32)
    decoder.fill(tokens(1, 7)[0].tolist())

    def check():
        decoder.seek()
        got = decoder.step(5)
        decoder.seek()
        decoder.run, run = model, decoder.run
        want = decoder.step(5)
        decoder.run = run
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    return decoder, check


@watched
def test_a_decode_step_goes_directly_and_follows_every_change(directly):
    model = small_llama()
    _, check = deciding(model)
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


@watched
def test_no_parameter_is_kept_alive(directly):
    model = small_llama()
    _, check = deciding(model)
    for _ in range(6):
        check()
    assert directly[0]
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    old = weakref.ref(layer.base_layer.weight), weakref.ref(layer.base_layer.weight.untyped_storage())
    layer.base_layer.weight = torch.nn.Parameter(torch.randn_like(layer.base_layer.weight))
    gc.collect()
    assert old[0]() is None and old[1]() is None
    check()


@watched
def test_who_stands_around_the_backend_sees_every_call(directly):
    calls = []

    def around(gm, inputs):
        compiled = gaws(gm, inputs)

        def run(*arguments):
            calls.append(len(arguments))
            return compiled(*arguments)

        return run

    _, check = deciding(small_llama(), around)
    for _ in range(5):
        check()
    assert len(calls) == 5 and not directly[0]


@watched
def test_a_mode_sees_every_op(directly):
    class Seen(TorchDispatchMode):
        ops = ()

        @classmethod
        def ignore_compile_internals(cls):  # compiled code runs under it
            return True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops = (*self.ops, func)
            return func(*args, **(kwargs or {}))

    decoder, check = deciding(small_llama())
    for _ in range(5):
        check()
    before = directly[0]
    with Seen() as seen:
        decoder.seek()
        decoder.step(5)
    assert torch.ops.gaws.project.default in seen.ops and directly[0] == before
    check()
    assert directly[0] == before + 1


@watched
def test_a_call_that_does_not_go_directly_holds_nothing(directly):
    class Seen(TorchDispatchMode):
        @classmethod
        def ignore_compile_internals(cls):
            return True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model = small_llama()
    decoder, check = deciding(model)
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


@watched
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

    for kind in (Turning, Counting):
        model = kind()
        call = torch.compile(model, backend="gaws", dynamic=False)
        for _ in range(6):
            version = model.count._version
            with torch.no_grad():
                torch.testing.assert_close(call(torch.ones(2, 6)) - model.count, model.w(torch.ones(2, 6)))
                assert torch.is_grad_enabled() is (kind is Turning)
            assert model.count._version == version + (kind is Counting)


@watched
def test_threads_that_meet_a_model_first_at_once(directly):
    for _ in range(4):
        model = Small()
        call = torch.compile(model, backend="gaws", dynamic=False)
        x = torch.randn(2, 6)
        with torch.no_grad():
            want = model(x)
            call(x)
        failed = []

        def run(call=call, x=x, want=want, failed=failed):
            try:
                with torch.no_grad():
                    for _ in range(20):
                        torch.testing.assert_close(call(x), want)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed[0]
        before = directly[0]
        run()
        assert not failed and directly[0] > before
        torch._dynamo.reset()


@watched
def test_models_of_one_class_and_threads(directly):
    checks = [deciding(small_llama())[1] for _ in range(2)]
    for check in checks * 5:
        check()
    failed = []

    def run(check):
        try:
            for _ in range(30):
                check()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(check,)) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert directly[0] > 30
