"""Mode products in the C++ emitter: where each step's numbers lie in scratch, and the code of a step.

A Kronecker term is a chain of `Step`s between barriers and an `Ending` that the row's epilogue adds.
"""

from __future__ import annotations

from dataclasses import dataclass

from gawscompile.ir.operators import Kronecker, Mode, as_number
from gawscompile.ir.spec import KernelSpec

FEW_SLICES = 4  # fewer do not share loads of G well enough to pay for a stage of their own


@dataclass(frozen=True)
class Source:
    """Where a mode product finds its input, as C++: token t's begins at ``pointer + t * stride``."""

    pointer: str
    stride: str


@dataclass(frozen=True)
class Step:
    """A mode product into scratch (only scaled where `mode` is None)."""

    mode: Mode | None
    factor: str
    source: Source
    offset: int
    width: int
    scale: str


@dataclass(frozen=True)
class Ending:
    """How a Kronecker term reaches its rows: a dot with G's row (`mode`), or what lies in scratch already (None)."""

    mode: Mode | None
    factor: str
    source: Source


class Scratch:
    """Where each term keeps u = s A x or its mode products: a token's row holds all, each from a vector's boundary on.

    `phases[k]`: the steps that may run once all of the phases before k are done.
    """

    PAD = 16

    def __init__(self, spec: KernelSpec) -> None:
        self.width = 0
        self.offsets = {
            (i, j): self._take(term.rank) for i, p in enumerate(spec.projections) for j, term in enumerate(p.lowrank)
        }
        self.phases: list[list[Step]] = []
        self.endings: dict[int, list[Ending]] = {}
        for i, p in enumerate(spec.projections):
            self.endings[i] = [self._chain(i, j, term) for j, term in enumerate(p.kronecker)]

    def _take(self, count: int) -> int:
        offset = self.width
        self.width += -(-count // self.PAD) * self.PAD
        return offset

    def _chain(self, i: int, j: int, term: Kronecker) -> Ending:
        factors = [f"g{i}_{j}_{at}" for at in range(len(term.modes))]
        scale = f"float(*kron_scale{i}_{j})" if as_number(term.scale) is None else f"{term.scale!r}f"
        final = term.modes[-1]
        joins = final.rows is not None and final.after == final.blocks == 1 and final.before < FEW_SLICES
        last = final if joins else None
        steps: list[Mode | None] = list(term.modes[:-1] if last else term.modes)
        if last and not steps and term.scale != 1.0:
            steps = [None]
        source, width = Source("x", "K"), term.modes[0].inputs
        for at, mode in enumerate(steps):
            width = mode.outputs if mode else width
            step = Step(mode, factors[at] if mode else "", source, self._take(width), width, scale)
            while len(self.phases) <= at:
                self.phases.append([])
            self.phases[at].append(step)
            source, scale = Source(f"u + {step.offset}", "LDU"), "1.0f"
        return Ending(last, factors[-1], source)


def work(step: Step) -> tuple[str, str]:
    """(pieces of a step per tile of tokens, cost of each)."""
    mode = step.mode
    if mode is None or mode.rows is None:
        return f"blocks({step.width}, CHUNK)", "CHUNK"
    each = f"{mode.blocks} * " if mode.blocks > 1 else ""
    return f"{each}blocks({mode.rows}, ROWS)", str(mode.before * mode.columns * mode.after)


def step_code(step: Step, share: str) -> str:
    mode, source, to = step.mode, step.source, f"u + {step.offset}"
    if mode is None or mode.rows is None:
        sizes, factor = (f"{mode.columns}, {mode.after}", step.factor) if mode else ("1, 1", "(const float*)nullptr")
        call = f"diagonal<{sizes}, LDU, {source.stride}>({share}, m, {step.width}, {to}, {factor}"
    elif mode.blocks > 1:  # each a product of its own
        call = f"mode_product<1, {mode.rows}, {mode.columns}, 1, LDU, {source.stride}>({share}, m"
        own = f"{to} + b * {mode.rows}, {step.factor} + b * {mode.rows * mode.columns}"
        each = f"    for (int64_t b = 0; b < {mode.blocks}; ++b)"
        return f"{each} {call}, {own}, {source.pointer} + b * {mode.columns}, {step.scale});"
    else:
        sizes = f"{mode.before}, {mode.rows}, {mode.columns}, {mode.after}"
        call = f"mode_product<{sizes}, LDU, {source.stride}>({share}, m, {to}, {step.factor}"
    return f"    {call}, {source.pointer}, {step.scale});"
