"""The kernels for few tokens, where memory is the bound."""

from __future__ import annotations

from gawscompile.codegen.spec import KernelSpec, LowRankSpec, ProjectionSpec
from gawscompile.codegen.triton_kernels import (
    Style,
    blocks_of_rows,
    dividing,
    k_columns,
    rank_columns,
    rank_loop,
    rescaled,
    row_names,
    row_of_w,
    row_range,
    scaled_term,
    to_rows,
    with_offsets,
)
from gawscompile.codegen.triton_modes import Columns, Emitter, Product
from gawscompile.codegen.triton_text import Cut, Work, constant, cut, load, loop, plus, store, times, zeros

GEMV_ROWS = (32, 16, 8, 4)  # rows of W per program
GEMV_TRANSPOSED = 16  # the least of a weight kept as [k, n], whose rows then fill 32-byte sectors
GEMV_PROGRAMS = 256  # about two per multiprocessor of a large GPU; fewer rows per program where there are fewer
GEMV_ELEMENTS = 4096  # of W per program and step: 8 or 16 KiB in flight
GEMV_UNROLLED = 128  # elements per thread that unrolled steps may keep in flight; beyond, registers run out
GEMV_COLUMNS = (1024, 512, 256, 128, 64)  # of A, or of W, per step
GEMV_RANKS = (64, 32, 16, 8)


class Gemv(Style):
    """Few tokens: a program takes one of them and a few rows, multiplies elementwise in fp32 and sums at the end."""

    name = "gemv"
    reach = "for one token"
    token = ("token = tl.program_id(0).to(tl.int64)",)  # the fast axis, so tokens share rows while these are in L2

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.row_blocks = blocks_of_rows(spec, GEMV_ROWS, GEMV_PROGRAMS)
        self.shrink_columns = cut(spec.k, GEMV_COLUMNS)

    def shrink_warps(self) -> int:
        return _warps(GEMV_ELEMENTS if self.written else self.shrink_columns.block)

    def expand_warps(self) -> int:
        blocks = [self._cut_rows(p, mine).block for p, mine in zip(self.spec.projections, self.columns, strict=True)]
        return _warps(max(self._cut_columns(block).block * block for block in blocks))

    def _cut_rows(self, p: ProjectionSpec, columns: Columns) -> Cut:
        blocks = tuple(block for block in GEMV_ROWS if block >= GEMV_TRANSPOSED) if p.transposed else self.row_blocks
        return cut(p.n, dividing(blocks, p.n, [ending.period for ending in columns.endings]))

    def _cut_columns(self, rows: int) -> Cut:
        return cut(self.spec.k, [block for block in GEMV_COLUMNS if block <= GEMV_ELEMENTS // rows])

    def shrink_work(self, term: LowRankSpec) -> tuple[Work, int]:
        cols = self.shrink_columns
        ok = [cols.mask("col_ok")]
        step = [
            *k_columns(cols),
            *load("xs =", "x + cols", ok, self.spec.x),
            *load("row =", "a + cols", ok, term.dtype),
            f"acc {'+=' if cols.steps > 1 else '='} row * xs",
        ]
        body = [
            constant("BLOCK_K", cols.block),
            "a += block.to(tl.int64) * K",
            *zeros(cols, "(BLOCK_K,)"),
            *loop(cols, _unrolled(cols, cols.block, self.shrink_warps()), step),
            *store("u + block", scaled_term(term, "tl.sum(acc)"), "f32"),
        ]
        return Work(f"One column of u = s A x, {self.reach}: {{}}.", tuple(body)), term.rank

    def mode_work(self, product: Product) -> tuple[Work, int]:
        blocks = dividing(GEMV_ROWS, product.mode.outputs, [product.period])
        few = tuple(block for block in blocks if product.mode.outputs >= block * GEMV_PROGRAMS) or blocks[-1:]
        rows = cut(product.mode.outputs, few)
        product_ = Emitter(product, rows, "BLOCK_N", self.spec.x).gemv()
        body = [
            constant("BLOCK_N", rows.block),
            *row_range(rows, "BLOCK_N", str(product.mode.outputs)),
            *row_names("BLOCK_N", product_),
            *product_,
            *store(
                f"{plus('u', product.column or 0)} + first + rows",
                rescaled(product, f"tl.sum(part{product.term}, axis=1)"),
                "f32",
                [rows.mask("row_ok")],
            ),
        ]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(body)), rows.steps

    def expand_work(self, projection: ProjectionSpec, columns: Columns) -> tuple[Work, int]:
        p, rows = projection, self._cut_rows(projection, columns)
        cols = self._cut_columns(rows.block)
        if p.transposed:
            shape = "(BLOCK_K, BLOCK_N)"
            w = f"w + {row_of_w(p, self.spec.k, 'cols[:, None]')} + rows[None, :]"
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
            *k_columns(cols),
            *xs,
            *load("ws =", w, ok, p.dtype),
            f"acc {'+=' if cols.steps > 1 else '='} ws * xs",
        ]
        epilogue = self._epilogue(p, columns, rows)
        body = [
            constant("BLOCK_N", rows.block),
            constant("BLOCK_K", cols.block),
            *row_range(rows, "BLOCK_N", "N"),
            *row_names("BLOCK_N", epilogue),
            *to_rows(p),
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
        for j, (term, offset) in enumerate(with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        for ending in columns.endings:
            lines += Emitter(ending, rows, "BLOCK_N", self.spec.x).gemv()
            lines.append("out += " + rescaled(ending, f"tl.sum(part{ending.term}, axis=1)"))
        return lines + store("y + rows", "out", p.out, ok)

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, GEMV_RANKS)
        u = f"{plus('u', offset)} + ranks{j}"
        b = f"b{j} + {times('rows[:, None]', term.rank)} + ranks{j}[None, :]"
        b_ok = [rows.mask("row_ok[:, None]"), ranks.mask(f"rank{j}_ok[None, :]")]
        step = [
            *rank_columns(ranks, j),
            *load(f"us{j} =", u, [ranks.mask(f"rank{j}_ok")], "f32"),
            *load(f"bs{j} =", b, b_ok, term.dtype),
            f"out += tl.sum(bs{j} * us{j}[None, :], axis=1)",
        ]
        return rank_loop(ranks, step)


def _warps(elements: int) -> int:
    """Warps of a gemv program: 16 elements or more per thread and step, at most four warps."""
    return min(4, max(1, elements // 512))


def _unrolled(cols: Cut, elements: int, warps: int) -> str:
    """The loop over K for steps of `elements`, unrolled so that several loads of a thread are in flight."""
    factor = max(1, GEMV_UNROLLED * 32 * warps // elements)
    if cols.steps <= factor:
        return "for k in tl.static_range(0, K, BLOCK_K)"
    return f"for k in tl.range(0, K, BLOCK_K, loop_unroll_factor={factor})"
