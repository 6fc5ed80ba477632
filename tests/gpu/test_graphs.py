"""CUDA graphs, by hand and by Inductor, and export: adapters that are replaced in place show in the next replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gawscompile import ahead
from gawscompile.calibration import fit_gpu, gpu_timing
from gawscompile.demo.decoding import Decoder
from gawscompile.ir.spec import KernelSpec
from gawscompile.observe.store import RECORDS
from tests.gpu.conftest import rehearsable, renew
from tests.gpu.test_ops import SPEC, close

STRICT = {"strict": True}


def alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """In bf16: a few of its steps apart."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < 0.03, f"relative error {error:.3g}"


@pytest.mark.parametrize("plan", rehearsable(["single_launch[4]", "fused_tile", "two_launch[8]"], 2))
def test_the_op_in_a_graph(plan: str, device: str):
    spec = KernelSpec.parse(SPEC)
    x, operands = fit_gpu.tensors(spec, 2, device)
    recorded = gpu_timing.Recorded(lambda: torch.ops.gaws.project(x, operands, f"triton {plan} | {SPEC}"))
    for seed in range(2):
        torch.manual_seed(seed)
        fresh_x, fresh = fit_gpu.tensors(spec, 2, device)
        for tensor, new in zip([x, *operands], [fresh_x, *fresh], strict=True):
            tensor.copy_(new)
        outputs = recorded.replay()
        torch.cuda.synchronize()
        close(outputs, x, operands)


def test_a_capture_on_a_stream_that_is_new_has_counters_of_its_own(device: str):
    """As ``torch.cuda.graph`` does it by default: no call was ever made on its stream outside of a capture."""
    spec = KernelSpec.parse(SPEC)
    x, operands = fit_gpu.tensors(spec, 1, device)
    program = f"triton single_launch[4] | {SPEC}"
    torch.ops.gaws.project(x, operands, program)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = torch.ops.gaws.project(x, operands, program)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        close(outputs, x, operands)


def test_replays_of_two_graphs_overlap(device: str):
    """Every call in a graph has counters of its own, so both may be under way, wherever they were captured."""
    spec, program = KernelSpec.parse(SPEC), f"triton single_launch[4] | {SPEC}"
    problems = [fit_gpu.tensors(spec, 1, device) for _ in range(2)]
    torch.ops.gaws.project(*problems[0], program)
    torch.cuda.synchronize()
    graphs, found = [torch.cuda.CUDAGraph() for _ in problems], []
    for graph, problem in zip(graphs, problems, strict=True):
        with torch.cuda.graph(graph):  # on one stream, torch's own for captures
            found.append([torch.ops.gaws.project(*problem, program) for _ in range(2)])
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(1 if device == "cpu" else 300):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for calls, (x, operands) in zip(found, problems, strict=True):
        for outputs in calls:
            close(outputs, x, operands)


def test_an_adapted_model_in_a_graph(llama: Callable[..., Any], device: str):
    model, mark = llama(), len(RECORDS)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options=STRICT)
    ids = torch.randint(0, 64, (1, 1), device=device)

    @torch.no_grad()
    def run(call: Any = compiled) -> torch.Tensor:
        return call(input_ids=ids, use_cache=False).logits

    recorded = gpu_timing.Recorded(run)
    groups = [group for record in RECORDS.since(mark) for group in record.groups]
    assert groups and all(group.prefix.startswith("triton") for group in groups)
    seen = []
    for seed in (1, 2):
        renew(model, seed)
        seen.append(recorded.replay().clone())
        torch.cuda.synchronize()
        alike(seen[-1], run(model))
    assert not torch.equal(*seen), "the new factors show"
    ids.copy_((ids + 1) % 64)
    alike(recorded.replay(), run(model))


def test_a_token_is_decoded_in_a_graph(llama: Callable[..., Any]):
    model = llama()
    decoder = Decoder(model, torch.compile(model, backend="gaws", dynamic=False, options=STRICT), 8)
    decoder.fill([1, 2, 3])
    recorded = gpu_timing.Recorded(decoder.step_again, decoder.seek)
    decoder.seek()
    replayed = [recorded.replay().logits.clone() for _ in range(2)]
    plain = Decoder(model, model, 8)
    plain.fill([1, 2, 3])
    plain.seek()
    for got in replayed:
        alike(got, plain.step_again().logits)


def test_reduce_overhead(llama: Callable[..., Any], device: str):
    from torch._dynamo.utils import counters

    model = llama()
    compiled = torch.compile(model, backend="gaws", dynamic=False, mode="reduce-overhead")
    skipped = counters["inductor"]["cudagraph_skips"]
    for turn in range(2 if device == "cpu" else 5):  # warms up, records, replays
        renew(model, turn)
        ids = torch.randint(0, 64, (1, 1), device=device)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(input_ids=ids, use_cache=False).logits.clone()
            alike(got, model(input_ids=ids, use_cache=False).logits)
    assert counters["inductor"]["cudagraph_skips"] == skipped, "Inductor found a reason not to capture"


@pytest.mark.device_only
@pytest.mark.parametrize("tokens", [1, 24])
def test_export(tokens: int, llama: Callable[..., Any], device: str, tmp_path: Path):
    model = llama()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    ids = torch.randint(0, 64, (1, tokens), device=device)
    record = ahead.package(Logits(), tmp_path / "model.pt2", ids)
    assert record.groups and all(group.prefix.startswith("triton") for group in record.groups)
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    with torch.no_grad():
        for _ in range(2):
            alike(run(ids), model(input_ids=ids, use_cache=False).logits)
            ids = (ids + 1) % 64
