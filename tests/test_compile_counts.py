"""What compiling costs, by counts that do not depend on the machine: work of the passes, kernels, warm starts,
recompiles."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters

from gawscompile.calibration import measure
from gawscompile.codegen import build
from gawscompile.passes import PIPELINE
from gawscompile.planning.table import Program
from tests.graphs import Captured, capture, small_llama, tokens


def lines_run(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Lines of Python that every pass runs, those of what it calls included: a loop over all nodes inside a loop over
    all nodes shows, whatever the machine."""
    counts: Counter[str] = Counter()

    def counted(name, real):
        def trace(frame, event, argument):
            counts[name] += event == "line"
            return trace

        def run(graph, context):
            sys.settrace(trace)
            try:
                real(graph, context)
            finally:
                sys.settrace(None)

        return run

    with monkeypatch.context() as patch:
        for stage in PIPELINE:
            patch.setattr(stage, "run", counted(stage.__name__.rpartition(".")[2], stage.run))
        captured.until()
    return counts


@pytest.fixture(scope="module")
def graphs() -> dict[int, Captured]:
    """Adapted models of a few layers, by their layers."""
    return {layers: capture(small_llama(layers=layers), tokens(1, 1), use_cache=False) for layers in (1, 2, 4)}


@pytest.mark.slow
def test_every_pass_is_linear_in_the_layers(graphs, monkeypatch):
    graphs[1].until()  # what is kept for equal shapes and specs is kept by now
    one, two, four = (lines_run(graphs[layers], monkeypatch) for layers in (1, 2, 4))
    assert one.keys() >= {"canonicalize", "recover_operators", "group_siblings", "fuse_zflora", "choose_plan", "lower"}
    for name in four:
        layer, later = two[name] - one[name], (four[name] - two[name]) / 2
        assert later <= 1.1 * layer + 50, f"{name}: {layer} lines for the second layer, {later} for each of two more"


def test_identical_layers_share_kernels(graphs):
    kernels = {
        layers: {Program.parse(group.program).sources()["kernel.cpp"] for group in captured.until().record.groups}
        for layers, captured in graphs.items()
    }
    assert kernels[2] == kernels[4] and len(kernels[4]) == len(kernels[1]) == 5  # qkv, o, gate and up, down, the head


class Projection(torch.nn.Module):
    """One linear with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.nn.Linear(48, 40)
        self.a = torch.nn.Parameter(torch.randn(4, 48))
        self.b = torch.nn.Parameter(torch.randn(40, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2.0 * ((x @ self.a.T) @ self.b.T)


@torch.no_grad()
def test_a_second_compile_builds_nothing():
    x = torch.randn(2, 48)
    torch.compile(Projection().eval(), backend="gaws", options={"strict": True})(x)
    torch._dynamo.reset()
    built, passes, hits = counters["gaws"]["built"], counters["gaws"]["passes"], measure.cache_hits()
    torch.compile(Projection().eval(), backend="gaws", options={"strict": True})(x)
    assert counters["gaws"]["built"] == built and counters["gaws"]["passes"] == passes
    assert measure.cache_hits() > hits


@torch.no_grad()
def test_recompiles_are_inductors():
    """Batch, length, decode and prefill, weights: none needs more graphs than Dynamo asks of every backend, Inductor
    among them."""

    def graphs_after_each(backend: str) -> list[int]:
        torch._dynamo.reset()
        model = Projection().eval()
        run = torch.compile(model, backend=backend)
        found, start = [], measure.graphs_compiled()
        for shape in ((1, 5, 48), (1, 7, 48), (1, 9, 48), (2, 9, 48), (3, 8, 48), (1, 1, 48), (1, 12, 48), (1, 1, 48)):
            torch.testing.assert_close(run(x := torch.randn(shape)), model(x), rtol=1e-4, atol=1e-4)
            found.append(measure.graphs_compiled() - start)
        for change in (lambda: model.a.data.normal_(), lambda: setattr(model, "b", torch.nn.Parameter(model.b * 2))):
            change()
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
            found.append(measure.graphs_compiled() - start)
        return found

    ours, theirs = graphs_after_each("gaws"), graphs_after_each("eager")
    assert ours == theirs and ours[-1] < len(ours)


def test_a_kernel_is_built_for_the_plans_that_run():
    spec = "k=48 x=f32; n=40 w=f32 out=f32 lora(r=4 f32 s=2.0)"
    programs = {plans: Program.parse(f"{plans} | {spec}") for plans in ("gemv_cpp", "gemm_accumulate")}
    texts = {plans: program.sources()["kernel.cpp"] for plans, program in programs.items()}
    assert "void gemv(" in texts["gemv_cpp"] and "void accumulate(" not in texts["gemv_cpp"]
    assert "void accumulate(" in texts["gemm_accumulate"] and "void gemv(" not in texts["gemm_accumulate"]
    both = Program.parse(f"gemv_cpp<=4, gemm_accumulate | {spec}").sources()["kernel.cpp"]
    assert "void gemv(" in both and "void accumulate(" in both
    assert build.start(texts["gemv_cpp"]) is build.start(texts["gemv_cpp"])
