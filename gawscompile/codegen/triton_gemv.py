"""The kernels of the plans for few tokens, where memory is the bound.

``two_launch``          shrink writes u = s A x, and expand reads it
``kron_epilogue``,      expand alone, as no term of the group needs a u
``stream``
``single_launch``       one launch does both. Its first programs shrink and publish u; the others stream their rows of W
                        first and wait for u only then. It relies on programs being started in the order of their ids
                        (as look-back scans and stream-K do): who waits holds up nobody that is waited for.
``redundant_shrink``    one launch; every program computes the u that it needs for itself, from the second cache
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
from gawscompile.codegen.triton_modes import Emitter, Product
from gawscompile.codegen.triton_text import (
    Case,
    Cut,
    Kernel,
    Work,
    constant,
    cut,
    defining,
    function,
    index,
    load,
    loop,
    plus,
    store,
    times,
    zeros,
)
from gawscompile.ir.spec import GivenSpec, KernelSpec, LowRankSpec

GEMV_ROWS = (32, 16, 8, 4)  # rows of W per program
GEMV_TRANSPOSED = 16  # the least of a weight kept as [k, n], whose rows then fill 32-byte sectors
GEMV_PROGRAMS = 256  # about two per multiprocessor of a large GPU, for modes that write to u
GEMV_ELEMENTS = 4096  # of W per program and step: 8 or 16 KiB in flight
GEMV_UNROLLED = 64  # elements per thread that unrolled steps may keep in flight; beyond, registers run out
GEMV_COLUMNS = (1024, 512, 256, 128, 64)  # of A, or of W, per step
GEMV_RANKS = (64, 32, 16, 8)


class Gemv(Style):
    """Few tokens: a program takes one of them and a few rows, multiplies elementwise in fp32 and sums at the end.

    `rows` is the most rows of W that a program takes.
    """

    name = "gemv"
    reach = "for one token"
    total = "out"
    token = ("token = tl.program_id(0).to(tl.int64)",)  # the fast axis, so tokens share rows while these are in L2

    def __init__(self, spec: KernelSpec, rows: int) -> None:
        super().__init__(spec)
        self.row_blocks = blocks_of_rows(spec, GEMV_ROWS, rows)
        self.shrink_columns = cut(spec.k, GEMV_COLUMNS)

    def options(self, what: str) -> tuple[tuple[str, int], ...]:
        return (("num_warps", self._shrink_warps() if what.startswith("shrink") else self._expand_warps()),)

    def choices(self, what: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple((("num_warps", warps),) for warps in (1, 2, 4, 8))

    def _shrink_warps(self) -> int:
        return _warps(GEMV_ELEMENTS if self.written else self.shrink_columns.block)

    def _expand_warps(self) -> int:
        blocks = [self.rows(i).block for i in range(len(self.spec.projections))]
        return _warps(max(self._cut_columns(block).block * block for block in blocks))

    def cut_rows(self, n: int, transposed: bool, periods: list[int]) -> Cut:
        blocks = tuple(block for block in GEMV_ROWS if block >= GEMV_TRANSPOSED) if transposed else self.row_blocks
        return cut(n, dividing(blocks, n, periods))

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
            *loop(cols, _unrolled(cols, cols.block, self._shrink_warps()), step),
            *store("u + block", scaled_term(term, "tl.sum(acc)"), "f32"),
        ]
        return Work(f"One column of u = s A x, {self.reach}: {{}}.", tuple(body)), term.rank

    def mode_work(self, product: Product) -> tuple[Work, int]:
        blocks = dividing(GEMV_ROWS, product.mode.outputs, [product.period])
        few = tuple(block for block in blocks if product.mode.outputs >= block * GEMV_PROGRAMS) or blocks[-1:]
        rows = cut(product.mode.outputs, few)
        product_ = [
            *Emitter(product, rows, "BLOCK_N", self.spec.x).gemv(),
            *store(
                f"{plus('u', product.column or 0)} + first + rows",
                rescaled(product, f"tl.sum(part{product.term}, axis=1)"),
                "f32",
                [rows.mask("row_ok")],
            ),
        ]
        body = [
            constant("BLOCK_N", rows.block),
            *defining([*row_range(rows, "BLOCK_N", str(product.mode.outputs)), *row_names("BLOCK_N")], product_),
        ]
        return Work(f"BLOCK_N columns of u, {self.reach}: {{}}.", tuple(body)), rows.steps

    def multiply(self, i: int, rows: Cut) -> list[str]:
        p, cols = self.spec.projections[i], self._cut_columns(rows.block)
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
            *load("ws =", w, ok, p.weight),
            f"acc {'+=' if cols.steps > 1 else '='} ws * xs",
        ]
        return [
            constant("BLOCK_K", cols.block),
            f"w += {'first' if p.transposed else 'first * K'}",
            *zeros(cols, shape),
            *loop(cols, _unrolled(cols, cols.block * rows.block, self._expand_warps()), step),
            f"out = tl.sum(acc, axis={0 if p.transposed else 1})",
        ]

    def store(self, value: str, dtype: str, rows: Cut) -> list[str]:
        return store(
            "y + rows", f"({value})" if " " in value and dtype != "f32" else value, dtype, [rows.mask("row_ok")]
        )

    def epilogue(self, i: int, rows: Cut) -> list[str]:
        p, columns, ok = self.spec.projections[i], self.columns[i], [rows.mask("row_ok")]
        lines = to_rows(p)
        added = load("out +=", "bias + rows", ok, p.bias) if p.bias else []
        added += load("out +=", "residual + rows", ok, p.residual) if p.residual else []
        lines += [] if p.rowscale else added  # loads that need not wait for u
        for j, given in enumerate(p.given):
            lines += self._add_given(j, given, rows)
        of_x, of_u = ([e for e in columns.endings if (e.source is None) == on_x] for on_x in (True, False))
        for ending in of_x:
            lines += self._add_mode(ending, rows)
        if (p.lowrank or of_u) and not self.spec.swiglu:  # gate and up wait together
            lines += self.before_u(columns.endings)
        for j, (term, offset) in enumerate(with_offsets(p)):
            lines += self._add_term(j, term, offset, rows)
        for ending in of_u:
            lines += self._add_mode(ending, rows)
        if p.rowscale:
            lines += [*load("out *=", "rowscale + rows", ok, p.rowscale), *added]
        return lines

    def _add_mode(self, ending: Product, rows: Cut) -> list[str]:
        part = f"tl.sum(part{ending.term}, axis=1)"
        return [*Emitter(ending, rows, "BLOCK_N", self.spec.x).gemv(), "out += " + rescaled(ending, part)]

    def _add_term(self, j: int, term: LowRankSpec, offset: int, rows: Cut) -> list[str]:
        ranks = cut(term.rank, GEMV_RANKS)
        b = f"b{j} + {times('rows[:, None]', term.rank)} + ranks{j}[None, :]"
        b_ok = [rows.mask("row_ok[:, None]"), ranks.mask(f"rank{j}_ok[None, :]")]
        step = [
            *rank_columns(ranks, j),
            *self._ranks_of_u(j, term, offset, ranks),
            *load(f"bs{j} =", b, b_ok, term.dtype),
            f"out += tl.sum(bs{j} * us{j}[None, :], axis=1)",
        ]
        return rank_loop(ranks, step)

    def _add_given(self, j: int, given: GivenSpec, rows: Cut) -> list[str]:
        ranks = cut(given.rank, GEMV_RANKS)
        c = f"c{j} + {times('rows[:, None]', given.rank)} + given{j}[None, :]"
        c_ok = [rows.mask("row_ok[:, None]"), ranks.mask(f"given{j}_ok[None, :]")]
        step = [
            *given_columns(ranks, j),
            *load(f"zs{j} =", f"z{j} + given{j}", [ranks.mask(f"given{j}_ok")], given.z),
            *load(f"cs{j} =", c, c_ok, given.dtype),
            f"out += tl.sum(cs{j} * zs{j}[None, :], axis=1)",
        ]
        return rank_loop(ranks, step)

    def _ranks_of_u(self, j: int, term: LowRankSpec, offset: int, ranks: Cut) -> list[str]:
        return load(f"us{j} =", f"{plus('u', offset)} + ranks{j}", [ranks.mask(f"rank{j}_ok")], "f32")


class SingleLaunch(Gemv):
    """Shrinking and expanding programs in one launch. The counters of a token, `flags`, are one for each stage of
    shrinking, of the programs that have published, and one of those that have waited; the last of these clears them.

    On AMD a release waits for the stores of its own wave alone, and `publish` counts from the first: that wave holds
    all that a program writes to u, since the columns are at most GEMV_ROWS[0] = 32 and a wave has 64 lanes.
    """

    def __init__(self, spec: KernelSpec, rows: int) -> None:
        super().__init__(spec, rows)
        cases = [self.shrinks(stage) for stage in range(self.stages)]
        self.published = [sum(case.programs for case in stage) for stage in cases]
        waiting = [case for case in self.expands() if _waits(case)]
        self.waiting = sum(self.published[1:]) + sum(case.programs for case in waiting)

    def kernels(self) -> list[Kernel]:
        cases = [case for stage in range(self.stages) for case in self.shrinks(stage)]
        return [self._kernel("project", "Columns of u, then the rows of every y", [*cases, *self.expands()])]

    def shrinks(self, stage: int) -> list[Case]:
        return [
            dataclasses.replace(case, work=Work(case.work.doc, (*case.work.body, f"publish({plus('flags', stage)})")))
            for case in super().shrinks(stage)
        ]

    def mode_work(self, product: Product) -> tuple[Work, int]:
        work, programs = super().mode_work(product)
        before = self._wait(product.launch - 1) if product.launch else []
        return Work(work.doc, (*before, *work.body)), programs

    def helpers(self) -> tuple[str, ...]:
        publish = [
            "tl.debug_barrier()  # all threads have written, before the one that counts releases",
            'tl.atomic_add(flag, 1, sem="release")',
        ]
        wait = [
            'while tl.atomic_add(flags + STAGE, 0, sem="acquire") < PUBLISHED:',
            "    pass",
            "tl.debug_barrier()  # no thread reads before the one that counts has acquired",
            f'if tl.atomic_add(flags + {self.stages}, 1, sem="relaxed") == WAITING - 1:',
            *(f"    tl.store({plus('flags', flag)}, 0)" for flag in range(self.stages + 1)),
        ]
        doc = "Wait for the PUBLISHED programs of STAGE; the last to have waited clears the token's counters."
        params = ["flags", "STAGE: tl.constexpr", "PUBLISHED: tl.constexpr"]
        told = "Tell those who wait that this program has written to u."
        return (
            function("@triton.jit", "publish", ["flag"], told, publish),
            function("@triton.jit", "wait", params, doc, wait),
        )

    def before_u(self, endings: list[Product]) -> list[str]:
        return self._wait(max((e.launch - 1 for e in endings if e.source is not None), default=0))

    def _wait(self, stage: int) -> list[str]:
        # while the counts are not known yet any will do: no number of programs depends on them
        published = getattr(self, "published", [0] * self.stages)
        return [f"wait(flags, {stage}, {published[stage]})"]


class RedundantShrink(Gemv):
    """Every program computes u = s A x for itself; only low-rank terms need a u here."""

    expanded = ("weight", "bias", "residual", "rowscale", "a", "b", "scale", "c", "z")

    def kernels(self) -> list[Kernel]:
        return [self._kernel("project", "The rows of every y", self.expands())]

    def column(self, i: int) -> int:
        return 0

    def _ranks_of_u(self, j: int, term: LowRankSpec, offset: int, ranks: Cut) -> list[str]:
        cols = cut(self.spec.k, [block for block in GEMV_COLUMNS if block <= GEMV_ELEMENTS // ranks.block])
        shape = f"({ranks.block}, {cols.block})"
        a = f"a{j} + ranks{j}[:, None] * K + cols{j}[None, :]"
        ok = [ranks.mask(f"rank{j}_ok[:, None]"), cols.mask(f"col{j}_ok[None, :]")]
        step = [
            *index(cols, f"cols{j}", f"col{j}_ok", str(cols.block), "k", "K"),
            *load(f"xs{j} =", f"tl.broadcast_to(x + cols{j}[None, :], {shape})", ok[1:], self.spec.x),
            *load(f"as{j} =", a, ok, term.dtype),
            f"products{j} {'+=' if cols.steps > 1 else '='} as{j} * xs{j}",
        ]
        return [
            *zeros(cols, shape, f"products{j}"),
            *loop(cols, f"for k in tl.range(0, K, {cols.block})", step),
            f"us{j} = {scaled_term(term, f'tl.sum(products{j}, axis=1)', f'scale{j}')}",
        ]


def _waits(case: Case) -> bool:
    return any(line.lstrip().startswith("wait(") for line in case.work.body)


def _warps(elements: int) -> int:
    """Warps of a gemv program: 16 elements or more per thread and step, at most four warps."""
    return min(4, max(1, elements // 512))


def _unrolled(cols: Cut, elements: int, warps: int) -> str:
    """The loop over K for steps of `elements`, unrolled so that several loads of a thread are in flight."""
    factor = max(1, GEMV_UNROLLED * 32 * warps // elements)
    if cols.steps <= factor:
        return "for k in tl.static_range(0, K, BLOCK_K)"
    whole = max(steps for steps in range(1, factor + 1) if cols.steps % steps == 0)
    factor = whole if 3 * whole > factor else factor  # without a loop for the rest, if that costs little
    return f"for k in tl.range(0, K, BLOCK_K, loop_unroll_factor={factor})"
