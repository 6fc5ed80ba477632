"""torch.compile(model, backend="gaws"), whole: answers, live parameters, and what is left to Inductor."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gawscompile import backend, explain
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.codegen import build
from gawscompile.observe.store import RECORDS
from gawscompile.passes import PIPELINE, group_siblings
from gawscompile.runtime import ops
from tests.graphs import Pair, randomise, small_bert, small_llama, tokens

IDS = tokens(2, 5)
STRICT = {"strict": True}
MODELS = {
    "llama fp32": lambda: small_llama(),
    "llama bf16": lambda: small_llama(torch.bfloat16),
    "llama bf16, bf16 adapters": lambda: small_llama(torch.bfloat16).to(torch.bfloat16),
    "bert fp32": lambda: small_bert(),
    "bert bf16": lambda: small_bert(torch.bfloat16),
}


@pytest.fixture
def uncached():
    """No warm graph stands in for what is tested here."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@torch.no_grad()
def output(model, ids=IDS):
    out = model(ids, use_cache=False) if "causal" in str(type(model)).lower() else model(ids)
    return (out.logits if "logits" in out else out.last_hidden_state).double()


def run(function):
    with torch.no_grad():
        return function()


def last_record():
    return RECORDS.since(len(RECORDS) - 1)[0]


REPEATS = ("llama fp32", "llama bf16, bf16 adapters", "bert fp32", "bert bf16")  # what the other would show too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in REPEATS else name for name in MODELS]
)
def test_no_further_from_fp64_than_eager(name):
    """The fused sums keep u = A x and every sum in fp32; eager rounds after each segment."""
    model = MODELS[name]()
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    ours, eager = output(compiled), output(model)
    reference = output(copy.deepcopy(model).double())
    assert len(last_record().groups) == 9
    error = (ours - reference).norm() / reference.norm()
    assert error <= 1.25 * (eager - reference).norm() / reference.norm() + 1e-7


def test_parameters_are_live_and_nothing_recompiles():
    model = small_llama()
    compiled = torch.compile(model, backend="gaws", options=STRICT)
    before = output(compiled)
    graphs = graphs_compiled()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]

    def scaled_in_place():
        for p in factors:
            p.mul_(1.1)

    def written_through_data():
        for p in factors:
            p.data.mul_(-0.9)

    def replaced_data():
        for p in factors:
            p.data = p.data.clone() * 1.2

    def base_too():
        for p in model.parameters():
            p.data = p.data * 0.99

    def state_dict_loaded():
        model.load_state_dict({name: value * 1.05 for name, value in model.state_dict().items()})

    for change in (scaled_in_place, written_through_data, replaced_data, base_too, state_dict_loaded):
        run(change)
        after = output(compiled)
        assert not torch.allclose(after, before, rtol=1e-3), change.__name__
        torch.testing.assert_close(after, output(model), rtol=1e-4, atol=1e-4)
        before = after
    assert graphs_compiled() == graphs


@pytest.mark.slow
def test_switching_adapters_off_and_over_gives_eagers_answers():
    from peft import LoraConfig

    model = small_llama(layers=1)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    randomise(model, seed=1)
    compiled = torch.compile(model, backend="gaws", options=STRICT)
    first = output(compiled)
    torch.testing.assert_close(first, output(model), rtol=1e-4, atol=1e-4)
    model.set_adapter("other")
    second = output(compiled)
    torch.testing.assert_close(second, output(model), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(output(compiled), output(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        plain = output(compiled)
        torch.testing.assert_close(plain, output(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, rtol=1e-3) and not torch.allclose(first, plain, rtol=1e-3)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)
    torch.testing.assert_close(output(compiled), output(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_gradients(caplog, training):
    model = small_llama(layers=1)
    twin = copy.deepcopy(model)
    options = {**STRICT, "training": training}
    with caplog.at_level(logging.INFO, logger="gawscompile"):
        loss = torch.compile(model, backend="gaws", options=options)(IDS, labels=IDS, use_cache=False).loss
    assert bool([r.message for r in caplog.records if "gradients" in r.message]) != training
    loss.backward()
    twin(IDS, labels=IDS, use_cache=False).loss.backward()
    wanted = dict(twin.named_parameters())
    factors = [name for name, p in model.named_parameters() if p.grad is not None]
    assert factors and all("lora_" in name for name in factors)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-4, atol=1e-5)


class Quantised(torch.nn.Module):
    """An int8 linear whose weight is computed in the forward, with an offset that no kernel knows."""

    def __init__(self, n: int, k: int, adapted: bool = True) -> None:
        super().__init__()
        self.adapted = adapted
        self.register_buffer("q", torch.randint(-127, 127, (n, k), dtype=torch.int8))
        self.register_buffer("s", torch.rand(n, 1) / 64)
        self.a = torch.nn.Parameter(torch.randn(4, k))
        self.b = torch.nn.Parameter(torch.randn(n, 4))

    def forward(self, x):
        weight = self.q.to(x.dtype) * self.s + 0.25
        base = torch.nn.functional.linear(x, weight)
        return base + 0.5 * (x @ self.a.T @ self.b.T) if self.adapted else base


def test_a_quantised_base_of_an_unknown_format_is_left_alone_and_says_why_or_is_added_to():
    model, x = Quantised(24, 32), torch.randn(3, 32)
    (entry,) = explain(model, x).linears
    assert (entry.status, entry.operators) == ("fused", "Opaque[24] + 0.5·LowRank(r=4)")
    (bare,) = explain(Quantised(24, 32, adapted=False), x).linears
    assert (bare.status, bare.reason) == ("rejected", "WEIGHT_COMPUTED")
    compiled = torch.compile(model, backend="gaws", options=STRICT)
    torch.testing.assert_close(run(lambda: compiled(x)), run(lambda: model(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fp64_is_left_alone_and_says_why():
    model = small_llama(layers=1).double()
    report = explain(model, IDS, use_cache=False)
    assert {entry.reason for entry in report.linears} == {"DTYPE"}
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    torch.testing.assert_close(output(compiled), output(model), rtol=1e-5, atol=1e-6)  # its norms are in fp32


def test_without_a_compiler_one_warning_and_inductors_answer(monkeypatch, caplog, uncached):
    def missing():
        raise build.CompilerMissing(build._MISSING)

    monkeypatch.setattr(build, "compiler", missing)
    monkeypatch.setattr(ops, "ensure_loaded", missing)  # it remembers that it was loaded before
    model, x = Pair().eval(), torch.randn(1, 3, 32)
    compiled = torch.compile(model, backend="gaws")
    torch.testing.assert_close(run(lambda: compiled(x)), run(lambda: model(x)), rtol=1e-4, atol=1e-4)
    (warning,) = [r.message for r in caplog.records if r.name == "gawscompile" and r.levelno == logging.WARNING]
    assert "install g++" in warning and "left to Inductor" in warning


def test_other_devices_are_left_to_inductor():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        here, there, number = torch.empty(2, 3), torch.empty(2, 3, device="cuda"), torch.empty(())
    assert backend._kind([there, number, 3]) == "cuda" and backend._kind([number]) == ""
    kind = backend._kind([there, here])
    reason, detail = backend._unavailable(kind)
    assert reason.name == "DEVICE" and detail == kind == "cpu,cuda"
    assert backend._refusal(torch.fx.Graph(), (reason, detail), backend.Options(), kind) == (reason, detail)


def test_without_triton_a_graph_on_a_gpu_is_left_to_inductor(monkeypatch):
    assert backend._unavailable("cuda") is None
    monkeypatch.setitem(sys.modules, "triton", None)
    reason, detail = backend._unavailable("cuda")
    assert reason.name == "NO_TRITON" and "triton" in detail


@pytest.mark.parametrize("stage", [module.__name__.rpartition(".")[2] for module in PIPELINE])
def test_a_failing_pass_falls_back_and_is_named(stage, monkeypatch, caplog, uncached):
    (module,) = [m for m in PIPELINE if m.__name__.endswith("." + stage)]

    def fail(graph, context):
        for node in reversed(graph.nodes):
            if node.op == "call_function" and not node.users:
                graph.erase_node(node)  # a half-done edit must not reach Inductor
        raise RuntimeError("planted")

    monkeypatch.setattr(module, "run", fail)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)), torch.randn(3, 8)
    compiled = torch.compile(model, backend="gaws")
    torch.testing.assert_close(run(lambda: compiled(x)), run(lambda: model(x)))
    (warning,) = [r.message for r in caplog.records if r.name == "gawscompile" and r.levelno == logging.WARNING]
    assert stage in warning and "planted" in warning
    torch._dynamo.reset()
    with pytest.raises(Exception, match="planted"):
        run(lambda: torch.compile(model, backend="gaws", options=STRICT)(x))


def test_dynamos_own_exceptions_pass_through(monkeypatch, uncached):
    from torch._dynamo.exc import TorchDynamoException

    def restart(graph, context):
        raise TorchDynamoException("restart")

    monkeypatch.setattr(group_siblings, "run", restart)
    with pytest.raises(TorchDynamoException, match="restart"):
        run(lambda: torch.compile(torch.nn.Linear(8, 4), backend="gaws")(torch.randn(3, 8)))


def test_the_users_own_joint_pass_still_runs(uncached):
    seen = []

    class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append([str(node.target) for node in graph.nodes])

        def uuid(self):
            return b"theirs"

    compiled = torch.compile(torch.nn.Linear(32, 24), backend="gaws", options={"joint_custom_pre_pass": Theirs()})
    run(lambda: compiled(torch.randn(1, 32)))
    assert any("gaws.project" in target for target in seen[0])


def test_dynamos_graph_is_not_mutated():
    counter = CompileCounterWithBackend("gaws")
    model = Pair().eval()
    run(lambda: torch.compile(model, backend=counter)(torch.randn(1, 3, 32)))
    (graph,) = counter.graphs
    again = graph.code
    graph.recompile()
    assert graph.code == again
    assert not any("gaws" in str(node.target) for node in graph.graph.nodes)


def test_the_name_needs_no_import_of_ours():
    code = """
import torch, sys
assert "gaws" in torch._dynamo.list_backends()
model = torch.nn.Linear(8, 4)
with torch.no_grad():
    x = torch.randn(1, 8)
    torch.testing.assert_close(torch.compile(model, backend="gaws", options={"strict": True})(x), model(x))
assert "gawscompile.backend" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modes_and_dynamic_shapes():
    pair, x = Pair().eval(), torch.randn(1, 3, 32)
    compiled = torch.compile(pair, backend="gaws", mode="default")
    torch.testing.assert_close(run(lambda: compiled(x)), run(lambda: pair(x)), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(pair, backend="gaws", dynamic=True, fullgraph=True)
    for length in (4, 9):
        x = torch.randn(1, length, 32)
        torch.testing.assert_close(run(lambda x=x: compiled(x)), run(lambda x=x: pair(x)), rtol=1e-4, atol=1e-4)


def bf16_with_fp32_bias(x, w, b):
    return torch.nn.functional.linear(x, w) + b.bfloat16()


ODD = {
    "activations multiplied": (lambda x, w: x @ w.T, (5, 32), (7, 32)),
    "[in, out] weight": (lambda x, w: x @ w, (5, 32), (32, 7)),
    "one feature and a broadcast vector": (lambda x, w, b: x @ w.T + b, (6, 32), (1, 32), (9,)),
    "transposed residual": (lambda x, w, r: r.t() + torch.nn.functional.linear(x, w), (5, 64), (48, 64), (48, 5)),
    "a size added": (lambda x, w: torch.nn.functional.linear(x, w) + x.shape[0], (5, 32), (24, 32)),
    "empty features": (lambda x, w: torch.nn.functional.linear(x, w) + 1, (5, 0), (8, 0)),
    "integer vector": (lambda x, w, b: x @ w.T + b.to(torch.int32), (5, 32), (24, 32), (24,)),
    "float8 weight": (lambda x, w: x @ w.to(torch.float8_e4m3fn).float().T, (5, 32), (24, 32)),
    "integer scale": (
        lambda x, w, a, b, s: x @ w.T + (x @ a.T @ b.T) * (s * 3).to(torch.int32),
        *((5, 32), (24, 32), (4, 32), (24, 4), ()),
    ),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ODD)
def test_odd_products_come_out_as_eagers(name, dynamic):
    function, *sizes = ODD[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, generator=generator) for size in sizes]
    compiled = torch.compile(function, backend="gaws", dynamic=dynamic, options={"strict": True, "verify": True})
    got, want = run(lambda: compiled(*inputs)), run(lambda: function(*inputs))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.stride() == want.stride()


def test_a_bias_of_another_dtype_survives_being_given_back():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator) for size in ((1024, 256), (256, 256), (256,)))
    compiled = torch.compile(bf16_with_fp32_bias, backend="gaws", options=STRICT)
    x, w = x.bfloat16(), w.bfloat16()
    want = run(lambda: bf16_with_fp32_bias(x, w, b))
    torch.testing.assert_close(run(lambda: compiled(x, w, b)), want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_a_symbolic_rank_adds_no_guard():
    def adapted(x, w, a, b):
        return torch.nn.functional.linear(x, w) + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)

    compiled = torch.compile(adapted, backend="gaws", options=STRICT)
    x, w = torch.randn(3, 32), torch.randn(24, 32)
    before = graphs_compiled()
    for rank in (8, 6, 5, 7, 4, 3):
        a, b = torch.randn(rank, 32), torch.randn(24, rank)
        got = run(lambda a=a, b=b: compiled(x, w, a, b))
        torch.testing.assert_close(got, adapted(x, w, a, b), rtol=1e-4, atol=1e-3)
    assert graphs_compiled() - before <= 2


def test_branches_of_a_cond_are_in_one_report():
    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = torch.nn.Linear(32, 24), torch.nn.Linear(32, 24)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x), (x,))

    model, x = Branching().eval(), torch.randn(3, 32)
    report = explain(model, x, options=STRICT)
    assert len(report.fused) == 2
    compiled = torch.compile(model, backend="gaws", options=STRICT)
    torch.testing.assert_close(run(lambda: compiled(x)), run(lambda: model(x)))
