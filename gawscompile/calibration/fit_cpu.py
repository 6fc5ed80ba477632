"""``gawscompile calibrate``: the cost model's constants of this machine's CPU, fitted to its own kernels, and kept.

For `gemv_cpp` and `gemm_accumulate` in each dtype, projections of a few shapes are timed from 1 to 256 tokens with
weights that come from memory, as in a model: copies of a weight are used in turn, more than the caches hold. A time is
fitted as the cost model has it (`gawscompile.planning.cost`),

    seconds = launch + bytes / bandwidth + operations / rate,

by least squares of the relative errors, with no constant below zero; the generated kernel's operations are those after
its first tile of tokens, which hide behind the bytes. A constant that the times do not show keeps its default. What was
fitted lies in the cache folder, under the name of the kind of machine, and is part of every key.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gawscompile import cache
from gawscompile.calibration import measure
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning import cost, cpu_cost, devices
from gawscompile.planning.devices import Device
from gawscompile.planning.targets import CPP

SHAPES = ((1536, 576), (576, 1536), (2048, 2048), (4096, 1024))
"""(features out, features in)."""
TOKENS = (1, 2, 4, 16, 64, 256)
GENERATED, LIBRARY = FITTED = ("gemv_cpp", "gemm_accumulate")
"""Plans whose constants are fitted; those of others follow (`cpu_cost.PANELS`)."""
COLD = 256 << 20
"""Bytes of copies of a weight for few tokens, and a quarter of that for many, which hardly wait for memory."""


@dataclass(frozen=True)
class Sample:
    """One timed projection: seconds of one call."""

    dtype: str
    plan: str
    features: tuple[int, int]
    tokens: int
    seconds: float

    @property
    def spec(self) -> KernelSpec:
        n, k = self.features
        return KernelSpec.parse(f"k={k} x={self.dtype}; n={n} w={self.dtype} out={self.dtype}")

    @property
    def bytes(self) -> int:
        return math.prod(self.features) * DTYPES[self.dtype].itemsize

    @property
    def operations(self) -> float:
        """That take time of their own, at the full rate."""
        if CPP.kind(self.plan).uses_library:
            return 2 * self.tokens * math.prod(self.features)
        rate = cpu_cost.cached(self.features[1], self.dtype)
        return 2 * max(0, self.tokens - cpu_cost.TILE_TOKENS) * math.prod(self.features) / rate


@dataclass(frozen=True)
class Calibration:
    """The defaults, what was fitted, and the timings."""

    before: Device
    after: Device
    samples: tuple[Sample, ...]

    def error(self, device: Device, plan: str, dtype: str) -> float:
        """The geometric mean factor by which the predictions for `device` are off."""
        mine = [sample for sample in self.samples if (sample.plan, sample.dtype) == (plan, dtype)]
        predicted = [cost.plan(sample.spec, device).seconds(plan, sample.tokens) for sample in mine]
        return math.exp(
            statistics.fmean(abs(math.log(p / sample.seconds)) for p, sample in zip(predicted, mine, strict=True))
        )

    def summary(self) -> str:
        """Constants and errors, before and after."""
        kinds = list(dict.fromkeys((sample.plan, sample.dtype) for sample in self.samples))
        errors = [
            [f"{plan}, {dtype}", *(f"{self.error(d, plan, dtype):.2f}" for d in (self.before, self.after))]
            for plan, dtype in kinds
        ]
        constants = [
            [name, *(f"{value / scale:.1f}" for value in pair)]
            for name, scale, pair in _constants(self.before, self.after)
        ]
        return "\n\n".join(
            [
                f"{self.after.name}, {len(self.samples)} timings",
                measure.table(["constant", "default", "fitted"], constants),
                measure.table(["predictions are off by a factor of", "default", "fitted"], errors),
            ]
        )


def calibrate(
    rounds: int = 5,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    cold: int = COLD,
) -> Calibration:
    """Measures, fits and stores, for torch's present number of threads; takes about a minute.

    Raises `gawscompile.codegen.build.CompilerMissing`, and `CacheError` where nothing can be kept.
    """
    from gawscompile.runtime import ops

    cache.check_writable()
    ops.ensure_loaded()
    samples = tuple(
        _time(dtype, plan, shape, m, rounds, cold if m <= 4 else cold // 4)
        for dtype in ("f32", "bf16")
        for plan in FITTED
        for shape in shapes
        for m in tokens
    )
    before = devices.default_cpu()
    after = devices.store(fitted(before, samples))
    return Calibration(before, after, samples)


def _time(dtype: str, plan: str, features: tuple[int, int], tokens: int, rounds: int, cold: int) -> Sample:
    """The median of `rounds` passes over copies of a weight, by call."""
    from gawscompile.runtime import pages

    n, k = features
    blank = Sample(dtype, plan, features, tokens, 0.0)
    weights = [torch.randn(n, k).to(DTYPES[dtype]) for _ in range(max(2, cold // blank.bytes))]
    pages.enlarge(weights)  # as compiled models' are
    x, program = torch.randn(tokens, k).to(DTYPES[dtype]), f"{plan} | {blank.spec}"

    def run() -> None:
        for weight in weights:
            torch.ops.gaws.project(x, [weight], program)

    run()  # builds
    taken = statistics.median(measure.timed(run) for _ in range(rounds)) / 1e3 / len(weights)
    return dataclasses.replace(blank, seconds=taken)


def fitted(default: Device, samples: Sequence[Sample]) -> Device:
    """`default` with the constants that `samples` show."""
    streams = {
        (plan, dtype): [s for s in samples if (s.plan, s.dtype) == (plan, dtype)]
        for plan in FITTED
        for dtype in ("f32", "bf16")
    }
    launch, streaming, rate = solve(streams[GENERATED, "f32"])
    bandwidth = streaming or default.bandwidth
    kernel = {**default.kernel_rate, "f32": rate or default.kernel_rate["f32"]}
    # weights of either dtype come from one memory
    known = {"launch": launch or 0.0, "bandwidth": bandwidth}
    kernel["bf16"] = solve(streams[GENERATED, "bf16"], known)[2] or kernel["bf16"]
    library, library_bandwidth, launches = dict(default.library_rate), dict(default.library_bandwidth), []
    for dtype in ("f32", "bf16"):
        started, streaming, rate = solve(streams[LIBRARY, dtype])
        launches.append(started or 0.0)
        library[dtype] = rate or library[dtype]
        library_bandwidth[dtype] = streaming or library_bandwidth[dtype]
    return dataclasses.replace(
        default,
        bandwidth=bandwidth,
        launch=launch or default.launch,
        library_launch=statistics.fmean(launches) or default.library_launch,
        kernel_rate=kernel,
        library_rate=library,
        library_bandwidth=library_bandwidth,
    )


Solution = tuple[float | None, float | None, float | None]


def solve(samples: Sequence[Sample], known: Mapping[str, float] | None = None) -> Solution:
    """(launch, bandwidth, rate) that fit best beside what is `known`; None for one that the times do not show."""
    times = torch.tensor([s.seconds for s in samples], dtype=torch.float64)
    columns = {
        "launch": torch.ones(len(samples), dtype=torch.float64),
        "bandwidth": torch.tensor([s.bytes for s in samples], dtype=torch.float64),
        "rate": torch.tensor([s.operations for s in samples], dtype=torch.float64),
    }
    costs = {name: value if name == "launch" else 1 / value for name, value in (known or {}).items()}
    explained = sum((columns[name] * each for name, each in costs.items()), torch.zeros_like(times))
    open_ = [name for name in columns if name not in costs]
    matrix = torch.stack([columns[name] for name in open_], 1) / times[:, None]
    scales = matrix.norm(dim=0)
    found = _not_negative(matrix / scales, (times - explained) / times) / scales
    costs |= dict(zip(open_, found.tolist(), strict=True))
    launch, byte, operation = (costs[name] for name in columns)
    return launch or None, 1 / byte if byte else None, 1 / operation if operation else None


def _not_negative(matrix: torch.Tensor, wanted: torch.Tensor, sweeps: int = 4000) -> torch.Tensor:
    """The x ≥ 0 that minimises ‖matrix x − wanted‖, by coordinate descent; columns have length 1."""
    gram, target = (matrix.T @ matrix).tolist(), (matrix.T @ wanted).tolist()
    x = [0.0] * len(target)
    for _ in range(sweeps):
        for i, row in enumerate(gram):
            x[i] = max(0.0, x[i] + target[i] - sum(g * v for g, v in zip(row, x, strict=True)))
    return torch.tensor(x, dtype=matrix.dtype)


def _constants(*found: Device) -> list[tuple[str, float, list[float]]]:
    """Name with unit, the unit, and each device's value."""
    rows = [
        ("bandwidth, GB/s", 1e9, [d.bandwidth for d in found]),
        ("launch, µs", 1e-6, [d.launch for d in found]),
        ("library's launch, µs", 1e-6, [d.library_launch for d in found]),
    ]
    for dtype in ("f32", "bf16"):
        rows += [
            (f"kernels in {dtype}, GFLOP/s", 1e9, [d.kernel_rate[dtype] for d in found]),
            (f"library in {dtype}, GFLOP/s", 1e9, [d.library_rate[dtype] for d in found]),
            (f"library's streaming in {dtype}, GB/s", 1e9, [d.library_bandwidth[dtype] for d in found]),
        ]
    return rows
