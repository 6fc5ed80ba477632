"""Random kernel specs: every kind of term, alone and together, at sizes around a vector's width and at odd ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from gawscompile.ir.operators import Mode, as_number
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import TensorType

FLOATS = ("f32", "bf16", "f16")
AROUND = (15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 96, 100, 127, 128, 129)
"""Sizes at which a vector of 8 or 16 numbers, or a step of two, ends."""
LONG = (255, 256, 257, 300, 307, 512, 1024, 1030)
"""Rows that are streamed one after the other where there is one token."""
RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70)
@dataclass(frozen=True)
class Words:
    """Those of a projection. Without a `weight`, the base is opaque, and what it made is of the dtype `residual`."""

    n: int
    weight: str | None
    transposed: bool
    out: str
    bias: str | None
    residual: str | None
    rowscale: str | None
    terms: tuple[str, ...]

    def __str__(self) -> str:
        base = f"{'wt' if self.transposed else 'w'}={self.weight}" if self.weight else f"opaque={self.residual}"
        vectors = {"bias": self.bias, "residual": self.weight and self.residual, "rowscale": self.rowscale}
        words = [f"{name}={dtype}" for name, dtype in vectors.items() if dtype]
        return " ".join([f"n={self.n}", base, f"out={self.out}", *words, *self.terms])


TERMS = 5
"""Of a group at most: each is code of its own, which takes g++ about half a second."""


def random_spec(random: Random, triton: bool = False) -> KernelSpec:
    """A group that the C++ emitter takes, or, for `triton`, a smaller one that the Triton emitter takes."""
    uniform = random.random() < 0.7
    x = random.choice(FLOATS)
    kronecker, lowrank = random.random() < 0.4, random.random() < 0.8
    swiglu = random.random() < 0.2
    k = _size(random, kronecker, LONG if random.random() < 0.2 and not triton else ())
    count = 2 if swiglu else random.choice((1, 1, 2, 2, 3, 4))
    n, out = _size(random, kronecker), x if uniform else random.choice(FLOATS)
    budget = random.randint(1, TERMS)
    projections = []
    for _ in range(count):
        if not swiglu:
            n, out = _size(random, kronecker), x if uniform else random.choice(FLOATS)
        p, budget = _projection(random, k, n, x if uniform else None, out, (lowrank, kronecker), budget, triton)
        if swiglu:
            turned = p.transposed and triton
            p = dataclasses.replace(p, weight=p.weight or x, residual=None, transposed=turned)
        projections.append(p)
    if count > 1 and random.random() < 0.3:  # siblings alike, as q, k and v are
        projections = [projections[0]] * count
    return KernelSpec.parse("; ".join([f"k={k} x={x}{' swiglu' * swiglu}", *map(str, projections)]))


def _size(random: Random, composite: bool, more: Sequence[int] = ()) -> int:
    if composite and random.random() < 0.8:
        return random.choice((1, 2, 3, 5, 7)) * random.choice((4, 6, 8, 12, 16, 24))
    if more:
        return random.choice(more)
    return random.choice((random.randint(1, 9), random.randint(1, 140), random.choice(AROUND)))


def _projection(
    random: Random,
    k: int,
    n: int,
    uniform: str | None,
    out: str,
    kinds: tuple[bool, bool],
    budget: int,
    triton: bool,
) -> tuple[Words, int]:
    """A projection and what is left of `budget`. `uniform`: the base's dtype, if there is one for the whole group;
    `kinds`: whether the group may have low-rank and Kronecker terms."""

    def some(chance: float, most: int) -> int:
        nonlocal budget
        count = min(budget, random.choice((1, 1, *range(1, most + 1)))) if random.random() < chance else 0
        budget -= count
        return count

    def dtype() -> str:
        return uniform if uniform and random.random() < 0.6 else random.choice(FLOATS)

    def maybe(chance: float) -> str | None:
        return dtype() if random.random() < chance else None

    lowrank = [f"lora(r={random.choice(RANKS)} {dtype()} s={_scale(random)})" for _ in range(some(0.8 * kinds[0], 3))]
    given = [f"given(r={random.choice(RANKS)} {dtype()} z={dtype()})" for _ in range(some(0.2, 2))]
    chains = [
        f"kron({_chain(random, k, n, triton)} {dtype()} s={_scale(random)})" for _ in range(some(0.8 * kinds[1], 2))
    ]
    opaque = bool(lowrank or given or chains) and not triton and random.random() < 0.15
    spec = Words(
        n=n,
        weight=None if opaque else uniform or random.choice(FLOATS),
        out=out,
        bias=maybe(0.35),
        residual=dtype() if opaque else maybe(0.25),
        transposed=not opaque and random.random() < 0.2,
        rowscale=None if opaque else maybe(0.15),
        terms=(*lowrank, *given, *chains),
    )
    return spec, budget


def _scale(random: Random) -> str:
    """A term's scale."""
    numbers = (1.0, 2.0, 0.5, -1.0, random.uniform(-4, 4))
    return random.choice([*map(repr, numbers), "tensor.f32", "tensor.f64"])


def _chain(random: Random, k: int, n: int, triton: bool) -> str:
    """Mode products that make `n` features of `k`; for `triton` the last is a matrix."""
    modes: list[Mode] = []
    size = k
    for _ in range(random.choice((0, 0, 0, 1, 1, 2, 3))):
        before, columns, after = _factorised(random, size)
        diagonal = random.random() < 0.3
        rows = None if diagonal else random.randint(1, max(1, min(24, 256 // (before * after))))
        distinct = rows is not None and after == 1 < before and columns % 2 == 0
        modes.append(_blocks(before, rows, columns) if rows and distinct else _mode(before, rows, columns, after))
        size = modes[-1].outputs
    if not triton and size == n and random.random() < 0.2:
        before, columns, after = _factorised(random, size)
        modes.append(_mode(before, None, columns, after))
    else:
        before, _, after = _factorised(random, math.gcd(size, n))
        if random.random() < 0.5:
            before, after = (before * after, 1) if random.random() < 0.7 else (1, before * after)
        shared = before * after
        distinct = after == 1 < before and (before + shared) % 3 == 0
        rows, columns = n // shared, size // shared
        modes.append(_blocks(before, rows, columns) if distinct else _mode(before, rows, columns, after))
    return " ".join(mode.text() for mode in modes)


def _mode(before: int, rows: int | None, columns: int, after: int) -> Mode:
    return Mode(before, TensorType((rows, columns) if rows else (columns,), "f32"), after)


def _blocks(blocks: int, rows: int, columns: int) -> Mode:
    return Mode(1, TensorType((blocks, rows, columns), "f32"), 1)


def _factorised(random: Random, size: int) -> tuple[int, int, int]:
    """Three numbers whose product is `size`."""
    before = random.choice(_divisors(size))
    after = random.choice(_divisors(size // before))
    return before, size // before // after, after


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def _modes(spec: KernelSpec) -> list[Mode]:
    return [mode for p in spec.projections for term in p.kronecker for mode in term.modes]


def _fp64_scale(spec: KernelSpec) -> bool:
    terms = [term for p in spec.projections for term in (*p.lowrank, *p.kronecker)]
    return any(as_number(term.scale) is None and term.scale.dtype == "f64" for term in terms)


def _mixed(spec: KernelSpec) -> bool:
    weights = (p.weight.dtype for p in spec.projections if p.dense)
    return len({spec.x, *weights, *(p.out for p in spec.projections)}) > 1


FEATURES: dict[str, Callable[[KernelSpec], bool]] = {
    "swiglu": lambda spec: spec.swiglu,
    "siblings": lambda spec: len(spec.projections) > 1,
    "siblings alike": lambda spec: len(spec.projections) > 1 and len({p.text() for p in spec.projections}) == 1,
    "several terms": lambda spec: any(len((*p.lowrank, *p.given, *p.kronecker)) > 1 for p in spec.projections),
    "opaque base": lambda spec: any(p.dense is None for p in spec.projections),
    "no adapter": lambda spec: any(not p.adapted for p in spec.projections),
    "transposed": lambda spec: any(p.transposed for p in spec.projections),
    "mixed dtypes": _mixed,
    "fp64 scale": _fp64_scale,
    "I ⊗ G": lambda spec: any(mode.rows and mode.after == 1 and mode.before > 1 for mode in _modes(spec)),
    "G ⊗ I": lambda spec: any(mode.rows and mode.after > 1 for mode in _modes(spec)),
    "narrow slices": lambda spec: any(mode.rows and 1 < mode.after < 16 for mode in _modes(spec)),
    "wide slices": lambda spec: any(mode.rows and mode.after >= 32 for mode in _modes(spec)),
    "distinct blocks": lambda spec: any(mode.blocks > 1 for mode in _modes(spec)),
    "diagonal": lambda spec: any(mode.rows is None for mode in _modes(spec)),
    "chain": lambda spec: any(len(term.modes) > 1 for p in spec.projections for term in p.kronecker),
    "long rows": lambda spec: spec.k > max(AROUND),
    "one feature": lambda spec: min(spec.k, *(p.n for p in spec.projections)) == 1,
}
"""What a spec may have beside its operands, by name."""
