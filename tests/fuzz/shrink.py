"""Shrinks a failing case: whatever can go without the failure going goes, until nothing can."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tests.fuzz.programs import NAMES, Program, Step

SECONDS = 20.0
"""Of a processor, that a shrink takes at most; it gives what it has by then."""

Case = tuple[Program, Any]
"""A program, and a dataclass that says how it is compiled, whose defaults are the plain way."""


def shrink(
    program: Program, config: Any, outcome: Any, check: Callable[[Program, Any], Any]
) -> tuple[Program, Any, Any]:
    """The smallest (program, config, outcome) that fails as `outcome` does, found greedily."""
    ends = time.process_time() + SECONDS
    moved = True
    while moved and time.process_time() < ends:
        moved = False
        for kind in (_plainer, _without_writes, _fewer_outputs, _shorter, _around, _smaller, _simpler_inputs):
            cases, at = list(kind(program, config)), 0
            while at < len(cases) and time.process_time() < ends:
                again = _try(cases[at], check)
                if again is not None and _alike(again, outcome):
                    (program, config), outcome, moved = cases[at], again, True
                    cases = list(kind(program, config))  # and on from here
                else:
                    at += 1
    return program, config, outcome


def _try(case: Case, check: Callable[[Program, Any], Any]) -> Any:
    program, config = case
    fitting = tuple(name for name in config.symbolic if name in program.sizes)
    try:
        return check(program, replace(config, symbolic=fitting))
    except Exception:  # torch refuses what is left of the program
        return None


def _alike(one: Any, other: Any) -> bool:
    """Whether two failures are of a kind: another one is another case."""
    alike = one.kind == other.kind and _stem(one.message) == _stem(other.message)
    return bool(alike)


def _stem(message: str) -> str:
    return message.partition(":")[0].partition("[")[0]


# ---- simpler cases ----------------------------------------------------------------------------------------


def _plainer(program: Program, config: Any) -> Iterator[Case]:
    plain = type(config)(seed=config.seed)
    if config != plain:
        yield program, plain
    for name, value in vars(plain).items():
        if getattr(config, name) != value:
            yield program, replace(config, **{name: value})


def _without_writes(program: Program, config: Any) -> Iterator[Case]:
    read = {name for step in program.steps for name in step.reads} | set(program.outputs)
    idle = [step for step in program.steps if step.writes and step.name not in read]
    for gone in (idle, *([step] for step in idle)):
        if gone:
            yield replace(program, steps=tuple(step for step in program.steps if step not in gone)).living(), config


def _fewer_outputs(program: Program, config: Any) -> Iterator[Case]:
    for i in range(len(program.outputs)):
        if len(program.outputs) > 1:
            yield replace(program, outputs=(*program.outputs[:i], *program.outputs[i + 1 :])).living(), config


def _shorter(program: Program, config: Any) -> Iterator[Case]:
    """What an output is made of in its place."""
    for step in reversed(program.steps):
        for read in step.reads if step.name in program.outputs else ():
            outputs = tuple(read if name == step.name else name for name in program.outputs)
            yield replace(program, outputs=outputs).living(), config


def _around(program: Program, config: Any) -> Iterator[Case]:
    """Without a step: its readers read what it reads."""
    for i, step in enumerate(program.steps):
        for read in step.reads:
            rest = [Step(later.name, _renamed(later.text, step.name, read)) for later in program.steps[i + 1 :]]
            outputs = tuple(read if name == step.name else name for name in program.outputs)
            if not read.startswith("p"):
                yield replace(program, steps=(*program.steps[:i], *rest), outputs=outputs).living(), config


def _renamed(text: str, old: str, new: str) -> str:
    return NAMES.sub(lambda found: new if found[0] == old else found[0], text)


def _smaller(program: Program, config: Any) -> Iterator[Case]:
    for name, size in program.sizes.items():
        for smaller in (1, 2, 4, 8, size // 2):
            if 0 < smaller < size:
                yield replace(program, sizes=program.sizes | {name: smaller}), config


def _simpler_inputs(program: Program, config: Any) -> Iterator[Case]:
    for i, one in enumerate(program.inputs):
        for simpler in (replace(one, layout="t"), replace(one, shape=one.shape[1:])):
            if simpler != one and simpler.shape:
                inputs = (*program.inputs[:i], simpler, *program.inputs[i + 1 :])
                yield replace(program, inputs=inputs).living(), config
