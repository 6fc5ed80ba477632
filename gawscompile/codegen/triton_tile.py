"""The kernels of the plans for more tokens: those of a tile share each load of a weight.

``fused_tile``          tiles of y by `tl.dot`, whose epilogue adds bias, residual, B u and last mode products
``gemm_accumulate``     the vendor library's matmuls, then the same epilogue added to what they wrote
"""

from __future__ import annotations

import functools
import operator

from gawscompile.codegen import triton_bank_modes as bank_modes
from gawscompile.codegen import triton_banks as banks
from gawscompile.codegen import triton_packed as packed
from gawscompile.codegen.triton_cases import Case, Work
from gawscompile.codegen.triton_kernels import (
    Narrow,
    Style,
    blocks_of_rows,
    dividing,
    k_columns,
    row_of_w,
    row_range,
)
from gawscompile.codegen.triton_modes import DOT_MINIMUM, TILE_COLUMNS, Emitter, Product, common
from gawscompile.codegen.triton_text import Code, Cut, cut, fn, scaled, shape, store, v, when
from gawscompile.ir.banked import BLOCK
from gawscompile.ir.operators import Banked, LowRank
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import DTYPES

TILE_ROWS = (64, 32, 16)
TILE_PROGRAMS = 128  # about one per multiprocessor of a large GPU; fewer rows per program where there are fewer
TILE_RANKS = (32, 16)
TILE_WARPS = 4
TILE_TOKENS = (16, 64)  # BLOCK_M for few tokens and for many
TILE_TOKENS_F32 = (16, 32)  # Triton 3.6 gives wider fp32 tiles to sm_100's tensor cores as tf32, against "ieee"
TILE_WORKS = 2  # kinds of work whose pipelines fit together into the shared memory of an sm_86 (99 KiB)

_TOKENS = ((v.tokens, fn("tl.arange", 0, v.BLOCK_M)), (v.token_ok, v.tokens < v.left))


class Tile(Style):
    """More tokens: a program makes a tile of BLOCK_M of them by some rows with `tl.dot`, which sums in fp32."""

    name = "tile"
    total = v.acc
    names = _TOKENS
    reach = "for BLOCK_M tokens of which `left` exist"
    token = ((v.token, fn("tl.program_id", 0).to("i64") * v.BLOCK_M), (v.left, (v.m - v.token).to("i32")))
    passed = ("token", "left", "BLOCK_M")
    extra = (("m", "i32"), ("BLOCK_M", "constexpr"))

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        rows = sum(p.n for p in spec.projections)
        most = next((block for block in TILE_ROWS if rows >= block * TILE_PROGRAMS), TILE_ROWS[-1])
        self.row_blocks = blocks_of_rows(spec, TILE_ROWS, most)
        self.crowded = False
        # Triton adds up the shared memory of branches, and each kind of work is one.
        self.crowded = max((len(kernel.groups()) for kernel in self.kernels()), default=0) > TILE_WORKS

    def tokens(self) -> tuple[int, int]:
        """BLOCK_M for few tokens and for many."""
        dots = [self.spec.x if p.packed else common(p.weight.dtype, self.spec.x) for p in self.spec.projections]
        dots += [common(term.dtype, self.spec.x) for _, _, term, _ in self.terms()]
        for _, bank, _ in self.banks():
            dots += [common(bank.dtype, self.spec.x), common(bank.dtype, "f32", of_u=True)]
        dots += [n.common for p in self.spec.projections for n in (*self.low_rank(p), *self.given(p))]
        for mine in self.columns:
            for product in mine.products:
                emitter = Emitter(product, cut(1, TILE_ROWS), self.spec.x, tiles=True)
                dots += [emitter.common] * emitter.dots
        return TILE_TOKENS_F32 if "f32" in dots else TILE_TOKENS

    def options(self, what: str) -> tuple[tuple[str, int], ...]:
        return (("num_warps", TILE_WARPS), *[("num_stages", 1)] * self.crowded)

    def choices(self, what: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        stages = (1, 2) if self.crowded else (2, 3, 4)
        return tuple((("num_warps", warps), ("num_stages", count)) for warps in (4, 8) for count in stages)

    def shrink_work(self, term: LowRank) -> tuple[Work, int]:
        rows = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        body = [
            v.BLOCK_R.constant(rows.block),
            v.BLOCK_K.constant(self._cut_columns("a", term.dtype, rows).block),
            *(name.let(value) for name, value in (*row_range(rows, v.BLOCK_R, term.rank), *_TOKENS)),
            v.a.let(v.first * v.K, "+="),
            v.u.let(v.first, "+="),
            *self._product(v.a, term.dtype, rows, v.BLOCK_R),
            *store(v.u + v.tokens[:, None] * v.WIDTH + v.rows[None, :], scaled(term, v.scale, v.acc), "f32", _ok(rows)),
        ]
        return Work(f"BLOCK_R columns of u = s A x, {self.reach}: {{}}.", tuple(body)), rows.steps

    def bank_work(self, term: Banked) -> tuple[Work, int]:
        rows = banks.RANKS
        step = [
            v.a.let(banks.factor(v.block, 0)),
            *self._product(v.a, term.dtype, rows, v.BLOCK_R, whole=v.from_x),
            *banks.columns(v.block, v.rows[None, :], v.acc),
            *store(v.u + v.tokens[:, None] * v.WIDTH + v.rows[None, :], v.found, "f32", [v.mine[:, None]]),
        ]
        mine = functools.reduce(operator.and_, [v.block < v.count, *banks.has_ranks(term, v.block)])
        kinds = banks.each_kind(term, when(mine, step))
        body = [
            v.BLOCK_R.constant(BLOCK),
            v.BLOCK_K.constant(self._cut_columns("a", term.dtype, rows).block),
            *(name.let(value) for name, value in (*row_range(rows, v.BLOCK_R, BLOCK)[:1], *_TOKENS)),
            v.from_x.let(v.x + fn("tl.minimum", v.tokens, v.left - 1)[:, None] * v.K),
            v.u.let(v.block * BLOCK, "+="),
            *banks.rows_of_tile(term),
            *kinds,
        ]
        return Work(f"Columns of u by a bank's schedule, {self.reach}: {{}}.", tuple(body)), term.width or 0

    def chain_work(self, term: Banked, stage: int) -> Work:
        steps = bank_modes.stage_of_tile(term, stage, self.spec.k, self.spec.x)
        body = [*(name.let(value) for name, value in _TOKENS), *steps]
        return Work(f"What modes make for the next ones of their chains, {self.reach}: {{}}.", tuple(body))

    def mode_work(self, product: Product) -> tuple[Work, int]:
        outputs = product.mode.outputs
        rows = cut(outputs, dividing(TILE_RANKS, outputs, [product.period]), DOT_MINIMUM)
        at = v.u + (product.column or 0) + v.tokens[:, None] * v.WIDTH + (v.first + v.rows)[None, :]
        body = [
            *Emitter(product, rows, self.spec.x, tiles=True).tile(v.acc, fresh=True),
            *store(at, product.rescaled(v.acc), "f32", _ok(rows)),
        ]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(self.framed(body, rows, outputs))), rows.steps

    def cut_rows(self, n: int, transposed: bool, periods: list[int]) -> Cut:
        return cut(n, dividing(self.row_blocks, n, periods), DOT_MINIMUM)

    def multiply(self, i: int, rows: Cut) -> list[Code]:
        p = self.spec.projections[i]
        if p.packed:
            cols = packed.columns_of_tile(p.packed, self._blocks_of_columns("w", self.spec.x, rows))
            return packed.tile(p.packed, rows, cols, self.spec.x)
        return [
            v.BLOCK_K.constant(self._cut_columns("w", p.weight.dtype, rows).block),
            v.w.let(v.first if p.transposed else v.first * v.K, "+="),
            *self._product(v.w, p.weight.dtype, rows, v.BLOCK_N, p if p.transposed else None),
        ]

    def store(self, value: Code, dtype: str, rows: Cut) -> list[Code]:
        return store(_at(v.y), value, dtype, _ok(rows))

    def _cut_columns(self, matrix: str, dtype: str, rows: Cut) -> Cut:
        """The steps over K of a product of x with `rows` of a `matrix` of `dtype`."""
        return cut(self.spec.k, self._blocks_of_columns(matrix, dtype, rows), DOT_MINIMUM)

    def _blocks_of_columns(self, matrix: str, dtype: str, rows: Cut) -> tuple[int, ...]:
        """How long they may be."""
        blocks: tuple[int, ...] = TILE_COLUMNS[DTYPES[common(dtype, self.spec.x)].itemsize]
        if matrix == "w" and rows.block == TILE_ROWS[-1]:  # longer, so that each thread has 16 bytes of them to load
            blocks = (2 * blocks[0], *blocks)
        return blocks[self.crowded :]

    def _product(
        self,
        matrix: Code,
        dtype: str,
        rows: Cut,
        block: Code,
        transposed: Sum | None = None,
        whole: Code | None = None,
    ) -> list[Code]:
        """``acc[tokens, rows] = x matrixᵀ``, or x matrix where it is the weight of `transposed`. `whole`: where each
        token's x begins, if all can be read."""
        meet, cols = common(dtype, self.spec.x), self._cut_columns(matrix.text, dtype, rows)
        w = matrix + v.rows[None, :] * v.K + v.cols[:, None]
        if transposed:
            w = matrix + row_of_w(transposed, self.spec.k) + v.rows[None, :]
        x_ok = [None if whole else v.token_ok[:, None], cols.mask(v.col_ok[None, :])]
        x = whole or v.x + v.tokens[:, None] * v.K
        w_ok = [rows.mask(v.row_ok[None, :]), cols.mask(v.col_ok[:, None])]
        step = [
            *k_columns(cols),
            *v.xs.load(x + v.cols[None, :], x_ok, self.spec.x, meet),
            *v.ws.load(w, w_ok, dtype, meet),
            *v.acc.dot(v.xs, v.ws, meet, accumulate=cols.steps > 1),
        ]
        return [
            *[v.acc.zeros(shape(v.BLOCK_M, block))] * (cols.steps > 1),
            *cols.loop(v.k, fn("range", 0, v.K, v.BLOCK_K), step),
        ]

    def epilogue(self, i: int, rows: Cut) -> list[Code]:
        p, row_ok = self.spec.projections[i], [rows.mask(v.row_ok)]
        lines = []
        if p.banked:  # what it scales is W x alone
            meet = common(p.banked.dtype, "f32", of_u=True)
            modes = bank_modes.add_to_tile(p.banked, p.rank, self.spec.x, row_ok[0])
            lines += banks.add_tile(p.banked, p.rank, meet, row_ok[0], modes)
        lines += self.to_rows(p)
        for narrow in (*self.low_rank(p), *self.given(p)):
            lines += self._add(narrow, rows)
        for ending in self.columns[i].endings:
            emitter = Emitter(ending, rows, self.spec.x, tiles=True)
            joins = emitter.dots and not ending.scaled
            sums = v.acc if joins else v[f"part{ending.term}"]
            lines += emitter.tile(sums, fresh=not joins)
            lines += [] if joins else [v.acc.let(ending.rescaled(sums), "+=")]
        if p.rowscale:
            lines += v.acc.load(v.rowscale + v.rows, row_ok, p.rowscale.dtype, view="[None, :]", sign="*=")
        if p.bias:
            lines += v.acc.load(v.bias + v.rows, row_ok, p.bias.dtype, view="[None, :]", sign="+=")
        if p.residual:
            lines += v.acc.load(_at(v.residual), _ok(rows), p.residual.dtype, sign="+=")
        return lines

    def _add(self, narrow: Narrow, rows: Cut) -> list[Code]:
        ranks = cut(narrow.rank, TILE_RANKS, DOT_MINIMUM)
        vector = narrow.vector + v.tokens[:, None] * narrow.stride + narrow.columns[None, :]
        matrix = narrow.matrix + v.rows[None, :] * narrow.rank + narrow.columns[:, None]
        vector_ok = [v.token_ok[:, None], ranks.mask(narrow.ok[None, :])]
        matrix_ok = [rows.mask(v.row_ok[None, :]), ranks.mask(narrow.ok[:, None])]
        step = [
            *narrow.vectors.load(vector, vector_ok, narrow.has, narrow.common),
            *narrow.factors.load(matrix, matrix_ok, narrow.dtype, narrow.common),
            *v.acc.dot(narrow.vectors, narrow.factors, narrow.common, accumulate=True),
        ]
        return narrow.loop(ranks, step)


class Accumulate(Tile):
    """What is to be added to the products that the vendor library has written to every y."""

    uses_library = True
    expanding = "accumulate"
    does = "Added to BLOCK_N rows of a y"
    expanded = ("rows",)
    reads_y = True

    def expands(self) -> list[Case]:
        if self.spec.swiglu:
            return [self.gated()]
        adds = (not p.plain for p in self.spec.projections)
        return [self.expand(i) for i, adds_ in enumerate(adds) if adds_]

    def multiply(self, i: int, rows: Cut) -> list[Code]:
        return v.acc.load(_at(v.y), _ok(rows), self.spec.projections[i].out)


def _at(tensor: Code) -> Code:
    """A tile of y, or of a `tensor` of its shape."""
    return tensor + v.tokens[:, None] * v.N + v.rows[None, :]


def _ok(rows: Cut) -> list[Code | None]:
    """The mask of such a tile."""
    return [v.token_ok[:, None], rows.mask(v.row_ok[None, :])]
