"""What one decoded token costs, and who owns it: guards, Dynamo's bytecode, Inductor's part, our projections.

    python -m benchmarks.breakdown --markdown benchmarks/results/breakdown.md

One compiled decode step of SmolLM2, bare and with adapters, is taken apart by leaving parts out: a whole step that
fetches its parameters (``bind`` is off), so that guards can be told from bytecode; with Dynamo's guards skipped; the
compiled graph called with the arguments that it was given before, which leaves out the bytecode that fetches them; and
our ops alone, called in turn from C++ with their own arguments. What lies between the last two is Inductor's wrapper
with attention, norms and everything else that is not ours. Beside these stands the step as users call it, which binds
its parameters and goes to a replay directly.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common, limits
from benchmarks.common import PAST, Setup
from gawscompile.backend import gaws
from gawscompile.calibration import measure
from gawscompile.demo.decoding import Decoder

AS_COMPILED = "as compiled"
PARTS = ("guards", "Dynamo's bytecode", "Inductor: wrapper, attention, norms", "our projections")


class Spy:
    """A backend: ours, and what the compiled graph was last called with."""

    def __init__(self, watch: bool) -> None:
        self.options = {"watch": watch, "bind": False}
        self.call: Callable[..., Any] | None = None
        self.arguments: tuple[Any, ...] = ()

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = gaws(gm, example_inputs, options=self.options)

        def run(*arguments: Any) -> Any:
            self.call, self.arguments = compiled, arguments
            return compiled(*arguments)

        return run

    def again(self) -> Any:
        """The compiled graph alone."""
        assert self.call is not None
        return self.call(*self.arguments)


class Projections(TorchDispatchMode):
    """Notes every call of our op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gaws.project.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def variants(model: Any, watch: bool) -> tuple[dict[str, Callable[[], float]], int]:
    """Timed steps by name, each with less in it than the one before, then the one as users call it; and the number of
    our calls."""
    spy = Spy(watch)
    decoder = decoding(model, torch.compile(model, backend=spy, dynamic=False))
    users = decoding(model, torch.compile(model, backend="gaws", dynamic=False, options={"watch": watch}))
    ours = Projections()
    with torch.no_grad(), ours:
        spy.again()

    @torch.no_grad()
    def timed(action: Callable[[], object]) -> float:
        decoder.seek()
        return measure.timed(action)

    def unguarded() -> float:
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
            return decoder.timed_step()

    return {
        "step": decoder.timed_step,
        "without guards": unguarded,
        "graph alone": functools.partial(timed, spy.again),
        "projections alone": functools.partial(timed, common.without_python(ours.calls)),
        AS_COMPILED: users.timed_step,
    }, len(ours.calls)


def decoding(model: Any, run: Any) -> Decoder:
    """What decodes by `run`, after some steps: the third may go to a replay directly."""
    decoder = Decoder(model, run, 2 * PAST)
    decoder.fill(common._ids(model, PAST)[0].tolist())
    for _ in range(4):
        decoder.timed_step()
    return decoder


def parts(medians: dict[str, float]) -> list[float]:
    """The differences, in the order of `PARTS`; they add up to the step."""
    step, unguarded, graph, projections = medians.values()
    return [step - unguarded, unguarded - graph, graph - projections, projections]


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--adapters", nargs="+", default=["lora"], choices=(*common.ADAPTERS, common.DORA))
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA, whose size the others take (default 16)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    facts, machine = measure.machine(), limits.machine()
    rows = []
    for dtype in given.dtype:
        setup = Setup(given.model, dtype, given.rank)
        base = common.load_base(setup)
        models = {"base": base} | {kind: common.with_adapter(base, setup, kind) for kind in given.adapters}
        kinds = [(kind, watch) for kind in models for watch in (False, True)]
        found = {(kind, watch): variants(models[kind], watch) for kind, watch in kinds}
        flat = {f"{kind} {watch} {name}": step for (kind, watch), (v, _) in found.items() for name, step in v.items()}
        samples, _ = measure.interleave(flat, given.rounds, given.steps)
        for (kind, watch), (steps, calls) in found.items():
            medians = {name: measure.Timing.of(samples[f"{kind} {watch} {name}"]).median for name in steps}
            floor = next(iter(limits.work(setup, kind).values())).floor(machine)
            users = medians.pop(AS_COMPILED)
            numbers = [medians["step"], *parts(medians), floor, users, users / medians["projections alone"]]
            name = f"{dtype}, {kind}" + ", watch=False" * (not watch)
            rows.append([name, *(f"{number:.2f}" for number in numbers), str(calls)])
        torch.compiler.reset()
    heads = ["", "step ms", *PARTS, "floor of the bytes", f"{AS_COMPILED} ms", "× our projections", "our calls"]
    told = f"Limits: {machine.bandwidth / 1e9:.1f} GB/s. Medians in ms; parts are differences of them, and add up."

    def report(markdown: bool) -> str:
        return "\n\n".join([measure.describe(facts), told, measure.table(heads, rows, markdown)])

    common.publish("What a token costs", "breakdown", argv, given.markdown, report)


if __name__ == "__main__":
    main()
