"""`KernelSpec`: everything that shapes a generated kernel, and nothing else.

A spec is a *group*: sums (`ir.sums.Sum`) over types, of the same activation ``x``, that run together,

    y_i = c_i ⊙ (base_i x + Σ adapters_i x) + bias_i + residual_i                   i = 0 … projections-1

A gate and its partner may leave the group as one output, ``y = silu(y_0) * y_1`` (SwiGLU: Shazeer 2020).

It is frozen, hashable, and prints to one line that parses back to an equal spec. That line is what travels in
the lowered graph (as an argument of the op), in caches and in reports, so a process that never ran a pass can still
rebuild the kernel.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gawscompile.ir.operators import REPEATED
from gawscompile.ir.parsing import known
from gawscompile.ir.places import Leaf, Place, leaves, rebuilt
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import ANY, SpecError, TensorType, type_of


@dataclass(frozen=True)
class Operand:
    """One tensor argument of a kernel: what it is, whose it is, and its type. `term`: its adapter's number among the
    projection's adapters of that kind; `mode`: its number in a chain."""

    place: Place
    projection: int
    term: int | None
    type: TensorType
    mode: int | None = None

    @property
    def role(self) -> str:
        return self.place.role

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def activation(self) -> bool:
        """Whether it has a row for each token."""
        return self.place.kind == "activation"

    @property
    def table(self) -> bool:
        """Whether its sizes may change from call to call."""
        return self.place.kind == "table"

    @property
    def flat(self) -> bool:
        """Whether it may have any shape of as many numbers."""
        return self.place.kind == "flat"

    @property
    def of_base(self) -> bool:
        """Whether it is a base's weight, or a part of it."""
        return self.place.stage == "base" and not self.activation

    @property
    def factor(self) -> bool:
        """Whether it is a matrix of an adapter."""
        return self.place.kind == "matrix" and self.place.stage != "base"

    @property
    def scale(self) -> bool:
        """Whether it is a number that lies in a tensor."""
        return self.place.kind == "number"

    @property
    def name(self) -> str:
        """A C and Python identifier, unique within the kernel: ``w0``, ``bias1``, ``a0_1``, ``g0_1_2`` …"""
        numbers = (str(n) for n in (self.term, self.mode) if n is not None)
        return "_".join([f"{self.place.stem}{self.projection}", *numbers])


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """A group of projections of one activation ``x`` (``[m, k]``, `dtype` x). Equal specs have equal text.

    `swiglu`: there are two projections of one width and out dtype, and one output, ``silu(y_0) * y_1``.
    Raises `SpecError` for sums that are none on `k` features.
    """

    k: int
    x: str
    projections: tuple[Sum, ...]
    swiglu: bool = False

    def __post_init__(self) -> None:
        for total in self.projections:
            total.check(self.k)
        outputs, residuals = {(p.n, p.out) for p in self.projections}, [p for p in self.projections if p.residual]
        opaque = [p for p in self.projections if p.opaque]
        if self.swiglu and (len(self.projections) != 2 or len(outputs) != 1 or residuals or opaque):
            raise SpecError(f"swiglu takes two projections of one width and dtype, without residuals: {self}")

    @staticmethod
    def of(x: Leaf, sums: Iterable[Sum], swiglu: bool = False) -> KernelSpec:
        """The spec of `sums` on `x`, whose leaves may be anything that has a type."""
        read = type_of(x)
        typed = (Sum(tuple(rebuilt(term, _typed) for term in total.terms), total.out) for total in sums)
        return KernelSpec(read.shape[-1], read.dtype, tuple(typed), swiglu)

    def bound(self, operands: Iterable[Leaf]) -> tuple[Sum, ...]:
        """The sums with `operands`, in order, in the place of their types."""
        given = iter(operands)

        def put(total: Sum) -> Sum:
            return Sum(tuple(rebuilt(term, lambda *_: next(given)) for term in total.terms), total.out)

        return tuple(map(put, self.projections))

    @functools.cached_property
    def _text(self) -> str:
        return "; ".join([f"k={self.k} x={self.x}{' swiglu' * self.swiglu}", *(p.text() for p in self.projections)])

    def __str__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelSpec) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def outputs(self) -> list[tuple[int, str]]:
        """(features, dtype) of every output."""
        return [(p.n, p.out) for p in self.projections[: 1 if self.swiglu else None]]

    @property
    def library_takes(self) -> bool:
        """Whether the vendor library can multiply the bases: activation, weight (which a packed one is first made to
        be) and product have one dtype."""
        kinds = [p.weight.dtype if p.dense else self.x for p in self.projections if p.opaque is None]
        outs = [p.out for p in self.projections if p.opaque is None]
        return all(self.x == kind == out for kind, out in zip(kinds, outs, strict=True))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> KernelSpec:
        """The spec that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        head, *rest = text.split("; ")
        match = re.fullmatch(r"k=(\d+) x=(\w+)( swiglu)?", head)
        if match is None or not rest:
            raise SpecError(f"not a kernel spec: {text[:200]!r}")
        k = int(match[1])
        return KernelSpec(k, known(match[2]), tuple(Sum.parse(part, k) for part in rest), bool(match[3]))

    def operands(self) -> Iterator[Operand]:
        """The tensor arguments after ``x``, in the order in which every op and kernel takes them."""
        for i, p in enumerate(self.projections):
            for term, name in p.numbered(i):
                number = int(name.partition("_")[2]) if isinstance(term, REPEATED) else None
                for place, at, leaf in leaves(term):
                    yield Operand(place, i, number, leaf, at)

    def formulas(self) -> list[str]:
        """The operator sum of each projection, as text for headers and reports."""
        lines = [p.formula(i) for i, p in enumerate(self.projections)]
        return [*lines, *[f"y[{self.outputs[0][0]}] = silu(y0) * y1"] * self.swiglu]


def _typed(place: Place, leaf: Leaf) -> TensorType:
    """Of a kernel's operand: what has a row for each token is a matrix there."""
    found = type_of(leaf)
    if place.kind == "flat":
        return TensorType((math.prod(found.shape),), found.dtype)
    if place.kind == "table":
        return TensorType((ANY,) * len(found.shape), found.dtype)
    return TensorType(("m", found.shape[-1]), found.dtype) if place.kind == "activation" else found
