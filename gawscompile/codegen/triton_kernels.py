"""What the two sets of kernels of a module have in common: which cases there are, their tensors and columns of u.

`triton_gemv` and `triton_tile` have the sets, `triton_modes` what Kronecker terms add to them, and `triton` puts all
into a module. Block sizes follow from the shapes by rules of thumb and were not tuned on a device.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import accumulate

from gawscompile.codegen.spec import KernelSpec, LowRankSpec, Operand, ProjectionSpec
from gawscompile.codegen.triton_modes import Columns, Product, columns
from gawscompile.codegen.triton_text import (
    Case,
    Cut,
    Kernel,
    Tensor,
    Work,
    index,
    loop,
    scaled,
    times,
)

MAX_ROW_BLOCKS = 65535  # CUDA's limit for the second axis of a grid


class Style(ABC):
    """One set of kernels. A program finds its token and its case, and does the case's work.

    The work sees pointers that were moved to its (first) token. Work is equal where only tensors, row counts and
    columns of u differ, so q, k and v usually share theirs.
    """

    name: str
    reach: str  # of one program along the tokens, for docstrings
    token: tuple[str, ...]  # lines that define `token`
    passed: tuple[str, ...] = ("token",)  # what work may use beside tensors
    extra: tuple[tuple[str, str], ...] = ()  # further parameters, with their Triton types
    row_blocks: tuple[int, ...]

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.columns = [columns(spec, p) for p in spec.projections]
        *self.offsets, self.width = accumulate((mine.width for mine in self.columns), initial=0)
        products = [(i, p) for i, mine in enumerate(self.columns) for p in mine.products]
        self.written = [(i, p) for i, p in products if p.column is not None]

    def kernels(self) -> list[Kernel]:
        later = [self.shrink(launch) for launch in sorted({p.launch for _, p in self.written} - {0})]
        return [*([self.shrink(0)] if self.width else []), *later, self.expand()]

    def shrink(self, launch: int) -> Kernel:
        """Columns of u: s A x for every low-rank term, and mode products."""
        cases = []
        for i, j, term, offset in self.terms() if launch == 0 else ():
            mine = [o for o in self.spec.operands() if (o.projection, o.term) == (i, j) and o.role in ("a", "scale")]
            work, programs = self.shrink_work(term)
            cases.append(Case(f"A{i}_{j}", work, tuple(map(_tensor, mine)), programs, offset))
        for i, product in self.written:
            if product.launch == launch:
                work, programs = self.mode_work(product)
                tensors = tuple(map(_tensor, _factors(self.spec, i, product)))
                cases.append(Case(product.describe(i), work, tensors, programs, self.offsets[i]))
        return self._kernel(f"shrink{launch + 1 if launch else ''}", "Columns of u", cases, self.shrink_warps())

    def expand(self) -> Kernel:
        """The rows of every W, with bias, residual, B u and last mode products as their epilogue."""
        cases = []
        for i, (p, columns_) in enumerate(zip(self.spec.projections, self.columns, strict=True)):
            mine = [o for o in self.spec.operands() if o.projection == i and o.role in _EXPANDED]
            mine += [o for ending in columns_.endings for o in _factors(self.spec, i, ending)]
            work, programs = self.expand_work(p, columns_)
            tensors = (*map(_tensor, mine), Tensor("y", f"y{i}", p.out))
            cases.append(Case(f"y{i}", work, tensors, programs, self.offsets[i] if columns_.width else 0, p.n))
        return self._kernel("expand", "The rows of every y", cases, self.expand_warps())

    def terms(self) -> list[tuple[int, int, LowRankSpec, int]]:
        """Every low-rank term of the group: its projection, its index there, itself, its first column in u."""
        return [
            (i, j, term, self.offsets[i] + offset)
            for i, p in enumerate(self.spec.projections)
            for j, (term, offset) in enumerate(with_offsets(p))
        ]

    def sections(self) -> list[tuple[str, int]]:
        """What u holds, and from which column on."""
        found = [(f"A{i}_{j}", offset) for i, j, _, offset in self.terms()]
        found += [(p.describe(i), self.offsets[i] + (p.column or 0)) for i, p in self.written]
        return sorted(found, key=lambda section: section[1])

    def options(self, warps: int) -> tuple[tuple[str, int], ...]:
        """What the host passes to Triton."""
        return (("num_warps", warps),)

    def _kernel(self, what: str, doc: str, cases: list[Case], warps: int) -> Kernel:
        words = {word for case in cases for line in case.work.body for word in re.findall(r"\w+", line)}
        moves = ["x += token * K"] * ("x" in words) + ["u += token * WIDTH"] * ("u" in words)
        shared = [Tensor("x", "x", self.spec.x)] * ("x" in words) + [Tensor("u", "u", "f32")] * ("u" in words)
        return Kernel(
            name=f"{what}_{self.name}",
            doc=f"{doc}, {self.reach}.",
            shared=tuple(shared),
            cases=tuple(cases),
            prologue=(*self.token, "block = tl.program_id(1)", *moves),
            passed=self.passed,
            extra=self.extra,
            options=self.options(warps),
        )

    @abstractmethod
    def shrink_work(self, term: LowRankSpec) -> tuple[Work, int]:
        """What a program does for `term`, and the number of programs."""

    @abstractmethod
    def mode_work(self, product: Product) -> tuple[Work, int]:
        """What a program does for `product`, which writes to u, and the number of programs."""

    @abstractmethod
    def expand_work(self, projection: ProjectionSpec, columns: Columns) -> tuple[Work, int]:
        """What a program does for `projection`, and the number of programs."""

    @abstractmethod
    def shrink_warps(self) -> int:
        """Warps of a shrinking program."""

    @abstractmethod
    def expand_warps(self) -> int:
        """Warps of an expanding program."""


_EXPANDED = ("weight", "bias", "residual", "b")


def _tensor(o: Operand) -> Tensor:
    roles = {"weight": "w", "b": f"b{o.term}", "mode": f"g{o.term}_{o.mode}", "kron_scale": f"kron_scale{o.term}"}
    return Tensor(roles.get(o.role, o.role), o.name, o.dtype)


def _factors(spec: KernelSpec, projection: int, product: Product) -> list[Operand]:
    """The tensors that `product` reads beside its input."""
    mine = [o for o in spec.operands() if (o.projection, o.term) == (projection, product.term)]
    factors = [o for o in mine if o.role == "mode" and o.mode in product.factors]
    return factors + [o for o in mine if o.role == "kron_scale" and product.scaled]


def rescaled(product: Product, value: str) -> str:
    """`value` times the scale of the term, if it is applied in `product`."""
    kron = product.kron
    return scaled(kron.scale, kron.scale_dtype, f"kron_scale{product.term}", value) if product.scaled else value


def row_names(block: str, body: list[str]) -> list[str]:
    """The names of rows in 32 bits that mode products use."""
    words = set(re.findall(r"\w+", "\n".join(body)))
    names = {"start": f"block * {block}", "row": f"block * {block} + rows"}
    return [f"{name} = {value}" for name, value in names.items() if name in words]


def dividing(blocks: tuple[int, ...], size: int, periods: Iterable[int]) -> tuple[int, ...]:
    """Those of `blocks` that divide `size` and all `periods`, or all of them if none does."""
    common = math.gcd(size, *periods)
    return tuple(block for block in blocks if common % block == 0) or blocks


def blocks_of_rows(spec: KernelSpec, blocks: tuple[int, ...], programs: int) -> tuple[int, ...]:
    """Those of `blocks` (descending) that give the group enough programs, and no more than a grid can hold."""
    rows = sum(p.n for p in spec.projections)
    most = MAX_ROW_BLOCKS - len(spec.projections)  # each may need one more for its last rows
    enough = tuple(block for block in blocks if rows >= block * programs) or blocks[-1:]
    return tuple(block for block in enough if rows <= block * most) or enough[:1]


def with_offsets(p: ProjectionSpec) -> list[tuple[LowRankSpec, int]]:
    """The terms of `p`, each with its first column in the part of u that belongs to `p`."""
    return [(term, sum(t.rank for t in p.lowrank[:j])) for j, term in enumerate(p.lowrank)]


def k_columns(range_: Cut) -> list[str]:
    return index(range_, "cols", "col_ok", "BLOCK_K", "k", "K")


def rank_columns(range_: Cut, j: int) -> list[str]:
    # A name of their own for every term: Triton wants a name that a loop assigns to keep its shape.
    return index(range_, f"ranks{j}", f"rank{j}_ok", str(range_.block), "r", str(range_.size))


def rank_loop(range_: Cut, body: list[str]) -> list[str]:
    return loop(range_, f"for r in range(0, {range_.size}, {range_.block})", body)


def row_range(range_: Cut, block: str, end: str) -> list[str]:
    """The rows of this program: `first` in 64 bits moves pointers, `rows` in 32 bits indexes from there."""
    return [
        f"rows = tl.arange(0, {block})",
        f"first = block.to(tl.int64) * {block}",
        *[f"row_ok = first + rows < {end}"] * range_.masked,
    ]


def to_rows(p: ProjectionSpec) -> list[str]:
    """Move every tensor of `p` to its token (where it has tokens) and to its first row."""
    return [
        "w += first" if p.transposed else "w += first * K",
        *["bias += first"] * bool(p.bias),
        *["residual += token * N + first"] * bool(p.residual),
        *(f"b{j} += {times('first', term.rank)}" for j, term in enumerate(p.lowrank)),
        "y += token * N + first",
    ]


def scaled_term(term: LowRankSpec, value: str) -> str:
    return scaled(term.scale, term.scale_dtype, "scale", value)


def row_of_w(p: ProjectionSpec, k: int, cols: str) -> str:
    """The offset of `cols` in a weight kept as ``[k, n]``."""
    return f"{cols}{'.to(tl.int64)' * (k * p.n >= 1 << 31)} * {p.n}"
