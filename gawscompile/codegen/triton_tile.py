"""The kernels of the plans for more tokens: those of a tile share each load of a weight.

``fused_tile``          tiles of y by `tl.dot`, whose epilogue adds bias, residual, B u and last mode products
``gemm_accumulate``     the vendor library's matmuls, then the same epilogue added to what they wrote
"""

from __future__ import annotations

import dataclasses

from gawscompile.codegen.triton_kernels import (
    Style,
    blocks_of_rows,
    dividing,
    given_columns,
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
from gawscompile.codegen.triton_modes import DOT_MINIMUM, TILE_COLUMNS, Emitter, Product
from gawscompile.codegen.triton_text import (
    Case,
    Cut,
    Kernel,
    Work,
    constant,
    cut,
    defining,
    dot,
    load,
    loop,
    plus,
    store,
    times,
    zeros,
)
from gawscompile.ir.spec import DTYPES, GivenSpec, KernelSpec, LowRankSpec, ProjectionSpec

TILE_ROWS = (64, 32, 16)
TILE_PROGRAMS = 128  # about one per multiprocessor of a large GPU; fewer rows per program where there are fewer
TILE_RANKS = (32, 16)
TILE_WARPS = 4
TILE_TOKENS = (16, 64)  # BLOCK_M for few tokens and for many
TILE_TOKENS_F32 = (16, 32)  # Triton 3.6 gives wider fp32 tiles to sm_100's tensor cores as tf32, against "ieee"
TILE_WORKS = 2  # kinds of work whose pipelines fit together into the shared memory of an sm_86 (99 KiB)

_TOKENS = ("tokens = tl.arange(0, BLOCK_M)", "token_ok = tokens < left")


class Tile(Style):
    """More tokens: a program makes a tile of BLOCK_M of them by some rows with `tl.dot`, which sums in fp32."""

    name = "tile"
    total = "acc"
    names = _TOKENS
    reach = "for BLOCK_M tokens of which `left` exist"
    token = ("token = tl.program_id(0).to(tl.int64) * BLOCK_M", "left = (m - token).to(tl.int32)")
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
        dots = [self._common(p.weight) for p in self.spec.projections]
        for _, _, term, _ in self.terms():
            dots += [self._common(term.dtype), _common_with_u(term)]
        dots += [_common_with_z(given) for p in self.spec.projections for given in p.given]
        for mine in self.columns:
            for product in mine.products:
                emitter = Emitter(product, cut(1, TILE_ROWS), "", self.spec.x, tiles=True)
                dots += [emitter.common] * emitter.dots
        return TILE_TOKENS_F32 if "f32" in dots else TILE_TOKENS

    def options(self, what: str) -> tuple[tuple[str, int], ...]:
        return (("num_warps", TILE_WARPS), *[("num_stages", 1)] * self.crowded)

    def choices(self, what: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        stages = (1, 2) if self.crowded else (2, 3, 4)
        return tuple((("num_warps", warps), ("num_stages", count)) for warps in (4, 8) for count in stages)

    def shrink_work(self, term: LowRankSpec) -> tuple[Work, int]:
        rows = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        body = [
            constant("BLOCK_R", rows.block),
            constant("BLOCK_K", self._cut_columns("a", term.dtype, rows).block),
            *row_range(rows, "BLOCK_R", str(term.rank)),
            *_TOKENS,
            "a += first * K",
            "u += first",
            *self._product("a", term.dtype, rows, "BLOCK_R"),
            *store("u + tokens[:, None] * WIDTH + rows[None, :]", scaled_term(term, "acc"), "f32", ok),
        ]
        return Work(f"BLOCK_R columns of u = s A x, {self.reach}: {{}}.", tuple(body)), rows.steps

    def mode_work(self, product: Product) -> tuple[Work, int]:
        outputs = product.mode.outputs
        rows = cut(outputs, dividing(TILE_RANKS, outputs, [product.period]), DOT_MINIMUM)
        product_ = Emitter(product, rows, "BLOCK_N", self.spec.x, tiles=True).tile("acc", fresh=True)
        at = f"{plus('u', product.column or 0)} + tokens[:, None] * WIDTH + (first + rows)[None, :]"
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        body = [*product_, *store(at, rescaled(product, "acc"), "f32", ok)]
        names = [*row_range(rows, "BLOCK_N", str(outputs)), *row_names("BLOCK_N"), *_TOKENS]
        body = [constant("BLOCK_N", rows.block), *defining(names, body)]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(body)), rows.steps

    def cut_rows(self, n: int, transposed: bool, periods: list[int]) -> Cut:
        return cut(n, dividing(self.row_blocks, n, periods), DOT_MINIMUM)

    def multiply(self, i: int, rows: Cut) -> list[str]:
        p = self.spec.projections[i]
        return [
            constant("BLOCK_K", self._cut_columns("w", p.weight, rows).block),
            f"w += {'first' if p.transposed else 'first * K'}",
            *self._product("w", p.weight, rows, "BLOCK_N", p if p.transposed else None),
        ]

    def store(self, value: str, dtype: str, rows: Cut) -> list[str]:
        value = f"({value})" if " " in value and dtype != "f32" else value
        return store("y + tokens[:, None] * N + rows[None, :]", value, dtype, _ok(rows))

    def _common(self, dtype: str) -> str:
        """Operands of one dtype meet in it (and sum in fp32), others in fp32, which holds every value of both."""
        return dtype if dtype == self.spec.x else "f32"

    def _cut_columns(self, matrix: str, dtype: str, rows: Cut) -> Cut:
        """The steps over K of a product of x with `rows` of a `matrix` of `dtype`."""
        blocks = TILE_COLUMNS[DTYPES[self._common(dtype)].itemsize]
        if matrix == "w" and rows.block == TILE_ROWS[-1]:  # longer, so that each thread has 16 bytes of them to load
            blocks = (2 * blocks[0], *blocks)
        return cut(self.spec.k, blocks[self.crowded :], DOT_MINIMUM)

    def _product(
        self, matrix: str, dtype: str, rows: Cut, block: str, transposed: ProjectionSpec | None = None
    ) -> list[str]:
        """``acc[tokens, rows] = x matrixᵀ``, or x matrix where it is the weight of `transposed`."""
        common, cols = self._common(dtype), self._cut_columns(matrix, dtype, rows)
        w = f"{matrix} + rows[None, :] * K + cols[:, None]"
        if transposed:
            w = f"{matrix} + {row_of_w(transposed, self.spec.k, 'cols[:, None]')} + rows[None, :]"
        x_ok = ["token_ok[:, None]", cols.mask("col_ok[None, :]")]
        w_ok = [rows.mask("row_ok[None, :]"), cols.mask("col_ok[:, None]")]
        step = [
            *k_columns(cols),
            *load("xs =", "x + tokens[:, None] * K + cols[None, :]", x_ok, self.spec.x, common),
            *load("ws =", w, w_ok, dtype, common),
            *dot("xs", "ws", common, accumulate=cols.steps > 1),
        ]
        return [
            *zeros(cols, f"(BLOCK_M, {block})"),
            *loop(cols, "for k in range(0, K, BLOCK_K)", step),
        ]

    def epilogue(self, i: int, rows: Cut) -> list[str]:
        p, columns = self.spec.projections[i], self.columns[i]
        lines = to_rows(p)
        for j, (term, offset) in enumerate(with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        for j, given in enumerate(p.given):
            lines += self._add_given(j, given, rows)
        for ending in columns.endings:
            emitter = Emitter(ending, rows, "BLOCK_N", self.spec.x, tiles=True)
            joins = emitter.dots and not ending.scaled
            part = "acc" if joins else f"part{ending.term}"
            lines += emitter.tile(part, fresh=not joins)
            lines += [] if joins else [f"acc += {rescaled(ending, part)}"]
        if p.rowscale:
            lines += load("acc *=", "rowscale + rows", [rows.mask("row_ok")], p.rowscale, view="[None, :]")
        if p.bias:
            lines += load("acc +=", "bias + rows", [rows.mask("row_ok")], p.bias, view="[None, :]")
        if p.residual:
            lines += load("acc +=", "residual + tokens[:, None] * N + rows[None, :]", _ok(rows), p.residual)
        return lines

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        common = _common_with_u(term)
        u = f"{plus('u', offset)} + tokens[:, None] * WIDTH + ranks{j}[None, :]"
        b = f"b{j} + {times('rows[None, :]', term.rank)} + ranks{j}[:, None]"
        u_ok = ["token_ok[:, None]", ranks.mask(f"rank{j}_ok[None, :]")]
        b_ok = [rows.mask("row_ok[None, :]"), ranks.mask(f"rank{j}_ok[:, None]")]
        step = [
            *rank_columns(ranks, j),
            *load(f"us{j} =", u, u_ok, "f32", common),
            *load(f"bs{j} =", b, b_ok, term.dtype, common),
            *dot(f"us{j}", f"bs{j}", common, accumulate=True),
        ]
        return rank_loop(ranks, step)


    def _add_given(self, j: int, given: GivenSpec, rows: Cut) -> list[str]:
        ranks = cut(given.rank, TILE_RANKS, DOT_MINIMUM)
        common = _common_with_z(given)
        z = f"z{j} + {times('tokens[:, None]', given.rank)} + given{j}[None, :]"
        c = f"c{j} + {times('rows[None, :]', given.rank)} + given{j}[:, None]"
        z_ok = ["token_ok[:, None]", ranks.mask(f"given{j}_ok[None, :]")]
        c_ok = [rows.mask("row_ok[None, :]"), ranks.mask(f"given{j}_ok[:, None]")]
        step = [
            *given_columns(ranks, j),
            *load(f"zs{j} =", z, z_ok, given.z, common),
            *load(f"cs{j} =", c, c_ok, given.dtype, common),
            *dot(f"zs{j}", f"cs{j}", common, accumulate=True),
        ]
        return rank_loop(ranks, step)


class Accumulate(Tile):
    """What is to be added to the products that the vendor library has written to every y."""

    does = "Added to BLOCK_N rows of a y"
    expanded = ("bias", "residual", "rowscale", "b", "c", "z")
    reads_y = True

    def kernels(self) -> list[Kernel]:
        return [dataclasses.replace(k, name=k.name.replace("expand", "accumulate")) for k in super().kernels()]

    def expands(self) -> list[Case]:
        if self.spec.swiglu:
            return [self.gated()]
        adds = (bool(p.bias or p.residual or p.adapted) for p in self.spec.projections)
        return [self.expand(i) for i, adds_ in enumerate(adds) if adds_]

    def multiply(self, i: int, rows: Cut) -> list[str]:
        p = self.spec.projections[i]
        return load("acc =", "y + tokens[:, None] * N + rows[None, :]", _ok(rows), p.out)


def _ok(rows: Cut) -> list[str]:
    """The mask of a tile of y."""
    return ["token_ok[:, None]", rows.mask("row_ok[None, :]")]


def _common_with_u(term: LowRankSpec) -> str:
    """u may meet B in bf16, which has the range of fp32. In fp16 it could overflow where s is large."""
    return "bf16" if term.dtype == "bf16" else "f32"


def _common_with_z(given: GivenSpec) -> str:
    """Operands of one dtype meet in it, others in fp32."""
    return given.dtype if given.dtype == given.z else "f32"
