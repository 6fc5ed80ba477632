"""Timing models side by side: what the demo and the benchmarks share.

Machines are noisy and shared, so numbers from different runs do not compare. Everything here therefore works in turns:
every variant runs a few steps, then the next one, round after round, and medians are taken over all rounds.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

PACKAGES = ("torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one variant: median, quartiles and extremes over `count` samples."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summary of `samples`, in their unit. Raises `ValueError` where there are none."""
        if not samples:
            raise ValueError("no samples to summarise")
        ordered = sorted(samples)
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), low, high, ordered[0], ordered[-1], len(ordered))


def machine() -> dict[str, str]:
    """What the numbers were taken on: processor, cores, threads, instruction set, load, GPU if any, versions."""
    found = {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    if hasattr(os, "getloadavg"):
        found["load"] = f"{os.getloadavg()[0]:.1f}"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def describe(facts: Mapping[str, str]) -> str:
    """`machine()` on two lines, the machine and the versions; a third where other work will disturb the timings."""
    gpu = f", {facts['gpu']}" if "gpu" in facts else ""
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['vectors']}{gpu}",
        f"{facts['system']}; " + ", ".join(f"{name} {facts[name]}" for name in PACKAGES),
    ]
    if float(facts.get("load", 0)) > 0.5:
        lines.append(f"The machine is busy (load {facts['load']} at the start): expect slow and scattered numbers.")
    return "\n".join(lines)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """`rows` under `headers` in aligned columns, the first to the left and the others to the right."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|".join(
            ("-" * (width + 2)) if column == 0 else ("-" * (width + 1) + ":") for column, width in enumerate(widths)
        )
        rule = f"|{rule}|"
    else:
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def compiled(model: Any, backend: str, **settings: Any) -> Any:
    """`model` under ``torch.compile(backend=…)``; ``backend="eager"`` gives it back as it is, and "gawscompile.compile"
    is that function.

    Several backends compile the same ``forward`` here. Where torch can (2.12 and later), each gets a table of compiled
    graphs of its own, so that one variant's entries neither slow another's lookup nor use up its recompile limit.
    """
    if backend == "eager":
        return model
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings.setdefault("isolate_recompiles", True)
    if backend == "gawscompile.compile":
        from gawscompile.serving import entry

        return entry.compile(model, **settings)
    if backend == "gaws":
        from gawscompile.backend import register  # not before: Inductor alone is measured without it

        register()
    return torch.compile(model, backend=backend, **settings)


def sharing_copy(model: torch.nn.Module) -> Any:
    """A copy of `model` with modules of its own and the *same* parameters and buffers.

    Adapters can then be put on the copy while the original stays bare, and the weights are in memory once.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def graphs_compiled() -> int:
    """Graphs Dynamo has compiled in this process so far; it must stand still while something is timed."""
    return int(counters["stats"]["unique_graphs"])


def cache_hits() -> int:
    """Compiled graphs that came from the on-disk caches so far: a compile time with hits is a warm one."""
    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def synchronize() -> None:
    """Waits for the GPU, if there is one; on the CPU everything is done when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], object]) -> float:
    """Milliseconds one call of `action` takes, its work on the GPU included."""
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return (time.perf_counter() - began) * 1e3


def interleave(
    variants: Mapping[str, Callable[[], float]], rounds: int, steps: int, without_guards: Iterable[str] = ()
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Samples of every variant, taken in turns: each round, `steps` of each, in an order that is drawn anew.

    A variant is a callable that prepares and runs one step and returns its milliseconds. The first step of each turn is
    not counted, since it finds the others' data in the caches. Variants named in `without_guards` run a second turn in
    which Dynamo skips its guards; those samples are the second result. Python's collector rests meanwhile.
    """
    names = list(variants)
    bare = set(without_guards)
    normal: dict[str, list[float]] = {name: [] for name in names}
    guardless: dict[str, list[float]] = {name: [] for name in names if name in bare}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in random.Random(turn).sample(names, len(names)):
                _turn(variants[name], steps, normal[name])
                if name in bare:
                    with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                        _turn(variants[name], steps, guardless[name])
    finally:
        gc.enable()
    return normal, guardless


def _turn(step: Callable[[], float], steps: int, samples: list[float]) -> None:
    step()
    samples.extend(step() for _ in range(steps))


COLD = 96 << 20
"""Bytes of operands that a group's kernel goes through before it meets the same ones again: more than caches hold."""


def measure_groups(groups: Iterable[Any], rounds: int = 15) -> None:
    """Set `measured` of every group: the median seconds of its kernels alone, on random operands and cold weights.

    A group whose number of tokens is symbolic, or whose device is not here, stays unmeasured. Groups of one program
    are measured once.
    """
    from gawscompile.planning.table import Program

    taken: dict[tuple[str, int], float] = {}
    for group in groups:
        program = Program.parse(group.program)
        if not group.tokens.isdecimal() or (program.target.device == "cuda" and not torch.cuda.is_available()):
            continue
        key = group.program, int(group.tokens)
        if key not in taken:
            taken[key] = _seconds(program, key[1], rounds)
        group.measured = taken[key]


def _seconds(program: Any, tokens: int, rounds: int) -> float:
    from gawscompile.ir import banked
    from gawscompile.ir.types import SCALE_DTYPES
    from gawscompile.runtime import ops

    ops.ensure_loaded()
    device = program.target.device

    def made(sizes: Sequence[int | str], dtype: str) -> torch.Tensor:
        numbers = torch.randn([tokens if size == "m" else int(size) for size in sizes], device=device)
        return numbers.to(SCALE_DTYPES[dtype])

    spec, operands = program.spec, []
    for o in spec.operands():
        if o.table and (bank := spec.projections[o.projection].banked):
            schedule, numbers = banked.usual(spec.k, bank.n, bank.width)
            operands.append(made([numbers], o.dtype) if o.role == "pool" else schedule.to(device))
        else:
            operands.append(made(o.shape, o.dtype))
    x = made(("m", spec.k), spec.x)
    size = sum(tensor.nbytes for tensor in operands)
    sets = [operands, *([tensor.clone() for tensor in operands] for _ in range(min(COLD // max(size, 1), 63)))]
    text = str(program)
    turns = itertools.islice(itertools.cycle(sets), rounds + 2)
    samples = [timed(functools.partial(torch.ops.gaws.project, x, one, text)) for one in turns]
    return statistics.median(samples[2:]) / 1e3
