"""The kernels of a module; `triton` puts them into one.

`Style` is what the two sets of kernels have in common, `Gemv` and `Tile` are the sets. Block sizes follow from
the shapes by rules of thumb and were not tuned on a device. What Kronecker terms add is in `triton_modes`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from gawscompile.codegen.spec import DTYPES, KernelSpec, LowRankSpec, Operand, ProjectionSpec
from gawscompile.codegen.triton_modes import Columns, Emitter, Product, columns
from gawscompile.codegen.triton_text import (
    Case,
    Cut,
    Kernel,
    Tensor,
    Work,
    constant,
    cut,
    dot,
    index,
    load,
    loop,
    plus,
    scaled,
    store,
    times,
    zeros,
)

GEMV_ROWS = (32, 16, 8, 4)  # rows of W per program
GEMV_TRANSPOSED = 16  # the least of a weight kept as [k, n], whose rows then fill 32-byte sectors
GEMV_PROGRAMS = 256  # about two per multiprocessor of a large GPU; fewer rows per program where there are fewer
GEMV_ELEMENTS = 4096  # of W per program and step: 8 or 16 KiB in flight
GEMV_UNROLLED = 128  # elements per thread that unrolled steps may keep in flight; beyond, registers run out
GEMV_COLUMNS = (1024, 512, 256, 128, 64)  # of A, or of W, per step
GEMV_RANKS = (64, 32, 16, 8)
TILE_ROWS = (64, 32, 16)
TILE_PROGRAMS = 128
TILE_COLUMNS = {2: (64, 32, 16), 4: (32, 16)}  # of x and W per step, by bytes per element
TILE_RANKS = (32, 16)
TILE_WARPS = 4
TILE_TOKENS = (16, 64)  # BLOCK_M for few tokens and for many
TILE_TOKENS_F32 = (16, 32)  # Triton 3.6 gives wider fp32 tiles to sm_100's tensor cores as tf32, against "ieee"
TILE_WORKS = 2  # kinds of work whose pipelines fit together into the shared memory of an sm_86 (99 KiB)
MAX_ROW_BLOCKS = 65535  # CUDA's limit for the second axis of a grid
DOT_MINIMUM = 16  # the least edge of a `tl.dot` that every target takes


def terms(spec: KernelSpec) -> list[tuple[int, int, LowRankSpec, int]]:
    """Every low-rank term of the group: its projection, its index there, itself, its first column in u."""
    found = []
    offset = 0
    for i, p in enumerate(spec.projections):
        for j, term in enumerate(p.lowrank):
            found.append((i, j, term, offset))
            offset += term.rank
        offset += columns(spec, p).width - p.rank
    return found


class Style(ABC):
    """One pair of kernels. A program finds its token and its case, and does the case's work.

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
        self.width = sum(mine.width for mine in self.columns)
        self.written = [p for mine in self.columns for p in mine.products if p.column is not None]

    def kernels(self) -> list[Kernel]:
        later = [self.shrink(launch) for launch in sorted({p.launch for p in self.written} - {0})]
        return [*([self.shrink(0)] if self.width else []), *later, self.expand()]

    def shrink(self, launch: int) -> Kernel:
        """Columns of u: s A x for every low-rank term, and mode products."""
        cases = []
        for i, j, term, offset in terms(self.spec) if launch == 0 else ():
            mine = [o for o in self.spec.operands() if (o.projection, o.term) == (i, j) and o.role in ("a", "scale")]
            work, programs = self.shrink_work(term)
            cases.append(Case(f"A{i}_{j}", work, tuple(map(_tensor, mine)), programs, offset))
        offset = 0
        for i, columns_ in enumerate(self.columns):
            for product in columns_.products:
                if product.launch == launch and product.column is not None:
                    work, programs = self.mode_work(product)
                    tensors = tuple(map(_tensor, _factors(self.spec, i, product)))
                    cases.append(Case(product.describe(i), work, tensors, programs, offset))
            offset += columns_.width
        return self._kernel(f"shrink{launch + 1 if launch else ''}", "Columns of u", cases, self.shrink_warps())

    def sections(self) -> list[tuple[str, int]]:
        """What u holds, and from which column on."""
        found = [(f"A{i}_{j}", offset) for i, j, _, offset in terms(self.spec)]
        offset = 0
        for i, mine in enumerate(self.columns):
            found += [(p.describe(i), offset + p.column) for p in mine.products if p.column is not None]
            offset += mine.width
        return sorted(found, key=lambda section: section[1])

    def expand(self) -> Kernel:
        """The rows of every W, with bias, residual, B u and last mode products as their epilogue."""
        cases = []
        offset = 0
        for i, (p, columns_) in enumerate(zip(self.spec.projections, self.columns, strict=True)):
            mine = [o for o in self.spec.operands() if o.projection == i and o.role in _EXPANDED]
            mine += [o for ending in columns_.endings for o in _factors(self.spec, i, ending)]
            work, programs = self.expand_work(p, columns_)
            tensors = (*map(_tensor, mine), Tensor("y", f"y{i}", p.out))
            cases.append(Case(f"y{i}", work, tensors, programs, offset if columns_.width else 0, p.n))
            offset += columns_.width
        return self._kernel("expand", "The rows of every y", cases, self.expand_warps())

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


def _tensor(operand: Operand) -> Tensor:
    many = {
        "b": f"b{operand.term}",
        "mode": f"g{operand.term}_{operand.mode}",
        "kron_scale": f"kron_scale{operand.term}",
    }
    return Tensor(
        many.get(operand.role) or {"weight": "w"}.get(operand.role, operand.role), operand.name, operand.dtype
    )


_EXPANDED = ("weight", "bias", "residual", "b")


def _factors(spec: KernelSpec, projection: int, product: Product) -> list[Operand]:
    """The tensors that `product` reads beside its input."""
    mine = [o for o in spec.operands() if (o.projection, o.term) == (projection, product.term)]
    factors = [o for o in mine if o.role == "mode" and o.mode in product.factors]
    return factors + [o for o in mine if o.role == "kron_scale" and product.scaled]


def _rescaled(product: Product, value: str) -> str:
    """`value` times the scale of the term, if it is applied in `product`."""
    kron = product.kron
    return scaled(kron.scale, kron.scale_dtype, f"kron_scale{product.term}", value) if product.scaled else value


def _named(block: str, body: list[str]) -> list[str]:
    """The names of rows in 32 bits that mode products use."""
    words = set(re.findall(r"\w+", "\n".join(body)))
    names = {"start": f"block * {block}", "row": f"block * {block} + rows"}
    return [f"{name} = {value}" for name, value in names.items() if name in words]


def _dividing(blocks: tuple[int, ...], size: int, periods: Iterable[int]) -> tuple[int, ...]:
    """Those of `blocks` that divide `size` and all `periods`, or all of them if none does."""
    common = math.gcd(size, *periods)
    return tuple(block for block in blocks if common % block == 0) or blocks


def _row_blocks(spec: KernelSpec, blocks: tuple[int, ...], programs: int) -> tuple[int, ...]:
    """Those of `blocks` (descending) that give the group enough programs, and no more than a grid can hold."""
    rows = sum(p.n for p in spec.projections)
    most = MAX_ROW_BLOCKS - len(spec.projections)  # each may need one more for its last rows
    enough = tuple(block for block in blocks if rows >= block * programs) or blocks[-1:]
    return tuple(block for block in enough if rows <= block * most) or enough[:1]


def _with_offsets(p: ProjectionSpec) -> list[tuple[LowRankSpec, int]]:
    """The terms of `p`, each with its first column in the part of u that belongs to `p`."""
    return [(term, sum(t.rank for t in p.lowrank[:j])) for j, term in enumerate(p.lowrank)]


def _columns(range_: Cut) -> list[str]:
    return index(range_, "cols", "col_ok", "BLOCK_K", "k", "K")


def _ranks(range_: Cut, j: int) -> list[str]:
    # A name of their own for every term: Triton wants a name that a loop assigns to keep its shape.
    return index(range_, f"ranks{j}", f"rank{j}_ok", str(range_.block), "r", str(range_.size))


def _rank_loop(range_: Cut, body: list[str]) -> list[str]:
    return loop(range_, f"for r in range(0, {range_.size}, {range_.block})", body)


def _rows(range_: Cut, block: str, end: str) -> list[str]:
    """The rows of this program: `first` in 64 bits moves pointers, `rows` in 32 bits indexes from there."""
    return [
        f"rows = tl.arange(0, {block})",
        f"first = block.to(tl.int64) * {block}",
        *[f"row_ok = first + rows < {end}"] * range_.masked,
    ]


def _to_rows(p: ProjectionSpec) -> list[str]:
    """Move every tensor of `p` to its token (where it has tokens) and to its first row."""
    return [
        "w += first" if p.transposed else "w += first * K",
        *["bias += first"] * bool(p.bias),
        *["residual += token * N + first"] * bool(p.residual),
        *(f"b{j} += {times('first', term.rank)}" for j, term in enumerate(p.lowrank)),
        "y += token * N + first",
    ]


def _scaled(term: LowRankSpec, value: str) -> str:
    return scaled(term.scale, term.scale_dtype, "scale", value)


def _row_of_w(p: ProjectionSpec, k: int, cols: str) -> str:
    """The offset of `cols` in a weight kept as ``[k, n]``."""
    return f"{cols}{'.to(tl.int64)' * (k * p.n >= 1 << 31)} * {p.n}"


class Gemv(Style):
    """Few tokens: a program takes one of them and a few rows, multiplies elementwise in fp32 and sums at the end."""

    name = "gemv"
    reach = "for one token"
    token = ("token = tl.program_id(0).to(tl.int64)",)  # the fast axis, so tokens share rows while these are in L2

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.row_blocks = _row_blocks(spec, GEMV_ROWS, GEMV_PROGRAMS)
        self.widest = max(self._cut_rows(p, mine).block for p, mine in zip(spec.projections, self.columns, strict=True))
        self.widest = max(self.widest, self.row_blocks[0])
        self.shrink_columns = cut(spec.k, GEMV_COLUMNS)

    def shrink_warps(self) -> int:
        return _warps(GEMV_ELEMENTS if self.written else self.shrink_columns.block)

    def expand_warps(self) -> int:
        return _warps(self._cut_columns(self.widest).block * self.widest)

    def _cut_rows(self, p: ProjectionSpec, columns: Columns) -> Cut:
        blocks = tuple(block for block in GEMV_ROWS if block >= GEMV_TRANSPOSED) if p.transposed else self.row_blocks
        return cut(p.n, _dividing(blocks, p.n, [ending.period for ending in columns.endings]))

    def _cut_columns(self, rows: int) -> Cut:
        return cut(self.spec.k, [block for block in GEMV_COLUMNS if block <= GEMV_ELEMENTS // rows])

    def shrink_work(self, term: LowRankSpec) -> tuple[Work, int]:
        cols = self.shrink_columns
        ok = [cols.mask("col_ok")]
        step = [
            *_columns(cols),
            *load("xs =", "x + cols", ok, self.spec.x),
            *load("row =", "a + cols", ok, term.dtype),
            f"acc {'+=' if cols.steps > 1 else '='} row * xs",
        ]
        body = [
            constant("BLOCK_K", cols.block),
            "a += block.to(tl.int64) * K",
            *zeros(cols, "(BLOCK_K,)"),
            *loop(cols, _unrolled(cols, cols.block, self.shrink_warps()), step),
            *store("u + block", _scaled(term, "tl.sum(acc)"), "f32"),
        ]
        return Work(f"One column of u = s A x, {self.reach}: {{}}.", tuple(body)), term.rank

    def mode_work(self, product: Product) -> tuple[Work, int]:
        blocks = _dividing(GEMV_ROWS, product.mode.outputs, [product.period])
        few = tuple(block for block in blocks if product.mode.outputs >= block * GEMV_PROGRAMS) or blocks[-1:]
        rows = cut(product.mode.outputs, few)
        product_ = Emitter(product, rows, "BLOCK_N", self.spec.x).gemv()
        body = [
            constant("BLOCK_N", rows.block),
            *_rows(rows, "BLOCK_N", str(product.mode.outputs)),
            *_named("BLOCK_N", product_),
            *product_,
            *store(
                f"{plus('u', product.column or 0)} + first + rows",
                _rescaled(product, f"tl.sum(part{product.term}, axis=1)"),
                "f32",
                [rows.mask("row_ok")],
            ),
        ]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(body)), rows.steps

    def expand_work(self, projection: ProjectionSpec, columns: Columns) -> tuple[Work, int]:
        p, rows = projection, self._cut_rows(projection, columns)
        cols = self._cut_columns(self.widest if not p.transposed else rows.block)
        if p.transposed:
            shape = "(BLOCK_K, BLOCK_N)"
            w = f"w + {_row_of_w(p, self.spec.k, 'cols[:, None]')} + rows[None, :]"
            ok = [rows.mask("row_ok[None, :]"), cols.mask("col_ok[:, None]")]
            # Threads lie along rows of W here, so x has to change its layout anyway: as few numbers as there are.
            xs = load("xs =", "x + cols", [cols.mask("col_ok")], self.spec.x, view="[:, None]")
        else:
            shape, w = "(BLOCK_N, BLOCK_K)", "w + rows[:, None] * K + cols[None, :]"
            ok = [rows.mask("row_ok[:, None]"), cols.mask("col_ok[None, :]")]
            # A row of x, loaded once and broadcast, would change its layout in shared memory: two barriers a step.
            x = f"tl.broadcast_to(x + cols[None, :], {shape})"
            xs = load("xs =", x, [cols.mask("col_ok[None, :]")], self.spec.x)
        step = [
            *_columns(cols),
            *xs,
            *load("ws =", w, ok, p.dtype),
            f"acc {'+=' if cols.steps > 1 else '='} ws * xs",
        ]
        epilogue = self._epilogue(p, columns, rows)
        body = [
            constant("BLOCK_N", rows.block),
            constant("BLOCK_K", cols.block),
            *_rows(rows, "BLOCK_N", "N"),
            *_named("BLOCK_N", epilogue),
            *_to_rows(p),
            *zeros(cols, shape),
            *loop(cols, _unrolled(cols, cols.block * rows.block, self.expand_warps()), step),
            f"out = tl.sum(acc, axis={0 if p.transposed else 1})",
            *epilogue,
        ]
        return Work(f"BLOCK_N rows of a y, {self.reach}: {{}}.", tuple(body)), rows.steps

    def _epilogue(self, p: ProjectionSpec, columns: Columns, rows: Cut) -> list[str]:
        ok = [rows.mask("row_ok")]
        lines: list[str] = []
        if p.bias:
            lines += load("out +=", "bias + rows", ok, p.bias)
        if p.residual:
            lines += load("out +=", "residual + rows", ok, p.residual)
        for j, (term, offset) in enumerate(_with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        for ending in columns.endings:
            lines += Emitter(ending, rows, "BLOCK_N", self.spec.x).gemv()
            lines.append("out += " + _rescaled(ending, f"tl.sum(part{ending.term}, axis=1)"))
        return lines + store("y + rows", "out", p.out, ok)

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, GEMV_RANKS)
        u = f"{plus('u', offset)} + ranks{j}"
        b = f"b{j} + {times('rows[:, None]', term.rank)} + ranks{j}[None, :]"
        b_ok = [rows.mask("row_ok[:, None]"), ranks.mask(f"rank{j}_ok[None, :]")]
        step = [
            *_ranks(ranks, j),
            *load(f"us{j} =", u, [ranks.mask(f"rank{j}_ok")], "f32"),
            *load(f"bs{j} =", b, b_ok, term.dtype),
            f"out += tl.sum(bs{j} * us{j}[None, :], axis=1)",
        ]
        return _rank_loop(ranks, step)


def _warps(elements: int) -> int:
    """Warps of a gemv program: 16 elements or more per thread and step, at most four warps."""
    return min(4, max(1, elements // 512))


def _unrolled(cols: Cut, elements: int, warps: int) -> str:
    """The loop over K for steps of `elements`, unrolled so that several loads of a thread are in flight."""
    factor = max(1, GEMV_UNROLLED * 32 * warps // elements)
    if cols.steps <= factor:
        return "for k in tl.static_range(0, K, BLOCK_K)"
    return f"for k in tl.range(0, K, BLOCK_K, loop_unroll_factor={factor})"


class Tile(Style):
    """More tokens: a program makes a tile of BLOCK_M of them by some rows with `tl.dot`, which sums in fp32."""

    name = "tile"
    reach = "for BLOCK_M tokens of which `left` exist"
    token = ("token = tl.program_id(0).to(tl.int64) * BLOCK_M", "left = (m - token).to(tl.int32)")
    passed = ("token", "left", "BLOCK_M")
    extra = (("m", "i32"), ("BLOCK_M", "constexpr"))

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.row_blocks = _row_blocks(spec, TILE_ROWS, TILE_PROGRAMS)
        self.crowded = False
        # Triton adds up the shared memory of branches, and each kind of work is one.
        self.crowded = max(len(kernel.groups()) for kernel in self.kernels()) > TILE_WORKS

    def tokens(self) -> tuple[int, int]:
        """BLOCK_M for few tokens and for many."""
        dots = [self._common(p.dtype) for p in self.spec.projections]
        for _, _, term, _ in terms(self.spec):
            dots += [self._common(term.dtype), _common_with_u(term)]
        for mine in self.columns:
            for product in mine.products:
                emitter = Emitter(product, cut(1, TILE_ROWS), "", self.spec.x, tiles=True)
                dots += [emitter.common] * emitter.dots
        return TILE_TOKENS_F32 if "f32" in dots else TILE_TOKENS

    def options(self, warps: int) -> tuple[tuple[str, int], ...]:
        return (("num_warps", warps), *[("num_stages", 1)] * self.crowded)

    def shrink_warps(self) -> int:
        return TILE_WARPS

    def expand_warps(self) -> int:
        return TILE_WARPS

    def shrink_work(self, term: LowRankSpec) -> tuple[Work, int]:
        rows = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        body = [
            constant("BLOCK_R", rows.block),
            constant("BLOCK_K", self._cut_columns(term.dtype).block),
            *_rows(rows, "BLOCK_R", str(term.rank)),
            "a += first * K",
            "u += first",
            *self._product("a", term.dtype, rows, "BLOCK_R"),
            *store("u + tokens[:, None] * WIDTH + rows[None, :]", _scaled(term, "acc"), "f32", ok),
        ]
        return Work(f"BLOCK_R columns of u = s A x, {self.reach}: {{}}.", tuple(body)), rows.steps

    def mode_work(self, product: Product) -> tuple[Work, int]:
        outputs = product.mode.outputs
        rows = cut(outputs, _dividing(TILE_RANKS, outputs, [product.period]), DOT_MINIMUM)
        product_ = Emitter(product, rows, "BLOCK_N", self.spec.x, tiles=True).tile("acc", fresh=True)
        at = f"{plus('u', product.column or 0)} + tokens[:, None] * WIDTH + (first + rows)[None, :]"
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        body = [
            constant("BLOCK_N", rows.block),
            *_rows(rows, "BLOCK_N", str(outputs)),
            *_named("BLOCK_N", product_),
            *_TOKENS,
            *product_,
            *store(at, _rescaled(product, "acc"), "f32", ok),
        ]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(body)), rows.steps

    def expand_work(self, projection: ProjectionSpec, columns: Columns) -> tuple[Work, int]:
        p = projection
        periods = [ending.period for ending in columns.endings]
        rows = cut(p.n, _dividing(self.row_blocks, p.n, periods), DOT_MINIMUM)
        epilogue = self._epilogue(p, columns, rows)
        body = [
            constant("BLOCK_N", rows.block),
            constant("BLOCK_K", self._cut_columns(p.dtype).block),
            *_rows(rows, "BLOCK_N", "N"),
            *_named("BLOCK_N", epilogue),
            *_to_rows(p),
            *self._product("w", p.dtype, rows, "BLOCK_N", p if p.transposed else None),
            *epilogue,
        ]
        return Work(f"BLOCK_N rows of a y, {self.reach}: {{}}.", tuple(body)), rows.steps

    def _common(self, dtype: str) -> str:
        """Operands of one dtype meet in it (and sum in fp32), others in fp32, which holds every value of both."""
        return dtype if dtype == self.spec.x else "f32"

    def _cut_columns(self, dtype: str) -> Cut:
        """The steps over K of a product of x with a matrix of `dtype`."""
        blocks = TILE_COLUMNS[DTYPES[self._common(dtype)].itemsize]
        return cut(self.spec.k, blocks[self.crowded :], DOT_MINIMUM)

    def _product(
        self, matrix: str, dtype: str, rows: Cut, block: str, transposed: ProjectionSpec | None = None
    ) -> list[str]:
        """``acc[tokens, rows] = x matrixᵀ``, or x matrix where it is the weight of `transposed`."""
        common, cols = self._common(dtype), self._cut_columns(dtype)
        w = f"{matrix} + rows[None, :] * K + cols[:, None]"
        if transposed:
            w = f"{matrix} + {_row_of_w(transposed, self.spec.k, 'cols[:, None]')} + rows[None, :]"
        x_ok = ["token_ok[:, None]", cols.mask("col_ok[None, :]")]
        w_ok = [rows.mask("row_ok[None, :]"), cols.mask("col_ok[:, None]")]
        step = [
            *_columns(cols),
            *load("xs =", "x + tokens[:, None] * K + cols[None, :]", x_ok, self.spec.x, common),
            *load("ws =", w, w_ok, dtype, common),
            *dot("xs", "ws", common, accumulate=cols.steps > 1),
        ]
        return [
            *_TOKENS,
            *zeros(cols, f"(BLOCK_M, {block})"),
            *loop(cols, "for k in range(0, K, BLOCK_K)", step),
        ]

    def _epilogue(self, p: ProjectionSpec, columns: Columns, rows: Cut) -> list[str]:
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        at = "tokens[:, None] * N + rows[None, :]"
        lines: list[str] = []
        for j, (term, offset) in enumerate(_with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        for ending in columns.endings:
            emitter = Emitter(ending, rows, "BLOCK_N", self.spec.x, tiles=True)
            joins = emitter.dots and not ending.scaled
            part = "acc" if joins else f"part{ending.term}"
            lines += emitter.tile(part, fresh=not joins)
            lines += [] if joins else [f"acc += {_rescaled(ending, part)}"]
        if p.bias:
            lines += load("acc +=", "bias + rows", [rows.mask("row_ok")], p.bias, view="[None, :]")
        if p.residual:
            lines += load("acc +=", f"residual + {at}", ok, p.residual)
        return lines + store(f"y + {at}", "acc", p.out, ok)

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        common = _common_with_u(term)
        u = f"{plus('u', offset)} + tokens[:, None] * WIDTH + ranks{j}[None, :]"
        b = f"b{j} + {times('rows[None, :]', term.rank)} + ranks{j}[:, None]"
        u_ok = ["token_ok[:, None]", ranks.mask(f"rank{j}_ok[None, :]")]
        b_ok = [rows.mask("row_ok[None, :]"), ranks.mask(f"rank{j}_ok[:, None]")]
        step = [
            *_ranks(ranks, j),
            *load(f"us{j} =", u, u_ok, "f32", common),
            *load(f"bs{j} =", b, b_ok, term.dtype, common),
            *dot(f"us{j}", f"bs{j}", common, accumulate=True),
        ]
        return _rank_loop(ranks, step)


_TOKENS = ("tokens = tl.arange(0, BLOCK_M)", "token_ok = tokens < left")


def _common_with_u(term: LowRankSpec) -> str:
    """u may meet B in bf16, which has the range of fp32. In fp16 it could overflow where s is large."""
    return "bf16" if term.dtype == "bf16" else "f32"
