"""What the kernels of all plans have in common: which cases there are, their tensors and their columns of u.

`triton_gemv` has the kernels of the plans for few tokens and `triton_tile` those for many, `triton_modes` what
Kronecker terms add to them, and `triton` puts the kernels of one plan into a module. Block sizes follow from the
shapes by rules of thumb and were not tuned on a device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from gawscompile.codegen import triton_bank_modes as bank_modes
from gawscompile.codegen import triton_packed as packed
from gawscompile.codegen.triton_cases import Case, Kernel, Tensor, Work
from gawscompile.codegen.triton_modes import Product, columns, common
from gawscompile.codegen.triton_text import Code, Cut, fn, function, printed, reads, v
from gawscompile.ir.operators import Banked, LowRank
from gawscompile.ir.spec import KernelSpec, Operand
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import dtype_of

MAX_ROW_BLOCKS = 65535  # CUDA's limit for the second axis of a grid

Definitions: TypeAlias = tuple[tuple[Code, Code], ...]  # names and their values


@dataclass(frozen=True)
class Narrow:
    """``B u`` or ``C z``: a matrix of `rank` columns, of `dtype`, times the vector that each token has, of dtype `has`.

    `vector` is the first token's, and the next one's lies `stride` further. `term` is what u is of. The names `factors`
    and `vectors` are for what is loaded, `columns` and `ok` for positions: no two terms share one, as Triton wants a
    name that a loop assigns to keep its shape.
    """

    j: int
    rank: int
    dtype: str
    has: str
    vector: Code
    stride: Code | int
    matrix: Code
    factors: Code
    vectors: Code
    columns: Code
    ok: Code
    term: LowRank | None = None

    @property
    def common(self) -> str:
        """The dtype of both operands of a dot."""
        return common(self.dtype, self.has, of_u=self.term is not None)

    def loop(self, ranks: Cut, step: list[Code]) -> list[Code]:
        """`step` for all columns, which are cut as `ranks`."""
        body = [*ranks.index(self.columns, self.ok, v.r), *step]
        return ranks.loop(v.r, fn("range", 0, ranks.size, ranks.block), body)


class Style(ABC):
    """The kernels of one plan. A program finds its token and its case, and does the case's work.

    The work sees pointers that were moved to its (first) token. Work is equal where only tensors, row counts and
    columns of u differ, so q, k and v usually share theirs.
    """

    name: str
    reach: str  # of one program along the tokens, for docstrings
    token: Definitions  # of `token` and others in `passed`
    passed: tuple[str, ...] = ("token",)  # what work may use beside tensors
    extra: tuple[tuple[str, str], ...] = ()  # further parameters, with their Triton types
    # the stages whose operands an expanding case reads
    expanded: tuple[str, ...] = ("base", "rows")
    does = "BLOCK_N rows of a y"
    expanding = "expand"  # the step that makes the rows of y
    total: Code  # what the work calls the rows before they are stored
    names: Definitions = ()  # further ones for the rows of a W or a mode
    keeps_state = False  # counters, between calls
    uses_library = False  # for the products of the bases
    repeats_shrink = False  # every program computes u for itself
    reads_y = False  # whether an expanding case adds to what y holds

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec
        self.columns = [columns(spec, p) for p in spec.projections]
        *self.offsets, self.width = accumulate((mine.width for mine in self.columns), initial=0)
        products = [(i, p) for i, mine in enumerate(self.columns) for p in mine.products]
        self.written = [(i, p) for i, p in products if p.column is not None]
        stages = [p.launch + 1 for _, p in self.written] + [bank.longest - 1 for _, bank, _ in self.banks()]
        self.stages = max([1, *stages]) if self.width else 0

    def kernels(self) -> list[Kernel]:
        """In the order in which they are launched."""
        shrinks = [self._kernel("shrink", "Columns of u", self.shrinks(stage), stage) for stage in range(self.stages)]
        expands = self.expands()
        return [*shrinks, *[self._kernel(self.expanding, "The rows of every y", expands)] * bool(expands)]

    def shrinks(self, stage: int) -> list[Case]:
        """Columns of u: s A x for every low-rank term in the first stage, and mode products."""
        cases = []
        for i, j, term, offset in self.terms() if stage == 0 else ():
            mine = [o for o in self.spec.operands() if (o.projection, o.term) == (i, j) and o.place.stage == "shrink"]
            work, programs = self.shrink_work(term)
            cases.append(Case(f"A{i}_{j}", work, tuple(map(_tensor, mine)), programs, offset))
        for i, bank, offset in self.banks() if stage == 0 else ():
            mine = [o for o in self.spec.operands() if o.projection == i and o.table]
            work, programs = self.bank_work(bank)
            cases.append(Case(f"bank{i}", work, tuple(map(_tensor, mine)), programs, offset))
        for i, bank, offset in self.banks():
            if stage < bank.longest - 1:
                mine = [o for o in self.spec.operands() if o.projection == i and o.table]
                work, programs = self.chain_work(bank, stage), bank_modes.programs(bank, self.spec.k)
                cases.append(Case(f"chains{i}", work, tuple(map(_tensor, mine)), programs, offset + bank.columns))
        for i, product in self.written:
            if product.launch == stage:
                work, programs = self.mode_work(product)
                tensors = tuple(map(_tensor, _factors(self.spec, i, product)))
                cases.append(Case(product.describe(i), work, tensors, programs, self.offsets[i]))
        return cases

    def expands(self) -> list[Case]:
        """The rows of every W, with bias, residual, B u, C z and last mode products as their epilogue."""
        if self.spec.swiglu:
            return [self.gated()]
        return [self.expand(i) for i in range(len(self.spec.projections))]

    def expand(self, i: int) -> Case:
        """The rows of one W."""
        p, rows = self.spec.projections[i], self.rows(i)
        body = [
            *[_to_y()] * self.reads_y,
            *self.multiply(i, rows),
            *self.epilogue(i, rows),
            *[_to_y()] * (not self.reads_y),
            *self.store(self.total, p.out, rows),
        ]
        doc = f"{self.does}, {self.reach}: {{}}."
        work = Work(doc, tuple(self.framed(body, rows)), packed.helpers([p]))
        y = Tensor("y", f"y{i}", p.out, updated=self.reads_y)
        return Case(f"y{i}", work, (*self.tensors(i), y), rows.steps, self.column(i), p.n)

    def gated(self) -> Case:
        """The rows of gate and up, whose product alone is stored: ``silu(y0) * y1``."""
        gate, rows = self.spec.projections[0], self.rows(0)
        name = "read" if self.reads_y else "multiply"
        products, multiply = self._halves(name, "W x", [self.multiply(i, rows) for i in (0, 1)], rows)
        sums, add = self._halves("add", "what is added to them", [self.epilogue(i, rows) for i in (0, 1)], rows)
        body = [
            *products,
            *(self.before_u([e for mine in self.columns for e in mine.endings]) if "u" in reads(sums) else []),
            *sums,
            _to_y(),
            *self.store(v.gate * fn("tl.sigmoid", v.gate) * v.up, gate.out, rows),
        ]
        called = (*packed.helpers(self.spec.projections), *multiply, *add)
        work = Work(f"{self.does}, {self.reach}: {{}}.", tuple(self.framed(body, rows)), called)
        tensors = [Tensor(t.name, t.name, t.dtype) for i in (0, 1) for t in self.tensors(i, temporary=True)]
        return Case("y = silu(y0) y1", work, (*tensors, Tensor("y", "y", gate.out)), rows.steps, 0, gate.n)

    def _halves(self, name: str, what: str, bodies: list[list[Code]], rows: Cut) -> tuple[list[Code], list[str]]:
        """Calls of a function each for gate and up, and the functions: one, if they are alike."""
        calls: list[Code] = []
        texts = []
        alike = len({tuple(body) for body in bodies}) == 1
        for i, (half, body) in enumerate(zip(("gate", "up"), bodies, strict=True)):
            if not body:
                continue
            lines = self.framed([*[_to_y()] * ("y" in reads(body)), *body], rows)
            lines = [*[v.N.constant(self.spec.projections[i].n)] * ("N" in reads(lines)), *lines]
            given = {"x": v.x, "u": v.u + self.column(i)}
            given |= {tensor.role: v[tensor.name] for tensor in self.tensors(i, temporary=True)}
            given |= {other: v[other] for other in ("block", *self.passed)}
            given = {param: value for param, value in given.items() if param in reads(lines)}
            given = {self.total.text: v[half], **given} if name == "add" else given
            params = [f"{param}: tl.constexpr" if (param, "constexpr") in self.extra else param for param in given]
            title = name if alike else f"{name}_{half}"
            doc = f"BLOCK_N rows of {'gate or up' if alike else half}, {self.reach}: {what}, in fp32."
            calls += v[half].let(Code(title)).wrapped(list(given.values()))
            texts.append(function("@triton.jit", title, params, doc, [*printed(lines), f"return {self.total.text}"]))
        return calls, list(dict.fromkeys(texts))

    def framed(self, body: list[Code], rows: Cut, end: Code | int = v.N) -> list[Code]:
        """`body` after the names of its rows, of which there are `end`, as far as it reads them."""
        # Mode products use the names of rows in 32 bits.
        named = ((v.start, v.block * v.BLOCK_N), (v.row, v.block * v.BLOCK_N + v.rows), *self.names)
        for name, value in reversed((*row_range(rows, v.BLOCK_N, end), *named)):
            body = [*[name.let(value)] * (name.text in reads(body)), *body]
        return [v.BLOCK_N.constant(rows.block), *body]

    def tensors(self, i: int, temporary: bool = False) -> list[Tensor]:
        """What the rows of one W read beside x and u, what they add to included if it is `temporary`."""
        operands = [o for o in self.spec.operands() if o.projection == i and o.place.stage in self.expanded]
        tensors = [_tensor(o, numbered=True) for o in operands]
        tensors += [_tensor(o) for ending in self.columns[i].endings for o in _factors(self.spec, i, ending)]
        return tensors + [Tensor("y", f"y{i}", self.spec.projections[i].out)] * (temporary and self.reads_y)

    def rows(self, i: int) -> Cut:
        """How the rows of one W are cut; those of gate and up alike."""
        joined = range(len(self.spec.projections)) if self.spec.swiglu else [i]
        periods = [ending.period for j in joined for ending in self.columns[j].endings]
        return self.cut_rows(
            self.spec.projections[i].n, any(self.spec.projections[j].transposed for j in joined), periods
        )

    def column(self, i: int) -> int:
        """Of u, the first that belongs to a projection."""
        return self.offsets[i] if self.columns[i].width else 0

    def low_rank(self, p: Sum) -> list[Narrow]:
        """Of every low-rank term, B u."""
        return [
            Narrow(j, term.rank, term.dtype, "f32", v.u + offset, v.WIDTH, *_own(j, "b", "u", "ranks", "rank"), term)
            for j, (term, offset) in enumerate(with_offsets(p))
        ]

    def given(self, p: Sum) -> list[Narrow]:
        """Every C z."""
        return [
            Narrow(
                j, term.rank, term.dtype, dtype_of(term.z), v[f"z{j}"], term.rank, *_own(j, "c", "z", "given", "given")
            )
            for j, term in enumerate(p.given)
        ]

    def to_rows(self, p: Sum) -> list[Code]:
        """Move what is added to its token (where it has tokens) and to its first row."""
        given, to_y = self.given(p), v.token * v.N + v.first
        return [
            *[v.bias.let(v.first, "+=")] * bool(p.bias),
            *[v.residual.let(to_y, "+=")] * bool(p.residual),
            *[v.rowscale.let(v.first, "+=")] * bool(p.rowscale),
            *(narrow.matrix.let(v.first * narrow.rank, "+=") for narrow in (*self.low_rank(p), *given)),
            *(narrow.vector.let(v.token * narrow.rank, "+=") for narrow in given),
        ]

    def before_u(self, endings: list[Product]) -> list[Code]:
        """What comes before the first read of u."""
        return []

    def terms(self) -> list[tuple[int, int, LowRank, int]]:
        """Every low-rank term of the group: its projection, its index there, itself, its first column in u."""
        return [
            (i, j, term, self.offsets[i] + offset)
            for i, p in enumerate(self.spec.projections)
            for j, (term, offset) in enumerate(with_offsets(p))
        ]

    def banks(self) -> list[tuple[int, Banked, int]]:
        """Every bank of the group: its projection, itself, its first column in u."""
        return [(i, p.banked, self.offsets[i] + p.rank) for i, p in enumerate(self.spec.projections) if p.banked]

    def sections(self) -> list[tuple[str, int]]:
        """What u holds, and from which column on."""
        found = [(f"A{i}_{j}", offset) for i, j, _, offset in self.terms()]
        found += [(f"bank{i}", offset) for i, _, offset in self.banks()]
        found += [(f"chains{i}", offset + bank.columns) for i, bank, offset in self.banks() if bank.longest > 1]
        found += [(p.describe(i), self.offsets[i] + (p.column or 0)) for i, p in self.written]
        return sorted(found, key=lambda section: section[1])

    def _kernel(self, what: str, doc: str, cases: list[Case], stage: int = 0) -> Kernel:
        read = frozenset().union(*(case.work.reads for case in cases))
        shared = [Tensor("x", "x", self.spec.x), Tensor("u", "u", "f32"), Tensor("flags", "flags", "i32")]
        lengths = {"x": v.K, "u": v.WIDTH, "flags": v.FLAGS}
        shared = [tensor for tensor in shared if tensor.name in read]
        return Kernel(
            what=what,
            stage=stage,
            style=self.name,
            doc=f"{doc}, {self.reach}.",
            shared=tuple(shared),
            cases=tuple(cases),
            prologue=(
                *(name.let(value) for name, value in self.token),
                v.block.let(fn("tl.program_id", 1)),
                *(v[tensor.name].let(v.token * lengths[tensor.name], "+=") for tensor in shared),
            ),
            passed=self.passed,
            extra=self.extra,
            options=self.options(what),
            choices=self.choices(what),
            helpers=self.helpers(),
        )

    def helpers(self) -> tuple[str, ...]:
        """Functions that the work of a kernel calls."""
        return ()

    @abstractmethod
    def options(self, what: str) -> tuple[tuple[str, int], ...]:
        """What the host passes to Triton for the kernel `what`."""

    @abstractmethod
    def choices(self, what: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        """What the autotuner tries instead."""

    @abstractmethod
    def shrink_work(self, term: LowRank) -> tuple[Work, int]:
        """What a program does for `term`, and the number of programs."""

    @abstractmethod
    def bank_work(self, term: Banked) -> tuple[Work, int]:
        """The same for a bank."""

    @abstractmethod
    def chain_work(self, term: Banked, stage: int) -> Work:
        """What a program does for the modes of a bank at this place of their chains, unless they are the last."""

    @abstractmethod
    def mode_work(self, product: Product) -> tuple[Work, int]:
        """What a program does for `product`, which writes to u, and the number of programs."""

    @abstractmethod
    def cut_rows(self, n: int, transposed: bool, periods: list[int]) -> Cut:
        """How `n` rows of W are cut, in blocks that divide `periods` if any does."""

    @abstractmethod
    def multiply(self, i: int, rows: Cut) -> list[Code]:
        """`total` = W x for the rows of a program."""

    @abstractmethod
    def epilogue(self, i: int, rows: Cut) -> list[Code]:
        """What is added to `total`."""

    @abstractmethod
    def store(self, value: Code, dtype: str, rows: Cut) -> list[Code]:
        """`value` to the rows of y."""


def _tensor(o: Operand, numbered: bool = False) -> Tensor:
    """`o` as the work of a case calls it; those of low-rank terms by their number where a case has several."""
    roles = {"weight": "w", "mode": f"g{o.term}_{o.mode}", "kron_scale": f"kron_scale{o.term}"}
    if numbered:
        roles |= {role: f"{role}{o.term}" for role in ("a", "b", "scale", "c", "z")}
    return Tensor(roles.get(o.role, o.role), o.name, o.dtype)


def _factors(spec: KernelSpec, projection: int, product: Product) -> list[Operand]:
    """The tensors that `product` reads beside its input."""
    mine = [o for o in spec.operands() if (o.projection, o.term) == (projection, product.term)]
    factors = [o for o in mine if o.role == "mode" and o.mode in product.factors]
    return factors + [o for o in mine if o.role == "kron_scale" and product.scaled]


def _own(j: int, matrix: str, vector: str, columns: str, ok: str) -> tuple[Code, Code, Code, Code, Code]:
    """From `matrix` to `ok`."""
    return v[f"{matrix}{j}"], v[f"{matrix}s{j}"], v[f"{vector}s{j}"], v[f"{columns}{j}"], v[f"{ok}{j}_ok"]


def _to_y() -> Code:
    return v.y.let(v.token * v.N + v.first, "+=")


def dividing(blocks: tuple[int, ...], size: int, periods: Iterable[int]) -> tuple[int, ...]:
    """Those of `blocks` that divide `size` and all `periods`, or all of them if none does."""
    common = math.gcd(size, *periods)
    return tuple(block for block in blocks if common % block == 0) or blocks


def blocks_of_rows(spec: KernelSpec, blocks: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Those of `blocks` (descending) up to `most` of which a grid can hold as many as there are, or larger ones."""
    rows = sum(p.n for p in spec.projections)
    shrinking = sum(_shrinking(spec, p) for p in spec.projections)  # these may be in the same launch
    programs = MAX_ROW_BLOCKS - len(spec.projections) - shrinking  # and each W one more for its last rows
    enough = tuple(block for block in blocks if rows <= block * programs) or blocks[:1]
    return tuple(block for block in enough if block <= most) or enough[-1:]


def _shrinking(spec: KernelSpec, p: Sum) -> int:
    """The most programs that write to the columns of u of `p`: one for each column, and those of its bank."""
    width = columns(spec, p).width
    return width + bank_modes.all_programs(p.banked, spec.k) - p.banked.between(spec.k) if p.banked else width


def with_offsets(p: Sum) -> list[tuple[LowRank, int]]:
    """The terms of `p`, each with its first column in the part of u that belongs to `p`."""
    return [(term, sum(t.rank for t in p.lowrank[:j])) for j, term in enumerate(p.lowrank)]


def k_columns(range_: Cut) -> list[Code]:
    return range_.index(v.cols, v.col_ok, v.k, v.K, v.BLOCK_K)


def row_range(range_: Cut, block: Code, end: Code | int) -> Definitions:
    """The rows of this program: `first` in 64 bits moves pointers, `rows` in 32 bits indexes from there."""
    names = (v.rows, fn("tl.arange", 0, block)), (v.first, v.block.to("i64") * block)
    return (*names, *[(v.row_ok, v.first + v.rows < end)] * range_.masked)


def row_of_w(p: Sum, k: int) -> Code:
    """The offset of the columns in a weight kept as ``[k, n]``."""
    cols = v.cols[:, None]
    return (cols.to("i64") if k * p.n >= 1 << 31 else cols) * Code(str(p.n))
