"""The op on a GPU, without one: fakes, the choice of op and plan, the record, and Triton's kernels seen by Inductor."""

from __future__ import annotations

import operator
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from gawscompile.planning.table import Program
from gawscompile.runtime import gpu, ops

LORA = "lora(r=8 bf16 s=2.0)"
SPEC = f"k=128 x=bf16; n=96 w=bf16 out=bf16 residual=bf16 {LORA}; n=32 w=bf16 out=f32 bias=bf16 {LORA}"


def _fakes(mode: FakeTensorMode, leading: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    dtypes = {"bf16": torch.bfloat16, "f32": torch.float32}
    with mode:
        operands = []
        for o in KernelSpec.parse(SPEC).operands():
            shape = [size for s in o.shape for size in (leading if s == "m" else (int(s),))]
            operands.append(torch.empty(shape, dtype=dtypes[o.dtype], device="cuda"))
        return torch.empty((*leading, 128), dtype=torch.bfloat16, device="cuda"), operands


@pytest.mark.parametrize("leading", [(1,), (2, 3), (1, 0)])
def test_the_opaque_op_has_a_fake(leading: tuple[int, ...]):
    mode = FakeTensorMode()
    x, operands = _fakes(mode, leading)
    with mode:
        y = torch.ops.gaws.project(x, operands, f"triton single_launch[8]<=2, fused_tile | {SPEC}")
    assert [(tuple(t.shape), t.dtype, t.device.type) for t in y] == [
        ((*leading, 96), torch.bfloat16, "cuda"),
        ((*leading, 32), torch.float32, "cuda"),
    ]


class Streams:
    """What `counters` asks of CUDA, and the threads in which it allocates."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.threads, zeros = 7, False, [], torch.zeros

        def recorded(*args: object, **kwargs: object) -> torch.Tensor:
            self.threads.append(threading.get_ident())
            return zeros(*args, **kwargs)

        monkeypatch.setattr(torch, "zeros", recorded)
        known = {
            "current_stream": lambda _: SimpleNamespace(cuda_stream=self.stream, synchronize=lambda: None),
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, stand_in in known.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(gpu, "_flags", {})
        monkeypatch.setattr(gpu, "_blocks", {})


def test_counters_are_kept_for_each_stream_and_outlive_a_larger_buffer(monkeypatch: pytest.MonkeyPatch):
    cuda, device = Streams(monkeypatch), torch.device("cpu")
    first = gpu.counters(device, 10)
    assert gpu.counters(device, first.numel()) is first and not first.any()
    larger = gpu.counters(device, first.numel() + 1)
    assert larger is not first and gpu.counters(device, 10) is larger
    assert any(kept is first for kept in gpu._flags[0, 7]), "a launch under way may still count there"
    cuda.stream = 8
    assert gpu.counters(device, 10) is not larger


def test_counters_that_are_kept_never_come_from_a_private_pool_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch):
    cuda, device = Streams(monkeypatch), torch.device("cpu")
    kept = gpu.counters(device, 10)
    assert cuda.threads != [threading.get_ident()], "while graphs warm up, this thread allocates in their pool"
    cuda.capturing, cuda.stream = True, 9
    made = len(cuda.threads)
    captured = gpu.counters(device, 10)
    assert captured.data_ptr() != kept.data_ptr() and len(cuda.threads) == made, "it was there before the capture"


def test_every_call_in_a_cuda_graph_has_counters_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "BLOCK", 4 * gpu.LINE)
    cuda, device = Streams(monkeypatch), torch.device("cpu")
    cuda.capturing = True
    alone = gpu.counters(device, 10)
    assert cuda.threads == [threading.get_ident()] and alone.numel() == 10, "no call came before: the graph makes them"
    cuda.capturing = False
    gpu.counters(device, 1)
    cuda.capturing = True
    first, second, third = (gpu.counters(device, count) for count in (10, gpu.LINE + 1, gpu.LINE))
    spans = [(t.storage_offset(), t.numel()) for t in (first, second, third)]
    assert spans == [(0, gpu.LINE), (gpu.LINE, 2 * gpu.LINE), (3 * gpu.LINE, gpu.LINE)]
    assert gpu.counters(device, 10).untyped_storage().data_ptr() != first.untyped_storage().data_ptr(), "used up"
    cuda.capturing = False
    gpu.counters(device, 1)
    assert [block.taken for block in gpu._blocks[0]] == [gpu.BLOCK, 0] and not first.any()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that knows no more than what it would compile for."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    known = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", known)
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("plan", "written"),
    [
        ("two_launch[4]", [{"u"}, {"y0", "y1"}]),
        ("redundant_shrink[8]", [{"y0", "y1"}]),
        ("fused_tile", [{"u"}, {"y0", "y1"}]),
    ],
)
def test_a_transparent_graph_shows_the_kernels_and_what_they_write(plan: str, written: list[set[str]]):
    mode = FakeTensorMode()
    x, operands = _fakes(mode, (1, 3))
    graph = torch.fx.Graph()
    nodes = []
    for value in (x, *operands):
        nodes.append(graph.placeholder(f"i{len(nodes)}"))
        nodes[-1].meta["val"] = value
    call = graph.call_function(
        torch.ops.gaws.project_traced.default, (nodes[0], nodes[1:], f"triton {plan} | {SPEC}")
    )
    items = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    graph.output(items)
    gpu.inline(graph)
    graph.lint()
    launches = [n for n in graph.nodes if n.target is torch.ops.higher_order.triton_kernel_wrapper_functional]
    assert [set(n.kwargs["tensors_to_clone"]) for n in launches] == written
    shapes = [tuple(n.meta["val"].shape) for n in graph.output_node().args[0]]
    assert shapes == [(1, 3, 96), (1, 3, 32)]


@pytest.mark.usefixtures("stand_in")
def test_a_transparent_op_takes_no_tokens():
    mode = FakeTensorMode()
    x, operands = _fakes(mode, (1, 0))
    with mode:
        y = torch.ops.gaws.project_traced(x, operands, f"triton two_launch[4] | {SPEC}")
    assert [tuple(t.shape) for t in y] == [(1, 0, 96), (1, 0, 32)]


@pytest.mark.parametrize(
    ("program", "transparent"),
    [
        ("triton two_launch[4]", True),
        ("triton autotuned gemm_accumulate", True),
        ("triton single_launch[4]", False),
        ("triton two_launch[4]<=2, fused_tile", False),
        ("gemv_cpp", False),
    ],
)
def test_only_plans_that_keep_nothing_and_add_no_guard_are_transparent(program: str, transparent: bool):
    parsed = Program.parse(f"{program} | {SPEC}")
    assert parsed.stateless == transparent and str(parsed) == f"{program} | {SPEC}"


@pytest.mark.parametrize(
    "program", ["triton gemv_cpp", "single_launch[8]", "triton single_launch", "autotuned gemv_cpp", "magic"]
)
def test_plans_of_another_emitter_are_refused(program: str):
    with pytest.raises(SpecError):
        Program.parse(f"{program} | {SPEC}")


def test_a_program_for_a_gpu_does_not_run_on_a_cpu():
    ops.ensure_loaded()
    spec = KernelSpec.parse("k=8 x=f32; n=4 w=f32 out=f32")
    with pytest.raises(RuntimeError, match="tensors on the CPU meet a program for a GPU"):
        torch.ops.gaws.project(torch.ones(1, 8), [torch.ones(4, 8)], f"triton stream[4] | {spec}")
