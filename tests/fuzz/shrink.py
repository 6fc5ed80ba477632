"""Shrinks a failing case: whatever can go without the failure going goes, until nothing can."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.programs import NAMES, Input, Program, Step

SECONDS = 20.0
"""A shrink takes at most so long, and gives what it has by then."""


def shrink(
    program: Program, config: Any, outcome: Any, check: Callable[[Program, Any], Any], seconds: float = SECONDS
) -> tuple[Program, Any, Any]:
    """The smallest (program, config, outcome) that fails as `outcome` does, found greedily."""
    ends = time.monotonic() + seconds
    found = True
    while found and time.monotonic() < ends:
        found = False
        for smaller, plainer in _candidates(program, config):
            if time.monotonic() > ends:
                break
            again = _try(smaller, plainer, check)
            if again is not None and _alike(again, outcome):
                program, config, outcome, found = smaller, plainer, again, True
                break
    return program, config, outcome


def _try(program: Program, config: Any, check: Callable[[Program, Any], Any]) -> Any:
    try:
        return check(program, config)
    except Exception:  # torch refuses what is left of the program
        return None


def _alike(one: Any, other: Any) -> bool:
    """Whether two failures are of a kind: another one is another case."""
    alike = one.kind == other.kind and _stem(one.message) == _stem(other.message)
    return bool(alike)


def _stem(message: str) -> str:
    return message.partition(":")[0].partition("[")[0]


def _candidates(program: Program, config: Any) -> Iterator[tuple[Program, Any]]:
    """Simpler cases, the simplest first."""
    for smaller in _programs(program):
        fitting = tuple(name for name in config.symbolic if name in smaller.sizes)
        yield smaller, replace(config, symbolic=fitting)
    plain = type(config)(seed=config.seed)
    for name, value in vars(plain).items():
        if getattr(config, name) != value:
            yield program, replace(config, **{name: value})


def _programs(program: Program) -> Iterator[Program]:
    for i in range(len(program.outputs)):
        if len(program.outputs) > 1:
            yield replace(program, outputs=(*program.outputs[:i], *program.outputs[i + 1 :])).living()
    for i, step in reversed(list(enumerate(program.steps))):  # end before a step
        for read in step.reads:
            if step.name in program.outputs:
                yield replace(program, outputs=tuple(read if o == step.name else o for o in program.outputs)).living()
    for i, step in enumerate(program.steps):  # go around a step
        steps = program.steps[:i], program.steps[i + 1 :]
        for read in [read for read in step.reads if not read.startswith("p")]:
            rest = tuple(Step(later.name, _renamed(later.text, step.name, read)) for later in steps[1])
            outputs = tuple(read if o == step.name else o for o in program.outputs)
            yield replace(program, steps=(*steps[0], *rest), outputs=outputs).living()
        if step.writes:
            yield replace(program, steps=(*steps[0], *steps[1])).living()
    for name, size in program.sizes.items():
        for smaller in (1, 2, 4, 8, size // 2):
            if 0 < smaller < size:
                yield replace(program, sizes=program.sizes | {name: smaller})
    for i, one in enumerate(program.inputs):
        for plainer in (replace(one, layout="t"), replace(one, shape=one.shape[1:])):
            if plainer != one and plainer.shape:
                yield _with_input(program, i, plainer)


def _renamed(text: str, old: str, new: str) -> str:
    return NAMES.sub(lambda found: new if found[0] == old else found[0], text)


def _with_input(program: Program, at: int, one: Input) -> Program:
    return replace(program, inputs=(*program.inputs[:at], one, *program.inputs[at + 1 :]))
