"""The algebra: linear operators on one activation, and their sums.

Every operator is written down once. Its leaves may be fx nodes, tensors or `TensorType`s:

- nodes, in the arguments of `operator_sum`, `operator_group` and `project`: between passes the graph *is* the algebra;
- tensors, when such a graph runs: `apply` is the segment-by-segment computation that frameworks execute;
- types, in a `KernelSpec`: what an emitter prints a kernel from.

The order of a class's fields, in the order of `ORDER`, is the order of a kernel's operands. A field's `Place` says what
the operand is to a kernel. To add an operator: a class here and its place in `ORDER` (and `REPEATED`, if it is an
adapter that a sum may have several of), its parser in `ir.parsing`, and its part of ``Sum.apply``.

Shapes: x ``[..., k]``; a base weight ``[n, k]`` or its transpose; LoRA's A ``[r, k]`` and B ``[n, r]``; vectors
``[n]``; Kronecker factors as `Mode` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast, get_type_hints

import torch
import torch.nn.functional as F

from gawscompile.ir import banked, packed
from gawscompile.ir.types import DTYPES, SpecError, dtype_of, shape_of, type_of

Leaf = Any
"""A node, a tensor or a `TensorType`."""


@dataclass(frozen=True)
class Place:
    """What an operand is to a kernel: its role, the stem of its name in code, what kind of tensor it is, and the stage
    that reads it: the ``base`` product, ``shrink`` (u = A x), each of the ``rows`` of y, or a ``chain`` of modes. The
    sizes of a ``table`` may change from call to call; what is ``flat`` may have any shape of as many numbers."""

    role: str
    stem: str
    kind: Literal["matrix", "vector", "activation", "number", "table", "flat"]
    stage: Literal["base", "shrink", "rows", "chain"]


class Dense(NamedTuple):
    """``W x``, W ``[n, k]``, or kept as ``[k, n]`` where it is `transposed` (GPT-2's Conv1D)."""

    weight: Annotated[Leaf, Place("weight", "w", "matrix", "base")]
    transposed: bool = False

    @property
    def sizes(self) -> tuple[Any, ...]:
        """``(n, k)``."""
        sizes = shape_of(self.weight)
        return sizes[::-1] if self.transposed else sizes

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight.T if self.transposed else self.weight, bias)

    def features(self, k: Any) -> Any:
        n, columns = self.sizes
        return n if columns == k else _misfit(self, k)

    def multiplications(self, k: int) -> int:
        return int(self.sizes[0]) * k

    def describe(self) -> str:
        return "Dense[{}x{}]".format(*self.sizes)

    def formula(self, at: str) -> str:
        return f"W{at}' x" if self.transposed else f"W{at} x"

    def text(self) -> str:
        return f"{'wt' if self.transposed else 'w'}={dtype_of(self.weight)}"


class Packed(NamedTuple):
    """``W x``, W ``[n, k]``, kept as codes of 8 or 4 bits (`ir.packed`). Its columns share a scale by `group`, all of a
    row's where that is k; scales are times `factor`. Without `scales`, W is the codes' levels."""

    codes: Annotated[Leaf, Place("weight", "w", "flat", "base")]
    n: int
    k: int
    coding: str
    group: int
    table: Annotated[Leaf | None, Place("table", "wt", "flat", "base")] = None
    scales: Annotated[Leaf | None, Place("scales", "ws", "flat", "base")] = None
    zeros: Annotated[Leaf | None, Place("zeros", "wz", "flat", "base")] = None
    levels: Annotated[Leaf | None, Place("levels", "wl", "flat", "base")] = None
    outer: Annotated[Leaf | None, Place("outer", "wo", "flat", "base")] = None
    offset: Annotated[Leaf | None, Place("offset", "wb", "flat", "base")] = None
    factor: float = 1.0

    @property
    def kept(self) -> packed.Coding:
        return packed.CODINGS[self.coding]

    @property
    def sizes(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self.n, self.k

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W ``[n, k]``."""
        w = self.kept.numbers(self.codes, self.table, self.n, self.k, dtype)
        if self.zeros is not None:
            w = w - packed.spread(self.zeros.to(dtype), self.n, self.k)
        if self.scales is not None:
            scales = packed.plain_scales(self.scales, self.levels, self.outer, self.offset, dtype)
            w = w * packed.spread(scales * self.factor, self.n, self.k, self.kept.by_groups)
        return w

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def features(self, k: Any) -> Any:
        groups = self.n * self.k // self.group
        wanted = {"codes": self.n * packed.bytes_of(self.kept.bits, self.k), "scales": groups, "zeros": groups}
        wanted |= {"table": 16, "levels": 256, "outer": -(-groups // packed.OUTER), "offset": 1}
        counts = {name: _count(getattr(self, name)) for name in wanted if getattr(self, name) is not None}
        fits = self.k == k and self.k % self.group == 0 and self.group % packed.STEP == 0
        fits = fits and self.n % {"halves": 2, "blocks": packed.BLOCK}.get(self.kept.layout, 1) == 0
        fits = fits and all(wanted[name] == count for name, count in counts.items())
        coded = [part is not None for part in (self.levels, self.outer, self.offset)]
        fits = fits and all(coded) == any(coded) == (self.scales is not None and dtype_of(self.scales) == "u8")
        fits = fits and (self.scales is not None or (self.zeros is None and self.factor == 1.0))
        if self.kept.layout == "blocks":
            fits = fits and self.scales is not None and self.zeros is None and self.factor == 1.0 and not any(coded)
        fits = fits and (self.table is not None) == (self.kept.layout == "blocks")
        return self.n if fits and dtype_of(self.codes) == self.kept.dtype else _misfit(self, k)

    def multiplications(self, k: int) -> int:
        return self.n * k

    @property
    def summed_apart(self) -> bool:
        """Whether a kernel makes sums of rows in memory before adapters join: rows that follow each other do not lie
        so."""
        return self.kept.layout == "blocks" or (self.kept.layout == "halves" and self.n % 8 == 0)

    @property
    def bytes(self) -> int:
        """Of codes, scales and zeros."""
        return sum(type_of(leaf).bytes for _, _, leaf in leaves(self))

    def describe(self) -> str:
        """``Packed[nf4/64 576x576]``: a scale for 64 columns each."""
        return f"Packed[{self.coding}{'' if self.group == self.k else f'/{self.group}'} {self.n}x{self.k}]"

    def formula(self, at: str) -> str:
        return f"W{at} x"

    def text(self) -> str:
        words = [self.coding, f"g={self.group}"]
        given = (("s", self.scales), ("z", self.zeros))
        words += [f"{name}={dtype_of(leaf)}" for name, leaf in given if leaf is not None]
        words += [f"f={self.factor!r}"] * (self.factor != 1.0)
        return f"packed({' '.join(words)})"


def _count(leaf: Leaf) -> int:
    return math.prod(shape_of(leaf))


class _Single(NamedTuple):
    """An operator of one leaf, whose last axis is y's features. Its class says which `PLACE` it has."""

    value: Leaf

    def features(self, k: Any) -> Any:
        sizes = shape_of(self.value)
        vector = cast(Any, self).PLACE.kind == "vector"
        return _misfit(cast(Any, self), k) if vector and len(sizes) != 1 else sizes[-1]

    def multiplications(self, k: int) -> int:
        return 0

    def describe(self) -> str:
        return f"{type(self).__name__}[{shape_of(self.value)[-1]}]"

    def formula(self, at: str) -> str:
        return f"{cast(Any, self).PLACE.stem}{at}"

    def text(self) -> str:
        return f"{cast(Any, self).PLACE.role}={dtype_of(self.value)}"


class Opaque(_Single):
    """``y``, ``[..., n]``: what a base that keeps its own matmul, since its weight is quantised, has made of x."""

    PLACE = Place("opaque", "base", "activation", "base")

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.value if bias is None else self.value + bias


class Bias(_Single):
    """``+ v``, v ``[n]``."""

    PLACE = Place("bias", "bias", "vector", "rows")


class Residual(_Single):
    """``+ r``, r ``[..., n]``, to what the sum has become after its cast."""

    PLACE = Place("residual", "res", "activation", "rows")


class RowScale(_Single):
    """``c ⊙`` all else in the sum but biases and residual: c ``[n]`` (DoRA: Liu et al. 2024, eq. 5; (IA)³: Liu et al.
    2022)."""

    PLACE = Place("rowscale", "rowscale", "vector", "rows")


class LowRank(NamedTuple):
    """``s * B (A x)`` (LoRA: Hu et al. 2021, eq. 3). `scale` is a number or a 0-d leaf of fp32 or fp64."""

    a: Annotated[Leaf, Place("a", "a", "matrix", "shrink")]
    b: Annotated[Leaf, Place("b", "b", "matrix", "rows")]
    scale: Annotated[Any, Place("scale", "scale", "number", "shrink")] = 1.0

    @property
    def rank(self) -> int:
        return int(shape_of(self.a)[0])

    @property
    def dtype(self) -> str:
        return dtype_of(self.a)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * self.scale

    def features(self, k: Any) -> Any:
        (rank, columns), (n, ranks) = shape_of(self.a), shape_of(self.b)
        return n if (columns, ranks, dtype_of(self.b)) == (k, rank, self.dtype) else _misfit(self, k)

    def multiplications(self, k: int) -> int:
        return self.rank * (k + int(shape_of(self.b)[0]))

    def describe(self) -> str:
        return f"{_number(self.scale, 's')}·LowRank(r={self.rank})"

    def formula(self, at: str) -> str:
        return f"{_number(self.scale, f's{at}')} B{at}[{'x'.join(map(str, shape_of(self.b)))}] (A{at} x)"

    def text(self) -> str:
        return f"lora(r={self.rank} {self.dtype} s={_scale_text(self.scale)})"


class Given(NamedTuple):
    """``C z``: z ``[..., r]`` is an activation that is there already, few features wide, C ``[n, r]`` (zFLoRA's widened
    stream: Gowda et al. 2025)."""

    c: Annotated[Leaf, Place("c", "c", "matrix", "rows")]
    z: Annotated[Leaf, Place("z", "z", "activation", "rows")]

    @property
    def rank(self) -> int:
        return int(shape_of(self.c)[1])

    @property
    def dtype(self) -> str:
        return dtype_of(self.c)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.z.to(self.c.dtype), self.c)

    def features(self, k: Any) -> Any:
        n, rank = shape_of(self.c)
        return n if shape_of(self.z)[-1] == rank else _misfit(self, k)

    def multiplications(self, k: int) -> int:
        return self.rank * int(shape_of(self.c)[0])

    def describe(self) -> str:
        return f"Given(r={self.rank})"

    def formula(self, at: str) -> str:
        return f"C{at}[{'x'.join(map(str, shape_of(self.c)))}] z{at}"

    def text(self) -> str:
        return f"given(r={self.rank} {dtype_of(self.c)} z={dtype_of(self.z)})"


class Mode(NamedTuple):
    """``(I_before ⊗ G ⊗ I_after) x``: a mode product, G applied along the middle of x's features as three axes
    (Van Loan 2000, "The ubiquitous Kronecker product"). G ``[rows, columns]``, or a vector ``[columns]``, its diagonal,
    or ``[blocks, rows, columns]``: ``blockdiag(G_1 … G_n)``, a factor of butterflies (Monarch: Dao et al. 2022) and of
    block-diagonal LoRA (BD-LoRA). That one stands alone, between identities of one.
    """

    before: int
    matrix: Annotated[Leaf, Place("mode", "g", "matrix", "chain")]
    after: int

    @property
    def rows(self) -> int | None:
        """Of a block; None for a diagonal."""
        sizes = shape_of(self.matrix)
        return int(sizes[-2]) if len(sizes) > 1 else None

    @property
    def columns(self) -> int:
        return int(shape_of(self.matrix)[-1])

    @property
    def blocks(self) -> int:
        """Distinct ones, where G is block-diagonal."""
        sizes = shape_of(self.matrix)
        return int(sizes[0]) if len(sizes) == 3 else 1

    @property
    def slices(self) -> int:
        """Of x's features, each of which meets G or a block of it."""
        return self.before * self.blocks

    @property
    def inputs(self) -> int:
        return self.slices * self.columns * self.after

    @property
    def outputs(self) -> int:
        return self.slices * (self.rows or self.columns) * self.after if self.columns else 0

    @property
    def multiplications(self) -> int:
        """For one token."""
        return self.inputs if self.rows is None else self.outputs * self.columns

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        g = self.matrix
        if g.dim() == 3:
            return torch.einsum("noi,...ni->...no", g, x.unflatten(-1, (len(g), g.shape[-1]))).flatten(-2)
        axes = x.unflatten(-1, (self.before, g.shape[-1], self.after))
        product = axes * g[:, None] if g.dim() == 1 else torch.einsum("oi,...bia->...boa", g, axes)
        return product.flatten(-3)

    def describe(self) -> str:
        """``I10⊗[256x256]``; an identity of one is left out."""
        middle = f"diag[{self.columns}]" if self.rows is None else f"[{self.rows}x{self.columns}]"
        middle = f"blockdiag({self.blocks} {middle})" if self.blocks > 1 else middle
        parts = [f"I{self.before}"] * (self.before > 1) + [middle] + [f"I{self.after}"] * (self.after > 1)
        return "⊗".join(parts)

    def text(self) -> str:
        """``10*256x256*1``, or ``1*10of256x256*1`` where there are distinct blocks."""
        middle = f"diag{self.columns}" if self.rows is None else f"{self.rows}x{self.columns}"
        middle = f"{self.blocks}of{middle}" if len(shape_of(self.matrix)) == 3 else middle
        return f"{self.before}*{middle}*{self.after}"


class Kronecker(NamedTuple):
    """``s * M_p … M_1 x``, the first mode product first.

    ``I_n ⊗ G`` (GAWS) and ``G ⊗ I_d`` (GAWS-D: Alsuradi et al. 2026) are one mode product, with a diagonal before it
    where there is `diag`; ``w1 ⊗ w2`` (LoKr: Yeh et al. 2023) is ``(I ⊗ w2)(w1 ⊗ I)``, more where those have factors.
    """

    modes: tuple[Mode, ...]
    scale: Annotated[Any, Place("kron_scale", "kron_scale", "number", "chain")] = 1.0

    @property
    def dtype(self) -> str:
        return dtype_of(self.modes[0].matrix)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.modes[0].matrix.dtype)
        for mode in self.modes:
            x = mode.apply(x)
        return x * self.scale

    def features(self, k: Any) -> Any:
        n = k
        for mode in self.modes:
            if len(shape_of(mode.matrix)) == 3 and (mode.before, mode.after) != (1, 1):
                raise SpecError(f"mode {mode.text()} of {self.text()}: distinct blocks stand alone")
            if mode.inputs != n or dtype_of(mode.matrix) != self.dtype:
                raise SpecError(f"mode {mode.text()} of {self.text()} takes {mode.inputs} features, not {n}")
            n = mode.outputs
        return n

    def multiplications(self, k: int) -> int:
        return sum(mode.multiplications for mode in self.modes)

    def describe(self) -> str:
        return f"{_number(self.scale, 's')}·Kronecker({' '.join(mode.describe() for mode in reversed(self.modes))})"

    def formula(self, at: str) -> str:
        factors = reversed(list(enumerate(self.modes)))
        chain = " ".join(f"({mode.text()} G{at}_{number})" for number, mode in factors)
        return f"{_number(self.scale, f's{at}')} {chain} x"

    def text(self) -> str:
        return f"kron({' '.join(mode.text() for mode in self.modes)} {self.dtype} s={_scale_text(self.scale)})"


class Banked(NamedTuple):
    """What a bank's adapters add: to each row of a batch ``Σ s B (A x) + v + d ⊙ (W x)`` of those that `schedule` gives
    it, on a CPU also ``s M_p … M_1 x``. Their factors lie in `pool`, `n` is the number of y's features. For a GPU,
    `width` says how many entries a row of the schedule has, each of a block of ranks. Layouts and meaning: `ir.banked`.
    """

    pool: Annotated[Leaf, Place("pool", "pool", "table", "rows")]
    schedule: Annotated[Leaf, Place("schedule", "schedule", "table", "rows")]
    n: int
    width: int | None = None

    @property
    def dtype(self) -> str:
        return dtype_of(self.pool)

    @property
    def columns(self) -> int:
        """Of u = A x, for a GPU."""
        return banked.BLOCK * (self.width or 0)

    def apply(self, x: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        made: torch.Tensor = torch.ops.gaws.banked(x, self.pool, self.schedule, base, bias)  # which can be traced
        return made

    def features(self, k: Any) -> Any:
        shapes = len(shape_of(self.pool)), len(shape_of(self.schedule))
        return self.n if shapes == (1, 3) and dtype_of(self.schedule) == "i32" else _misfit(self, k)

    def multiplications(self, k: int) -> int:
        return banked.USUAL_RANK * (k + self.n)

    def usual_bytes(self, k: int) -> int:
        """Of one adapter's factors, for the cost model."""
        return banked.usual_bytes(DTYPES[self.dtype], k, self.n)

    def describe(self) -> str:
        return "Banked"

    def formula(self, at: str) -> str:
        return f"Σ s B (A x) + d W x by schedule{at} of pool{at}"

    def text(self) -> str:
        return f"bank({self.dtype}{f' x{self.width}' if self.width else ''})"


Operator = Dense | Packed | Opaque | Bias | Residual | RowScale | LowRank | Given | Kronecker | Banked
ORDER: tuple[type, ...] = (Dense, Packed, Opaque, Bias, Residual, RowScale, LowRank, Given, Kronecker, Banked)
"""The order of a sum's terms, and so of a kernel's operands."""

REPEATED: tuple[type, ...] = (LowRank, Given, Kronecker)
"""Adapters, of which a sum may have several. It has at most one of each of the others."""


# ---- scales -----------------------------------------------------------------------------------------------


def as_number(scale: Any) -> float | None:
    """A scale that is a number; None where it is a tensor."""
    return float(scale) if isinstance(scale, (int, float)) else None


def _number(scale: Any, name: str) -> str:
    return name if as_number(scale) is None else f"{scale:g}"


def _scale_text(scale: Any) -> str:
    number = as_number(scale)
    return f"tensor.{dtype_of(scale)}" if number is None else repr(number)


def _misfit(term: Operator, k: Any) -> Any:
    raise SpecError(f"{term.describe()} does not fit {k} features: {[type_of(leaf) for _, _, leaf in leaves(term)]}")


# ---- leaves -----------------------------------------------------------------------------------------------


def _places(kind: Any) -> dict[str, Place | None]:
    """The fields of an operator; those that are leaves with their place."""
    if issubclass(kind, _Single):
        return {"value": kind.PLACE}
    hints = get_type_hints(kind, include_extras=True)
    return {name: getattr(hints[name], "__metadata__", (None,))[0] for name in kind._fields}


_PLACES = {kind: _places(kind) for kind in (*ORDER, Mode)}
ROLES = frozenset(place.role for places in _PLACES.values() for place in places.values() if place)
"""Of all operands."""


def leaves(term: Operator | Mode, at: int | None = None) -> Iterator[tuple[Place, int | None, Leaf]]:
    """The leaves of an operator in the order of its fields. A mode's have their number in the chain."""
    for name, place in _PLACES[type(term)].items():
        value = getattr(term, name)
        if name == "modes":
            for number, mode in enumerate(value):
                yield from leaves(mode, number)
        elif place is not None and value is not None and not isinstance(value, (int, float)):
            yield place, at, value


def rebuilt(term: Any, change: Callable[[Place, Leaf], Leaf]) -> Any:
    """The same operator with other leaves, which are asked for in the order of `leaves`."""
    values = []
    for name, place in _PLACES[type(term)].items():
        value = getattr(term, name)
        if name == "modes":
            value = tuple(rebuilt(mode, change) for mode in value)
        elif place is not None and value is not None and not isinstance(value, (int, float)):
            value = change(place, value)
        values.append(value)
    return type(term)(*values)
