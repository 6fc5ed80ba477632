"""What the watch asks before a call: whether anything changed in the model since its guards last held.

    python -m benchmarks.watch --markdown benchmarks/results/watch.md

One compiled decode step of SmolLM2 with adapters. The check is timed apart, in a loop: the metadata of parameters
alone, then all of it. It is timed within steps too, which leave nothing of what it reads in a cache. Beside these is
what Dynamo's own guards take, with ``watch=False`` and as compiled, by torch's profiler
(`gawscompile.calibration.split`). Last, whole steps in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import common
from benchmarks.common import PAST, Setup
from gawscompile.calibration import measure, split
from gawscompile.demo.decoding import Decoder
from gawscompile.watch.found import Found
from gawscompile.watch.unchanged import State, Unchanged

APART, STEPS = 200, 60
ROUNDS, ROUND = 12, 6  # of steps in turns


def decoder(model: Any, watch: bool) -> Decoder:
    """A compiled step of `model` after `PAST` tokens."""
    made = Decoder(model, measure.compiled(model, "gaws", dynamic=False, options={"watch": watch}), 2 * PAST)
    made.fill(common._ids(model, PAST)[0].tolist())
    for _ in range(2):
        made.timed_step()
    return made


def row(base: Any, setup: Setup, kind: str) -> tuple[list[str], Decoder]:
    """Microseconds and what is compared, of one kind of adapter; and its decoder with a watch."""
    model = common.with_adapter(base, setup, kind)
    plain = decoder(model, watch=False)
    states: list[tuple[State, Found]] = []
    made, call, spent = State.__init__, Unchanged.__call__, []

    def noted(self: State, variables: list[Any], found: Any) -> None:
        made(self, variables, found)
        states.append((self, found))

    def timed(self: Unchanged, scope: Any) -> bool:
        start = time.perf_counter()
        answer = call(self, scope)
        spent.append(time.perf_counter() - start)
        return answer

    with mock.patch.object(State, "__init__", noted), mock.patch.object(Unchanged, "__call__", timed):
        watched = decoder(model, watch=True)
        spent.clear()
        for _ in range(STEPS):
            watched.timed_step()
    state, found = states[-1]
    variables = [variable() for variable in state.variables]
    metadata = Found()
    metadata.tensors = found.tensors
    checks = (State(variables, metadata), state)
    numbers = [*(apart(check, variables) for check in checks), statistics.median(spent)]
    numbers += [split.seconds(one.timed_step)["guards"] for one in (plain, watched)]
    sizes = (found.words, found.tensors, found.lists)
    return [kind, *(f"{number * 1e6:.1f}" for number in numbers), *(str(len(size)) for size in sizes)], watched


def apart(state: State, variables: list[Any]) -> float:
    """Seconds of a check, in a loop: the median of nine loops."""
    loops = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(APART):
            assert state.same(variables)
        loops.append((time.perf_counter() - start) / APART)
    return statistics.median(loops)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--adapters", nargs="+", default=["lora", "dora"])
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)
    setup = Setup("smollm2", "float32", 16)
    base = common.load_base(setup)
    heads = ["", "metadata µs", "all µs", "in a step µs", "guards µs, watch=False", "guards µs"]
    heads += ["words", "tensors", "lists", "step ms", "over the first"]
    with torch.no_grad():
        found = [row(base, setup, kind) for kind in given.adapters]
        turns = {cells[0]: one.timed_step for cells, one in found}
        samples, _ = measure.interleave(turns, ROUNDS, ROUND)
    steps = [statistics.median(samples[kind]) for kind in given.adapters]
    rows = [[*cells, f"{ms:.2f}", f"{ms / steps[0]:.3f}"] for (cells, _), ms in zip(found, steps, strict=True)]
    facts = measure.describe(measure.machine())

    def report(markdown: bool) -> str:
        return f"{facts}\n\n{measure.table(heads, rows, markdown)}\n"

    argv = sys.argv[1:] if arguments is None else arguments
    common.publish("What is asked before a call", "watch", argv, given.markdown, report)


if __name__ == "__main__":
    main()
