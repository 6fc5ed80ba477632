"""Ahead of time: what a model becomes on a GPU that need not be here, and its kernels as files.

`trace` runs Dynamo, AOTAutograd and our passes over one call of a model on this machine, planned for a GPU of your
choice, and keeps each graph as it was and as it became; the call itself is answered by the graph as it was. `emit`
writes what a traced model needs: Triton source, assembly, binaries, and a table of what the kernels take.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gawscompile.codegen import triton, triton_aot
from gawscompile.codegen.triton_aot import Compiled
from gawscompile.debug.explain import call_once
from gawscompile.ir.records import GraphRecord
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from gawscompile.planning import devices
from gawscompile.planning.devices import GPUS, Gpu
from gawscompile.planning.table import Program
from gawscompile.runtime import first_calls


@dataclass
class Traced:
    """One graph of a model: before our passes and after them, and the record of what they did."""

    before: torch.fx.Graph
    after: torch.fx.Graph
    record: GraphRecord


def gpu_for(target: str) -> Gpu:
    """The GPU whose numbers the cost model uses for a compilation `target` (``cuda:90``, ``hip:gfx942``): the one of
    its architecture or else the nearest older one. Raises `SpecError` for what is no target."""
    kind, _, architecture = target.partition(":")
    triton_aot.parse_target(target)
    if kind == "hip":
        return GPUS["MI300X"]
    known = {int(gpu.target.split(":")[1]): gpu for gpu in GPUS.values() if gpu.target.startswith("cuda")}
    return known[max((capability for capability in known if capability <= int(architecture)), default=min(known))]


def trace(model: torch.nn.Module, gpu: Gpu, *args: Any, training: bool = False, **inputs: Any) -> list[Traced]:
    """Every graph of one call ``model(*args, **inputs)``, planned for `gpu`, on copied inputs. With `training` a graph
    that needs gradients is one of forward and backward; else there are no gradients.

    Raises what the model and our passes raise.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import default_partition
    from torch._inductor.decomposition import select_decomp_table

    from gawscompile.backend import GawsPass, stored_inputs
    from gawscompile.options import Options

    found: list[Traced] = []
    stored: frozenset[int] = frozenset()

    def rewritten(gm: torch.fx.GraphModule) -> None:
        before, after = (torch.fx.GraphModule(gm, copy.deepcopy(gm.graph)).graph for _ in range(2))
        hook = GawsPass(Options(strict=True, training=True), "ahead of time", "cuda", stored=stored)
        with devices.planning_for(gpu):
            hook(after)
        assert hook.record is not None
        found.append(Traced(before, after, hook.record))

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        rewritten(gm)
        return make_boxed_func(gm.forward)

    def partition(gm: torch.fx.GraphModule, *rest: Any, **settings: Any) -> Any:
        rewritten(gm)
        return default_partition(gm, *rest, **settings)

    through = aot_autograd(
        fw_compiler=lambda gm, _: make_boxed_func(gm.forward),
        inference_compiler=compiler,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )

    def backend(gm: torch.fx.GraphModule, inputs_: Any) -> Any:
        nonlocal stored
        stored = stored_inputs(gm, inputs_)
        return through(gm, inputs_)

    with first_calls.put_off(model):
        call_once(model, backend, args, inputs, training=training)
    return found


def package(model: torch.nn.Module, path: Path, *args: Any, **inputs: Any) -> GraphRecord:
    """Exports one call ``model(*args, **inputs)``, without gradients, and writes it as an AOTInductor package for the
    device that the model is on, at `path` (``.pt2``); ``torch._inductor.aoti_load_package`` loads it. Gives our record.

    On a GPU, kernels of plans that keep nothing between calls are part of the package. `single_launch`, and all kernels
    on a CPU, stay calls of ``gaws::project``: who loads the package must import gawscompile first.

    Raises `ValueError` for a model without parameters or with an adapter bank, and what export, our passes and Inductor
    raise.
    """
    from gawscompile.backend import GawsPass
    from gawscompile.options import Options

    if hasattr(model, "adapter_bank"):
        raise ValueError("a package cannot have an adapter bank, whose pool and adapters are this process's")
    device = next((parameter.device.type for parameter in model.parameters()), None)
    if device is None:
        raise ValueError("a model without parameters is on no device, and has nothing to fuse")
    hook = GawsPass(Options(strict=True, transparent=True), "ahead of time", device)
    with torch.no_grad():
        exported = torch.export.export(model, args, inputs)
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={"joint_custom_pre_pass": hook}
        )
    if hook.record is None:
        raise RuntimeError("Inductor ran no joint-graph pass (torch._inductor.config.use_joint_graph_passes is off?)")
    return hook.record


@dataclass(frozen=True)
class Kernel:
    """One generated module of a model: who runs in it, by which plan, and its compiled kernels."""

    members: tuple[str, ...]
    spec: KernelSpec
    plan: triton.Plan
    compiled: tuple[Compiled, ...]


def kernels(traced: list[Traced], target: str, tokens: int) -> Iterator[Kernel]:
    """What the groups of a traced model run, each different one once, compiled for `target`: for `tokens` tokens, but
    for groups that were traced with another number of rows (an image's patches)."""
    members: dict[tuple[KernelSpec, triton.Plan], list[str]] = {}
    for graph in traced:
        for group in graph.record.groups:
            program = Program.parse(group.program)
            rows = int(group.tokens) if group.tokens.isdecimal() else tokens
            plan = triton.Plan.parse(program.table.pick(rows))
            members.setdefault((program.spec, plan), []).append(" + ".join(group.members))
    for (spec, plan), who in members.items():
        yield Kernel(tuple(who), spec, plan, tuple(triton_aot.compile_plan(spec, plan, target)))


def emit(traced: list[Traced], target: str, tokens: int, out: Path) -> str:
    """Write a traced model's kernels for `tokens` tokens into the folder `out`, and return the table of resources.

    A subfolder for every generated module holds its source, ``kernel.py``, and for every variant of its kernels the
    intermediate texts and the binary; ``resources.md`` is the table. Raises `SpecError` where no group was planned.
    """
    rows = []
    for number, kernel in enumerate(kernels(traced, target, tokens)):
        folder = out / f"{number:02d}_{kernel.plan.name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernel.py").write_text(triton.emit(kernel.spec, kernel.plan))
        for one in kernel.compiled:
            for suffix, content in one.files.items():
                if isinstance(content, (str, bytes)):
                    data = content.encode() if isinstance(content, str) else content
                    (folder / f"{one.name}.{suffix}").write_bytes(data)
            rows.append((folder.name, kernel, one))
    if not rows:
        raise SpecError("nothing to emit: no group of this model was fused (gawscompile explain says why)")
    text = _resources(rows, target, tokens)
    (out / "resources.md").write_text(text + "\n")
    return text


def _resources(rows: list[tuple[str, Kernel, Compiled]], target: str, tokens: int) -> str:
    lines = [
        f"Kernels for {target}, {tokens} token{'s' * (tokens != 1)}: registers per thread, spills (NVIDIA: bytes of"
        " stack and local memory; AMD: registers and bytes of scratch), shared memory in bytes per program, bytes per"
        " load of a base weight, instructions that order memory between programs.",
        "",
        "| module | groups | first group | plan | kernel | warps | registers | spills | shared | W loads | ordering |",
        "|---|---:|---|---|---|---:|---:|---:|---:|---|---|",
    ]
    for folder, kernel, one in rows:
        cells = [
            folder,
            len(kernel.members),
            kernel.members[0],
            kernel.plan,
            one.name,
            one.warps,
            one.registers,
            one.spills,
            one.shared,
            ", ".join(map(str, one.loads.get("w", {}))),
            ", ".join(one.ordering),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
