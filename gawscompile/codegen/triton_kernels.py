"""The kernels of the `two_launch` plan; `triton` puts them into a module.

`Style` is what the two pairs of kernels have in common, `Gemv` and `Tile` are the pairs. Block sizes follow from
the shapes by rules of thumb and were not tuned on a device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from gawscompile.codegen.spec import DTYPES, KernelSpec, LowRankSpec, Operand, ProjectionSpec
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
    store,
    times,
    zeros,
)

GEMV_ROWS = (32, 16, 8, 4)  # rows of W per program
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
        self.rank = sum(p.rank for p in spec.projections)

    def kernels(self) -> list[Kernel]:
        return [*([self.shrink()] if self.rank else []), self.expand()]

    def shrink(self) -> Kernel:
        """u = s A x for every low-rank term."""
        cases = []
        for i, j, term, offset in terms(self.spec):
            mine = [o for o in self.spec.operands() if (o.projection, o.term) == (i, j) and o.role != "b"]
            work, programs = self.shrink_work(term)
            cases.append(Case(f"A{i}_{j}", work, tuple(map(_tensor, mine)), programs, offset))
        return self._kernel("shrink", "Every column of u = s A x", cases, self.shrink_warps())

    def expand(self) -> Kernel:
        """The rows of every W, with bias, residual and B u as their epilogue."""
        cases = []
        offset = 0
        for i, p in enumerate(self.spec.projections):
            mine = [o for o in self.spec.operands() if o.projection == i and o.role not in ("a", "scale")]
            work, programs = self.expand_work(p)
            tensors = (*map(_tensor, mine), Tensor("y", f"y{i}", p.out))
            cases.append(Case(f"y{i}", work, tensors, programs, offset if p.lowrank else 0, p.n))
            offset += p.rank
        return self._kernel("expand", "The rows of every y", cases, self.expand_warps())

    def options(self, warps: int) -> tuple[tuple[str, int], ...]:
        """What the host passes to Triton."""
        return (("num_warps", warps),)

    def _kernel(self, what: str, doc: str, cases: list[Case], warps: int) -> Kernel:
        moves = ["x += token * K"] + ["u += token * RANKS"] * bool(self.rank)
        return Kernel(
            name=f"{what}_{self.name}",
            doc=f"{doc}, {self.reach}.",
            shared=(Tensor("x", "x", self.spec.x), *[Tensor("u", "u", "f32")] * bool(self.rank)),
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
    def expand_work(self, projection: ProjectionSpec) -> tuple[Work, int]:
        """What a program does for `projection`, and the number of programs."""

    @abstractmethod
    def shrink_warps(self) -> int:
        """Warps of a shrinking program."""

    @abstractmethod
    def expand_warps(self) -> int:
        """Warps of an expanding program."""


def _tensor(operand: Operand) -> Tensor:
    return Tensor(f"b{operand.term}" if operand.role == "b" else _ROLES[operand.role], operand.name, operand.dtype)


_ROLES = {"weight": "w", "bias": "bias", "residual": "residual", "a": "a", "scale": "scale"}


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
        "w += first * K",
        *["bias += first"] * bool(p.bias),
        *["residual += token * N + first"] * bool(p.residual),
        *(f"b{j} += {times('first', term.rank)}" for j, term in enumerate(p.lowrank)),
        "y += token * N + first",
    ]


def _scaled(term: LowRankSpec, value: str) -> str:
    if term.scale is None:
        cast = ".to(tl.float32)" if term.scale_dtype != "f32" else ""
        return f"tl.load(scale){cast} * {value}"
    if not math.isfinite(term.scale):  # its repr is no expression
        return f'float("{term.scale}") * {value}'
    return value if term.scale == 1.0 else f"{term.scale!r} * {value}"


class Gemv(Style):
    """Few tokens: a program takes one of them and a few rows, multiplies elementwise in fp32 and sums at the end."""

    name = "gemv"
    reach = "for one token"
    token = ("token = tl.program_id(0).to(tl.int64)",)  # the fast axis, so tokens share rows while these are in L2

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.row_blocks = _row_blocks(spec, GEMV_ROWS, GEMV_PROGRAMS)
        widest = GEMV_ELEMENTS // self.row_blocks[0]
        self.columns = cut(spec.k, [block for block in GEMV_COLUMNS if block <= widest])
        self.shrink_columns = cut(spec.k, GEMV_COLUMNS)

    def shrink_warps(self) -> int:
        return _warps(self.shrink_columns.block)

    def expand_warps(self) -> int:
        return _warps(self.columns.block * self.row_blocks[0])

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

    def expand_work(self, projection: ProjectionSpec) -> tuple[Work, int]:
        p, cols, rows = projection, self.columns, cut(projection.n, self.row_blocks)
        # A row of x, loaded once and broadcast, would change its layout in shared memory: two barriers a step.
        x = "tl.broadcast_to(x + cols[None, :], (BLOCK_N, BLOCK_K))"
        w_ok = [rows.mask("row_ok[:, None]"), cols.mask("col_ok[None, :]")]
        step = [
            *_columns(cols),
            *load("xs =", x, [cols.mask("col_ok[None, :]")], self.spec.x),
            *load("ws =", "w + rows[:, None] * K + cols[None, :]", w_ok, p.dtype),
            f"acc {'+=' if cols.steps > 1 else '='} ws * xs",
        ]
        body = [
            constant("BLOCK_N", rows.block),
            constant("BLOCK_K", cols.block),
            *_rows(rows, "BLOCK_N", "N"),
            *_to_rows(p),
            *zeros(cols, "(BLOCK_N, BLOCK_K)"),
            *loop(cols, _unrolled(cols, cols.block * rows.block, self.expand_warps()), step),
            "out = tl.sum(acc, axis=1)",
            *self._epilogue(p, rows),
        ]
        return Work(f"BLOCK_N rows of a y, {self.reach}: {{}}.", tuple(body)), rows.steps

    def _epilogue(self, p: ProjectionSpec, rows: Cut) -> list[str]:
        ok = [rows.mask("row_ok")]
        lines: list[str] = []
        if p.bias:
            lines += load("out +=", "bias + rows", ok, p.bias)
        if p.residual:
            lines += load("out +=", "residual + rows", ok, p.residual)
        for j, (term, offset) in enumerate(_with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
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
            *store("u + tokens[:, None] * RANKS + rows[None, :]", _scaled(term, "acc"), "f32", ok),
        ]
        return Work(f"BLOCK_R columns of u = s A x, {self.reach}: {{}}.", tuple(body)), rows.steps

    def expand_work(self, projection: ProjectionSpec) -> tuple[Work, int]:
        p, rows = projection, cut(projection.n, self.row_blocks, DOT_MINIMUM)
        body = [
            constant("BLOCK_N", rows.block),
            constant("BLOCK_K", self._cut_columns(p.dtype).block),
            *_rows(rows, "BLOCK_N", "N"),
            *_to_rows(p),
            *self._product("w", p.dtype, rows, "BLOCK_N"),
            *self._epilogue(p, rows),
        ]
        return Work(f"BLOCK_N rows of a y, {self.reach}: {{}}.", tuple(body)), rows.steps

    def _common(self, dtype: str) -> str:
        """Operands of one dtype meet in it (and sum in fp32), others in fp32, which holds every value of both."""
        return dtype if dtype == self.spec.x else "f32"

    def _cut_columns(self, dtype: str) -> Cut:
        """The steps over K of a product of x with a matrix of `dtype`."""
        blocks = TILE_COLUMNS[DTYPES[self._common(dtype)].itemsize]
        return cut(self.spec.k, blocks[self.crowded :], DOT_MINIMUM)

    def _product(self, matrix: str, dtype: str, rows: Cut, block: str) -> list[str]:
        """``acc[tokens, rows] = x matrixᵀ``."""
        common, cols = self._common(dtype), self._cut_columns(dtype)
        w = f"{matrix} + rows[None, :] * K + cols[:, None]"
        x_ok = ["token_ok[:, None]", cols.mask("col_ok[None, :]")]
        w_ok = [rows.mask("row_ok[None, :]"), cols.mask("col_ok[:, None]")]
        step = [
            *_columns(cols),
            *load("xs =", "x + tokens[:, None] * K + cols[None, :]", x_ok, self.spec.x, common),
            *load("ws =", w, w_ok, dtype, common),
            dot("xs", "ws", common, accumulate=cols.steps > 1),
        ]
        return [
            "tokens = tl.arange(0, BLOCK_M)",
            "token_ok = tokens < left",
            *zeros(cols, f"(BLOCK_M, {block})"),
            *loop(cols, "for k in range(0, K, BLOCK_K)", step),
        ]

    def _epilogue(self, p: ProjectionSpec, rows: Cut) -> list[str]:
        ok = ["token_ok[:, None]", rows.mask("row_ok[None, :]")]
        at = "tokens[:, None] * N + rows[None, :]"
        lines: list[str] = []
        for j, (term, offset) in enumerate(_with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        if p.bias:
            lines += load("acc +=", "bias + rows", [rows.mask("row_ok")], p.bias, view="[None, :]")
        if p.residual:
            lines += load("acc +=", f"residual + {at}", ok, p.residual)
        return lines + store(f"y + {at}", "acc", p.out, ok)

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, TILE_RANKS, DOT_MINIMUM)
        common = _common_with_u(term)
        u = f"{plus('u', offset)} + tokens[:, None] * RANKS + ranks{j}[None, :]"
        b = f"b{j} + {times('rows[None, :]', term.rank)} + ranks{j}[:, None]"
        u_ok = ["token_ok[:, None]", ranks.mask(f"rank{j}_ok[None, :]")]
        b_ok = [rows.mask("row_ok[None, :]"), ranks.mask(f"rank{j}_ok[:, None]")]
        step = [
            *_ranks(ranks, j),
            *load(f"us{j} =", u, u_ok, "f32", common),
            *load(f"bs{j} =", b, b_ok, term.dtype, common),
            dot(f"us{j}", f"bs{j}", common, accumulate=True),
        ]
        return _rank_loop(ranks, step)


def _common_with_u(term: LowRankSpec) -> str:
    """u may meet B in bf16, which has the range of fp32. In fp16 it could overflow where s is large."""
    return "bf16" if term.dtype == "bf16" else "f32"
