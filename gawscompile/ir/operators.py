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

from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from gawscompile.ir import banked
from gawscompile.ir.packed import Packed
from gawscompile.ir.places import Leaf, Place, misfit, places
from gawscompile.ir.types import DTYPES, SpecError, dtype_of, shape_of


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
        return n if columns == k else misfit(self, k)

    def multiplications(self, k: int) -> int:
        return int(self.sizes[0]) * k

    def describe(self) -> str:
        return "Dense[{}x{}]".format(*self.sizes)

    def formula(self, at: str) -> str:
        return f"W{at}' x" if self.transposed else f"W{at} x"

    def text(self) -> str:
        return f"{'wt' if self.transposed else 'w'}={dtype_of(self.weight)}"


class _Single(NamedTuple):
    """An operator of one leaf, whose last axis is y's features. Its class says which `PLACE` it has."""

    value: Leaf

    def features(self, k: Any) -> Any:
        sizes = shape_of(self.value)
        vector = cast(Any, self).PLACE.kind == "vector"
        return misfit(cast(Any, self), k) if vector and len(sizes) != 1 else sizes[-1]

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
        return n if (columns, ranks, dtype_of(self.b)) == (k, rank, self.dtype) else misfit(self, k)

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
        return n if shape_of(self.z)[-1] == rank else misfit(self, k)

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
    it, and ``s M_p … M_1 x``. Their factors lie in `pool`, `n` is the number of y's features. For a GPU, `width` says
    how many entries a row of the schedule has, each a block of ranks or a mode, and `longest` how many modes a chain
    can have. Layouts and meaning: `ir.banked`.
    """

    pool: Annotated[Leaf, Place("pool", "pool", "table", "rows")]
    schedule: Annotated[Leaf, Place("schedule", "schedule", "table", "rows")]
    n: int
    width: int | None = None
    longest: int = 0

    @property
    def dtype(self) -> str:
        return dtype_of(self.pool)

    @property
    def columns(self) -> int:
        """Of u = A x, for a GPU."""
        return banked.BLOCK * (self.width or 0)

    def between(self, k: int) -> int:
        """Columns for what modes make that are not the last of their chains, for a GPU."""
        return banked.between(self.longest, k, self.n)

    def apply(self, x: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        modes = [self.longest] * bool(self.longest)
        # an op, so that it can be traced
        made: torch.Tensor = torch.ops.gaws.banked(x, self.pool, self.schedule, base, bias, *modes)
        return made

    def features(self, k: Any) -> Any:
        shapes = len(shape_of(self.pool)), len(shape_of(self.schedule))
        return self.n if shapes == (1, 3) and dtype_of(self.schedule) == "i32" else misfit(self, k)

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
        width, modes = f" x{self.width}" * bool(self.width), f" modes={self.longest}" * bool(self.longest)
        return f"bank({self.dtype}{width}{modes})"


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


ROLES = frozenset(place.role for kind in (*ORDER, Mode) for place in places(kind).values() if place)
"""Of all operands."""
