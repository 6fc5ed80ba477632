"""Generated Triton without a GPU: every plan compiled at real shapes, and one decoder layer's launches and bytes.

    python -m benchmarks.kernels --markdown benchmarks/results/kernels.md --csv benchmarks/results/kernels.csv

The shapes come from the models' own graphs: one layer of each, with random weights and an adapter on every linear, is
traced through Dynamo, AOTAutograd and our passes. Each group is then compiled by each plan that can run it, for every
target. The layer's account counts launches and bytes in those graphs; its times are *predicted* by the cost model, from
the GPUs' published peaks. Nothing here was run on a device.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from benchmarks.common import ADAPTERS, Setup, load_base, with_adapter, write
from benchmarks.shapes import SHAPES
from gawscompile import ahead
from gawscompile.calibration import measure
from gawscompile.codegen import triton
from gawscompile.codegen.triton_aot import TARGETS, compile_plan
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning import cost
from gawscompile.planning.devices import GPUS, Gpu
from gawscompile.planning.table import Program

DECODER_LAYERS = ("llama-3.2-1b", "llama-3.2-3b", "llama-7b")
ACCOUNT_GPUS = ("A100", "H100", "MI300X")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, whose size the others take (default 16)")
    parser.add_argument("--processes", type=int, default=2, help="compile in so many (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="the layers' account alone")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--csv", type=Path, help="write a line for every compiled kernel here")
    given = parser.parse_args(argv)
    command = f"`python -m benchmarks.kernels {' '.join(sys.argv[1:] if argv is None else argv)}`"
    sections = ["# Generated Triton kernels, without a GPU", command, measure.describe(measure.machine())]
    traced = {
        (name, kind): trace(name, kind, given.rank)
        for name in given.model
        for kind in (None, *given.adapters)
        if not (kind == "lokr" and name.startswith("gpt2"))  # PEFT's LoKr does not take GPT-2's Conv1D
    }
    sections += layers(traced, given)
    if not given.no_compile:
        jobs = list(plans_of(traced, given.targets))
        with ProcessPoolExecutor(given.processes) as pool:
            lines = [line for found in pool.map(compile_job, jobs, chunksize=4) for line in found]
        sections += summary(lines)
        write(given.csv, _csv(lines))
    text = "\n\n".join(sections)
    print(text)
    write(given.markdown, text)
    return 0


def trace(name: str, kind: str | None, rank: int) -> list[ahead.Traced]:
    """One layer of a shape with an adapter of `kind` on every linear, traced for one token; without the LM head."""
    setup = Setup(name, "bfloat16", rank, cast_adapters=True, layers=1)
    model = load_base(setup)
    if kind is not None:
        model = with_adapter(model, setup, kind, share=False)
    inner = model.get_base_model() if kind is not None else model
    body = getattr(inner, "model", None) or getattr(inner, "transformer", None) or inner
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return ahead.trace(body, GPUS["H100"], **inputs)


# --- Every plan at these shapes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One plan of one spec for one target, and where the spec comes from."""

    model: str
    adapter: str
    members: str
    spec: KernelSpec
    plan: triton.Plan
    target: str


@dataclass(frozen=True)
class Line:
    """One compiled kernel."""

    model: str
    adapter: str
    members: str
    target: str
    plan: str
    kernel: str
    warps: int
    registers: int
    spills: int
    looped_spills: int
    shared: int
    narrowest_w_load: int
    ordering: str


def plans_of(traced: dict[tuple[str, str | None], list[ahead.Traced]], targets: Iterable[str]) -> Iterable[Job]:
    """Every plan, with the rows that the cost model chooses for the target's GPU, of every different group."""
    seen = set()
    for (model, kind), graphs in traced.items():
        for group in (group for graph in graphs for group in graph.record.groups):
            spec = Program.parse(group.program).spec
            if spec in seen:
                continue
            seen.add(spec)
            members = " + ".join(path.rpartition(".")[2] for path in group.members)
            for target in targets:
                for plan in best_of_each(spec, ahead.gpu_for(target)):
                    yield Job(model, kind or "none", members, spec, plan, target)


def best_of_each(spec: KernelSpec, gpu: Gpu) -> list[triton.Plan]:
    """Each plan by name, with the rows that are predicted fastest for one token."""
    planned = cost.plan(spec, gpu)
    best: dict[str, triton.Plan] = {}
    for plan in sorted(triton.plans(spec), key=lambda plan: planned.seconds(str(plan), 1)):
        best.setdefault(plan.name, plan)
    return list(best.values())


def compile_job(job: Job) -> list[Line]:
    return [
        Line(
            *(job.model, job.adapter, job.members, job.target, str(job.plan)),
            one.name,
            *(one.warps, one.registers, one.spills, one.looped_spills, one.shared),
            min(one.loads["w"]) if "w" in one.loads else 0,
            " ".join(one.ordering),
        )
        for one in compile_plan(job.spec, job.plan, job.target)
    ]


def summary(lines: list[Line]) -> list[str]:
    """For each plan, kernel and target: the worst of all shapes."""
    groups: dict[tuple[str, str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.plan.partition("[")[0], line.kernel, line.target].append(line)
    rows = []
    for (plan, kernel, target), mine in sorted(groups.items()):
        most = max(mine, key=lambda line: line.registers)
        loads = [line.narrowest_w_load for line in mine if line.narrowest_w_load]
        rows.append(
            [
                *(plan, kernel, target, str(len(mine))),
                f"{most.registers} ({most.model} {most.adapter} {most.members})",
                *(str(max(getattr(line, name) for line in mine)) for name in ("spills", "looped_spills", "shared")),
                str(min(loads)) if loads else "",
                max((line.ordering for line in mine), key=len),
            ]
        )
    heads = ["plan", "kernel", "target", "shapes", "most registers (where)", "most spills", "in loops", "most shared"]
    heads += ["narrowest W load", "ordering instructions"]
    decode = [line for line in lines if "[" in line.plan]
    nvidia = [line for line in lines if line.target.startswith("cuda")]
    told = (
        f"{len(lines)} kernels compiled. Decode plans: at most {max(line.registers for line in decode)} registers"
        f" ({max((line.registers for line in decode if line in nvidia), default=0)} on NVIDIA's targets) and"
        f" {sum(line.spills > 0 for line in decode)} kernels with spills or local memory. Of all plans,"
        f" {sum(line.spills > 0 for line in lines)} have any, at most {max(line.spills for line in lines)} bytes, and"
        f" {sum(line.looped_spills > 0 for line in lines)} in a loop;"
        f" {sum(0 < line.narrowest_w_load < 16 for line in lines)} load base weights by less than 16 bytes,"
        f" {sum(0 < line.narrowest_w_load < 16 for line in nvidia)} of them for NVIDIA. Below, the worst of all shapes."
    )
    return ["## Every plan at the shapes of one layer, bf16", told, measure.table(heads, rows, markdown=True)]


def _csv(lines: list[Line]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Line.__dataclass_fields__)
    writer.writerows([getattr(line, name) for name in Line.__dataclass_fields__] for line in lines)
    return file.getvalue()


# --- One decoder layer -------------------------------------------------------------------------------------


@dataclass
class Account:
    """Launches that multiply by parameters and other launches, with the bytes that each moves."""

    products: list[int]
    others: list[int]

    def beyond(self, bare: Account) -> tuple[int, int]:
        """Launches and bytes that are not products, more than the bare model has."""
        return len(self.others) - len(bare.others), sum(self.others) - sum(bare.others)

    def seconds(self, gpu: Gpu, bare: Account) -> float:
        """Predicted, as segments: a launch each, and its bytes."""
        launches, moved = self.beyond(bare)
        products = sum(self.products) / (gpu.tensor_share * gpu.bandwidth)
        return (len(self.products) + launches) * gpu.launch + products + moved / gpu.bandwidth


def segments(graph: torch.fx.Graph) -> Account:
    """A graph as frameworks run it: a launch for every product with a parameter, and one for every connected set of
    elementwise ops (as a fusing compiler has it), which reads its inputs and writes its outputs once."""
    products = [_bytes([*node.all_input_nodes, node]) for node in graph.nodes if _is_product(node)]
    sets: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        if _is_elementwise(node):
            merged = {node}
            for source in map(_through_views, node.all_input_nodes):
                merged |= sets.get(source, set())
            for member in merged:
                sets[member] = merged
    others = []
    for members in {id(found): found for found in sets.values()}.values():
        reads = {n for member in members for n in map(_through_views, member.all_input_nodes)} - members
        writes = {n for n in members if any(user not in members and not _is_view(user) for user in n.users)}
        others.append(_bytes([*reads, *writes]))
    return Account(products, others)


_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}  # batched ones are attention's and positions'


def _is_product(node: Node) -> bool:
    return node.target in _PRODUCTS and any(_from_parameter(source) for source in node.all_input_nodes)


def _from_parameter(node: Node) -> bool:
    """Whether a matrix is computed from placeholders alone, and is no activation."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if one not in seen:
            seen.add(one)
            if one.op == "placeholder":
                value = one.meta.get("val")
                if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                    return False
            pending += one.all_input_nodes
    return bool(seen)


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and node.target in _VIEWS


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.reshape.default,
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
}


def _through_views(node: Node) -> Node:
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_elementwise(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    target: Any = node.target
    cast = target is torch.ops.prims.convert_element_type.default
    return cast or torch.Tag.pointwise in getattr(target, "tags", ())


def _bytes(nodes: Iterable[Node]) -> int:
    values = (node.meta.get("val") for node in nodes)
    return sum(math.prod(map(int, v.shape)) * v.dtype.itemsize for v in values if isinstance(v, torch.Tensor))


def fused(graphs: list[ahead.Traced], gpu: Gpu) -> tuple[int, int, float]:
    """Launches, bytes and predicted seconds of the groups, for one token on `gpu`."""
    launches, moved, seconds = 0, 0, 0.0
    for group in (group for graph in graphs for group in graph.record.groups):
        program = Program.parse(group.program)
        spec, planned = program.spec, cost.plan(program.spec, gpu)
        chosen = planned.table.pick(1)
        launches += program.target.launches(spec, chosen)
        moved += sum(math.prod(1 if s == "m" else int(s) for s in o.shape) * _size(o.dtype) for o in spec.operands())
        moved += spec.k * _size(spec.x) + sum(n * _size(out) for n, out in spec.outputs)
        seconds += planned.seconds(chosen, 1)
    return launches, moved, seconds


def _size(dtype: str) -> int:
    return 8 if dtype == "f64" else DTYPES[dtype].itemsize


def layers(traced: dict[tuple[str, str | None], list[ahead.Traced]], given: argparse.Namespace) -> list[str]:
    """The account of one decoder layer of each Llama."""
    sections = [
        "## One decoder layer at one token, bf16: launches, bytes, predicted time",
        "Segments are what the framework's graph holds: a launch for every product with a parameter, and beyond the"
        " bare model's one for every further connected set of elementwise ops. Ours are the generated kernels of the"
        " same graph after the passes. Times are **predicted** from published peaks, with: "
        + "; ".join(
            f"{gpu.name} {gpu.bandwidth / 1e12:g} TB/s, {gpu.launch * 1e6:g} µs a launch, {gpu.latency * 1e6:g} µs"
            f" latency, {gpu.publish * 1e6:g} µs to wait in a launch"
            for gpu in map(GPUS.__getitem__, ACCOUNT_GPUS)
        )
        + f"; the vendor library reaches {GPUS['H100'].tensor_share:.0%} of the bandwidth. Attention and norms are not"
        " counted.",
    ]
    for name in (name for name in given.model if name in DECODER_LAYERS):
        plain = segments(traced[name, None][0].before)
        rows = []
        for kind in (None, *given.adapters):
            graphs = traced[name, kind]
            account = segments(graphs[0].before)
            more, moved = account.beyond(plain)
            ours = {gpu: fused(graphs, GPUS[gpu]) for gpu in ACCOUNT_GPUS}
            times = [
                f"{account.seconds(GPUS[gpu], plain) * 1e6:.0f} → {ours[gpu][2] * 1e6:.0f}" for gpu in ACCOUNT_GPUS
            ]
            rows.append(
                [
                    kind or "none",
                    f"{len(account.products)} + {more}",
                    " / ".join(dict.fromkeys(str(ours[gpu][0]) for gpu in ACCOUNT_GPUS)),
                    f"{(sum(account.products) + moved) / 1e6:.1f}",
                    f"{ours['H100'][1] / 1e6:.1f}",
                    *times,
                ]
            )
        heads = ["adapters", "launches as segments", "ours", "MB as segments", "ours"]
        heads += [f"{gpu}, predicted µs" for gpu in ACCOUNT_GPUS]
        sections += [f"### {name}", measure.table(heads, rows, markdown=True)]
    return sections


if __name__ == "__main__":
    sys.exit(main())
