"""How cost grows on a CPU: with rank, active adapters, tokens, width, layers; measured, and as the cost model has it.

    python -m benchmarks.growth --markdown benchmarks/results/growth.md --plot benchmarks/results/growth.png

All projections of a Llama's decoder layers, each layer with weights of its own, as the generated kernels run them: no
attention, no norms, no guards. One thing varies at a time from SmolLM2's shape with a LoRA of rank 16 and one token.
Predictions are the sum of the groups' costs in `gawscompile.planning.cost`, by the constants of this kind of machine
or, after ``gawscompile calibrate``, of this machine.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.projections import NAMES, operands
from gawscompile.calibration import measure
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning import cost, devices
from gawscompile.runtime import ops


@dataclass(frozen=True)
class Stack:
    """The projections of some decoder layers; SmolLM2's by default."""

    rank: int = 16
    adapters: int = 1
    tokens: int = 1
    width: int = 576
    layers: int = 30

    def specs(self, dtype: str) -> list[KernelSpec]:
        """The groups of one layer: q, k and v, o, gate and up with their product, down."""
        x, inner, keys = NAMES[dtype], self.width * 8 // 3, self.width // 3
        lora = f" lora(r={self.rank} f32 s=2.0)" * (self.adapters if self.rank else 0)

        def group(k: int, *widths: int, words: str = "") -> KernelSpec:
            return KernelSpec.parse("; ".join([f"k={k} x={x}{words}", *(f"n={n} w={x} out={x}{lora}" for n in widths)]))

        return [
            group(self.width, self.width, keys, keys),
            group(self.width, self.width),
            group(self.width, inner, inner, words=" swiglu"),
            group(inner, self.width),
        ]

    def predicted(self, dtype: str) -> float:
        """Milliseconds."""
        planned = [cost.plan(spec) for spec in self.specs(dtype)]
        return 1e3 * self.layers * sum(p.seconds(p.table.pick(self.tokens), self.tokens) for p in planned)

    def run(self, dtype: str) -> Callable[[], None]:
        """Every projection once, on random tensors that stay."""
        ops.ensure_loaded()
        calls = []
        for spec in self.specs(dtype):
            program = f"{cost.plan(spec).table} | {spec}"
            x = torch.randn(self.tokens, spec.k).to(DTYPES[spec.x])
            calls += [(x, operands(spec, self.tokens), program) for _ in range(self.layers)]
        return common.without_python(calls)


SWEEPS: dict[str, tuple[int, ...]] = {
    "rank": (0, 1, 4, 16, 64, 256),
    "adapters": (0, 1, 2, 3, 4),
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "width": (192, 384, 576, 1152),
    "layers": (4, 8, 16, 30),
}


@dataclass(frozen=True)
class Point:
    """One stack: medians and quartiles in ms beside the prediction."""

    sweep: str
    dtype: str
    value: int
    measured: measure.Timing
    predicted: float


def sweep(name: str, dtype: str, rounds: int, values: tuple[int, ...], start: Stack) -> list[Point]:
    """One thing varied. The stacks take turns so that a slow minute of the machine does not bend the curve."""
    stacks = {value: replace(start, **{name: value}) for value in values}
    runs = {str(value): functools.partial(measure.timed, stack.run(dtype)) for value, stack in stacks.items()}
    for run in runs.values():
        run()  # builds
    samples, _ = measure.interleave(runs, rounds, 3)
    return [
        Point(name, dtype, value, measure.Timing.of(samples[str(value)]), stack.predicted(dtype))
        for value, stack in stacks.items()
    ]


def table(points: list[Point], markdown: bool) -> str:
    """A row for each value of each sweep."""
    rows = [
        [
            f"{p.sweep} {p.value}",
            p.dtype,
            f"{p.measured.median:.2f}",
            f"{p.measured.low:.2f}-{p.measured.high:.2f}",
            f"{p.predicted:.2f}",
            f"{p.predicted / p.measured.median:.2f}",
        ]
        for p in points
    ]
    heads = ["", "dtype", "measured ms", "quartiles", "predicted ms", "predicted / measured"]
    off = statistics.geometric_mean(
        max(p.predicted / p.measured.median, p.measured.median / p.predicted) for p in points
    )
    return measure.table(heads, rows, markdown) + f"\n\nPredictions are off by a factor of {off:.2f} (geometric mean)."


def plot(points: list[Point], file: Path) -> None:
    """A panel for each sweep. Says so and draws nothing without matplotlib."""
    names = list(dict.fromkeys(p.sweep for p in points))
    if (figure := common.figure(3.4 * len(names), 3.2)) is None:
        return
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for dtype, colour in zip(NAMES, ("#2060c0", "#c06020"), strict=True):
            mine = [p for p in points if (p.sweep, p.dtype) == (name, dtype)]
            if mine:
                x = [p.value for p in mine]
                axes.plot(x, [p.predicted for p in mine], color=colour, label=f"{dtype}, predicted")
                low = [p.measured.median - p.measured.low for p in mine]
                high = [p.measured.high - p.measured.median for p in mine]
                middle = [p.measured.median for p in mine]
                axes.errorbar(x, middle, (low, high), fmt="o", color=colour, markersize=4, label="measured")
        axes.set(xlabel=name, ylim=(0, None))
        if name in ("rank", "tokens"):
            axes.set_xscale("symlog", base=2)
            axes.set_yscale("log")
            axes.set_ylim(None, None)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms, all projections")
    figure.axes[0].legend(fontsize=7)
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--layers", type=int, default=30, help="of the stacks where it is not what varies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    facts = measure.machine()
    points = [
        point
        for dtype in given.dtype
        for name in given.sweeps
        for point in sweep(name, dtype, given.rounds, SWEEPS[name], Stack(layers=given.layers))
    ]
    told = f"Cost model: {devices.cpu().name}."

    def report(markdown: bool) -> str:
        return "\n\n".join([measure.describe(facts), told, table(points, markdown)])

    common.publish("How cost grows", "growth", argv, given.markdown, report)
    if given.plot:
        plot(points, given.plot)


if __name__ == "__main__":
    main()
