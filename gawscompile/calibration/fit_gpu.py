"""``gawscompile calibrate`` on a GPU: the cost model's constants fitted to the card's own kernels, and kept.

Groups of LLaMA-3.2's shapes run by every plan that could be chosen for them, at one token and more, each captured into
a CUDA graph, with copies of the operands in turn that together exceed the second cache. The constants of `devices.Gpu`
are then moved, one at a time, by ever smaller factors, as long as `planning.gpu_cost` predicts the times better; what
no time shows stays where it was. Published matrix rates stay: the shares that plans reach of them are fitted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gawscompile import cache
from gawscompile.calibration import gpu_timing, measure
from gawscompile.codegen import triton
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SCALE_DTYPES
from gawscompile.planning import devices, gpu_cost
from gawscompile.planning.devices import Gpu

_LORA = "lora(r=16 bf16 s=2.0)"
SPECS = (
    "k=2048 x=bf16; n=2048 w=bf16 out=bf16",
    "k=3072 x=bf16; " + "; ".join(f"n={n} w=bf16 out=bf16 {_LORA}" for n in (3072, 1024, 1024)),
    "k=3072 x=bf16 swiglu; " + "; ".join([f"n=8192 w=bf16 out=bf16 {_LORA}"] * 2),
)
"""A small group without adapters, q, k and v, gate and up; the latter two with LoRA."""
ROWS = {"stream": (16, 8, 4), "single_launch": (16, 8, 4), "two_launch": (8,), "redundant_shrink": (8,)}
FEW, MANY = (1, 4), (1, 16, 128)
"""Tokens of plans for few of them and of the others."""
FITTED = ("bandwidth", "cache_bandwidth", "vector_rate", "launch", "publish", "latency")
SHARES = ("tensor_share", "tile_share", "library_share")
STAY = 1e-3
"""Weight of a constant's squared logarithmic distance from its default, where that of all times is one."""


@dataclass(frozen=True)
class Sample:
    """One timed group: seconds of one call."""

    spec: str
    plan: str
    tokens: int
    seconds: float

    def predicted(self, gpu: Gpu) -> float:
        """Seconds, by the cost model."""
        spec, plan = KernelSpec.parse(self.spec), triton.Plan.parse(self.plan)
        return float(gpu_cost.seconds(spec, plan, gpu, self.tokens))


@dataclass(frozen=True)
class Calibration:
    """The constants before and after, the timings they come from, what could not be timed and why."""

    before: Gpu
    after: Gpu
    samples: tuple[Sample, ...]
    failed: tuple[str, ...] = ()

    def error(self, gpu: Gpu, plan: str) -> float:
        """The geometric mean factor by which the predictions for `gpu` are off, for plans of that name."""
        mine = [sample for sample in self.samples if triton.Plan.parse(sample.plan).name == plan]
        return math.exp(statistics.fmean(abs(math.log(s.predicted(gpu) / s.seconds)) for s in mine))

    def summary(self) -> str:
        """Constants and errors, before and after, and what failed."""
        units = {"bandwidth": 1e9, "cache_bandwidth": 1e9, "vector_rate": 1e12} | dict.fromkeys(SHARES, 1.0)
        named = {1e9: "GB/s", 1e12: "TFLOP/s", 1.0: "of 1", 1e-6: "µs"}
        constants = []
        for name in (*FITTED, *SHARES):
            unit = units.get(name, 1e-6)
            values = [f"{getattr(gpu, name) / unit:.2f}" for gpu in (self.before, self.after)]
            constants.append([f"{name}, {named[unit]}", *values])
        plans = list(dict.fromkeys(triton.Plan.parse(sample.plan).name for sample in self.samples))
        errors = [[plan, *(f"{self.error(gpu, plan):.2f}" for gpu in (self.before, self.after))] for plan in plans]
        parts = [
            f"{self.after.name}, {len(self.samples)} timings",
            measure.table(["constant", "default", "fitted"], constants),
            measure.table(["predictions are off by a factor of", "default", "fitted"], errors),
        ]
        return "\n\n".join([*parts, *(f"not timed: {what}" for what in self.failed)])


def calibrate(
    rounds: int = 5, specs: Sequence[str] = SPECS, few: Sequence[int] = FEW, many: Sequence[int] = MANY
) -> Calibration:
    """Measures, fits and stores for the current device; about two minutes, most of it Triton's compilations.

    Raises `ValueError` where nothing could be timed, naming the last error, and `CacheError` where nothing can be
    kept. A plan that fails is left out, and the summary says so.
    """
    cache.check_writable()
    copied = gpu_timing.copy_bandwidth(rounds)
    samples, failed = [], []
    for text in specs:
        for plan in plans_of(KernelSpec.parse(text)):
            for tokens in few if plan.rows else many:
                found = _attempt(text, str(plan), tokens, rounds)
                if isinstance(found, Sample):
                    samples.append(found)
                else:
                    failed.append(found)
    if not samples:
        raise ValueError(f"no plan could be timed on this GPU; the last: {failed[-1]}")
    before = devices.default_gpu(torch.cuda.current_device())
    after = devices.store(fitted(before, samples, copied))
    return Calibration(before, after, tuple(samples), tuple(failed))


def _attempt(spec: str, plan: str, tokens: int, rounds: int) -> Sample | str:
    """A sample, or why there is none: a kernel may not build or run on a card."""
    try:
        return Sample(spec, plan, tokens, time_plan(spec, plan, tokens, rounds))
    except Exception as error:
        return f"{plan}, {tokens} tokens, {spec}: {type(error).__name__}: {error}"


def plans_of(spec: KernelSpec) -> list[triton.Plan]:
    """The plans of `spec` that are timed: decode plans with some of the rows that they come with."""
    return [plan for plan in triton.plans(spec) if plan.rows is None or plan.rows in ROWS.get(plan.name, ())]


def time_plan(spec: str, plan: str, tokens: int, rounds: int) -> float:
    """Seconds of one call by `plan` with operands that come from memory: the median of `rounds` passes over copies."""
    program = f"triton {plan} | {spec}"
    run = cold(KernelSpec.parse(spec), tokens, lambda x, operands: torch.ops.gaws.project(x, operands, program))
    return statistics.median(run(rounds)) / 1e3


def cold(
    spec: KernelSpec, tokens: int, call: Callable[[torch.Tensor, list[torch.Tensor]], Any]
) -> Callable[[int], list[float]]:
    """``call(x, operands)`` captured with copies of the operands of `spec` in turn, which together exceed the second
    cache. What is returned takes a number of passes over them, and gives each one's milliseconds by call."""
    copies = [tensors(spec, tokens) for _ in range(gpu_timing.cold_copies(sum(gpu_cost.operand_bytes(spec))))]
    recorded = gpu_timing.Recorded(lambda: [call(*copy) for copy in copies])
    return lambda rounds: [taken / len(copies) for taken in gpu_timing.samples(recorded, rounds)]


def tensors(spec: KernelSpec, tokens: int, device: str | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random x and operands of `spec` for so many tokens, so sized that outputs are near one."""
    device = device or gpu_timing.DEVICE

    def normal(shape: tuple[int | str, ...], dtype: str) -> torch.Tensor:
        sizes = [tokens if size == "m" else int(size) for size in shape]
        drawn = torch.randn(sizes, device=device) / max(1, sizes[-1] if len(sizes) > 1 else 1) ** 0.5
        return drawn.to(SCALE_DTYPES[dtype])

    x = torch.randn(tokens, spec.k, device=device).to(SCALE_DTYPES[spec.x])
    return x, [normal(o.shape, o.dtype) for o in spec.operands()]


def fitted(default: Gpu, samples: Sequence[Sample], copied: float | None = None) -> Gpu:
    """`default` with the constants that predict `samples` best, tried from its own, or the bandwidth of a copy."""

    def loss(gpu: Gpu) -> float:
        off = statistics.fmean(math.log(s.predicted(gpu) / s.seconds) ** 2 for s in samples)
        moved = sum(math.log(getattr(gpu, name) / getattr(start, name)) ** 2 for name in (*FITTED, *SHARES))
        return off + STAY * moved

    start = best = dataclasses.replace(default, bandwidth=copied or default.bandwidth)
    lowest, factor = loss(best), 2.0
    while factor > 1.002:
        before = lowest
        for name in (*FITTED, *SHARES):
            for step in (factor, 1 / factor):
                value = getattr(best, name) * step
                trial = dataclasses.replace(best, **{name: min(value, 1.0) if name in SHARES else value})
                if (found := loss(trial)) < lowest:
                    best, lowest = trial, found
        if lowest == before:
            factor **= 0.5
    return best
