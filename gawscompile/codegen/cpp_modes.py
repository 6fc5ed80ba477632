"""Mode products in the C++ emitter: where each step's numbers lie in scratch, and the code of a step.

A Kronecker term is a chain of `Step`s between barriers and an `Ending` that the row's epilogue adds.
"""

from __future__ import annotations

from dataclasses import dataclass

from gawscompile.ir.spec import KernelSpec, KroneckerSpec, ModeSpec

FEW_SLICES = 4  # fewer do not share loads of G well enough to pay for a stage of their own

_CHUNK = 64  # features of a piece of work that only scales


@dataclass(frozen=True)
class Source:
    """Where a mode product finds its input, as C++: token t's begins at ``pointer + t * stride``."""

    pointer: str
    stride: str


@dataclass(frozen=True)
class Step:
    """A mode product into scratch (only scaled where `mode` is None)."""

    mode: ModeSpec | None
    factor: str
    source: Source
    offset: int
    width: int
    scale: str


@dataclass(frozen=True)
class Ending:
    """How a Kronecker term reaches its rows: a dot with G's row (`mode`), or what lies in scratch already (None)."""

    mode: ModeSpec | None
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

    def _chain(self, i: int, j: int, term: KroneckerSpec) -> Ending:
        factors = [f"g{i}_{j}_{at}" for at in range(len(term.modes))]
        scale = f"float(*kron_scale{i}_{j})" if term.scale is None else f"{term.scale!r}f"
        final = term.modes[-1]
        last = final if final.rows is not None and final.after == 1 and final.before < FEW_SLICES else None
        steps: list[ModeSpec | None] = list(term.modes[:-1] if last else term.modes)
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


def work(step: Step) -> tuple[str, int]:
    """(pieces of a step per tile of tokens, cost of each)."""
    mode = step.mode
    if mode is None or mode.rows is None:
        return str(-(-step.width // _CHUNK)), _CHUNK
    return f"blocks({mode.rows}, ROWS)", mode.before * mode.columns * mode.after


def step_code(step: Step, share: str) -> list[str]:
    pieces, cost = work(step)
    mode, source = step.mode, step.source
    lines = [
        f"    {share}.piece({pieces} * tiles, {cost}, [&, tile = int64_t(-1)](int64_t piece) mutable {{",
        f"      const int64_t at = piece % ({pieces}), own = piece / ({pieces});",
        "      const int64_t lo = own * 4 * TOKENS, hi = min(m, lo + 4 * TOKENS);",
    ]
    if mode is None or mode.rows is None:
        sizes = f"<{mode.columns}, {mode.after}>" if mode else "<1, 1>"
        factor = step.factor or "(const float*)nullptr"
        ends = f"at * {_CHUNK}, min<int64_t>({step.width}, (at + 1) * {_CHUNK})"
        where = f"{source.pointer}, LDU, {source.stride}, {ends}"
        lines.append(f"      diagonal{sizes}(u + {step.offset}, {factor}, {where}, lo, hi, {step.scale});")
    else:
        call = f"mode<{mode.before}, {mode.rows}, {mode.columns}, {mode.after}>(u + {step.offset}, {step.factor}"
        rest = f"at, lo, hi, {step.scale});"
        straight = f"{call}, {source.pointer}, LDU, {source.stride}, {rest}"
        if mode.after == 1:
            lines.append(f"      {straight}")
        else:
            sizes = f"{mode.before}, {mode.columns}, {mode.after}"
            lines += [
                f"      if constexpr (turns<{mode.after}>) {{",
                "        static thread_local Buffer turned;",
                f"        if (tile != own) turn<{sizes}>(turned, {source.pointer}, {source.stride}, lo, hi);",
                "        tile = own;",
                f"        {call}, turned.of(0), LDU, 0, {rest}",
                "      } else {",
                f"        {straight}",
                "      }",
            ]
    return [*lines, "    });"]
