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

from gawscompile.codegen import triton_bank_modes as bank_modes
from gawscompile.codegen import triton_banks as banks
from gawscompile.codegen import triton_packed as packed
from gawscompile.codegen.triton_cases import Case, Kernel, Work
from gawscompile.codegen.triton_kernels import (
    Narrow,
    Style,
    blocks_of_rows,
    dividing,
    k_columns,
    row_of_w,
)
from gawscompile.codegen.triton_modes import Emitter, Product
from gawscompile.codegen.triton_text import Code, Cut, cut, fn, function, scaled, shape, store, v
from gawscompile.ir.banked import BLOCK
from gawscompile.ir.operators import Banked, LowRank
from gawscompile.ir.packed import STEP
from gawscompile.ir.spec import KernelSpec

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
    total = v.out
    token = ((v.token, fn("tl.program_id", 0).to("i64")),)  # the fast axis, so tokens share rows while these are in L2

    def __init__(self, spec: KernelSpec, rows: int) -> None:
        super().__init__(spec)
        self.row_blocks = blocks_of_rows(spec, GEMV_ROWS, rows)
        self.shrink_columns = cut(spec.k, GEMV_COLUMNS)

    def options(self, what: str) -> tuple[tuple[str, int], ...]:
        return (("num_warps", self._shrink_warps() if what == "shrink" else self._expand_warps()),)

    def choices(self, what: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple((("num_warps", warps),) for warps in (1, 2, 4, 8))

    @property
    def chains(self) -> bool:
        """Whether modes write to u."""
        return bool(self.written) or any(bank.longest > 1 for _, bank, _ in self.banks())

    def _shrink_warps(self) -> int:
        return _warps(GEMV_ELEMENTS if self.chains else self.shrink_columns.block)

    def _expand_warps(self) -> int:
        blocks = [self.rows(i).block for i in range(len(self.spec.projections))]
        return _warps(max(self._cut_columns(block).block * block for block in blocks))

    def cut_rows(self, n: int, transposed: bool, periods: list[int]) -> Cut:
        blocks = tuple(block for block in GEMV_ROWS if block >= GEMV_TRANSPOSED) if transposed else self.row_blocks
        return cut(n, dividing(blocks, n, periods))

    def _cut_columns(self, rows: int) -> Cut:
        return cut(self.spec.k, [block for block in GEMV_COLUMNS if block <= GEMV_ELEMENTS // rows])

    def shrink_work(self, term: LowRank) -> tuple[Work, int]:
        body = [
            v.BLOCK_K.constant(self.shrink_columns.block),
            v.a.let(v.block.to("i64") * v.K, "+="),
            *self._row_of_a(term.dtype),
            *store(v.u + v.block, scaled(term, v.scale, fn("tl.sum", v.acc)), "f32"),
        ]
        return Work(f"One column of u = s A x, {self.reach}: {{}}.", tuple(body)), term.rank

    def _row_of_a(self, dtype: str) -> list[Code]:
        """``acc``, whose sum is the row of A at `a` times x."""
        cols = self.shrink_columns
        ok = [cols.mask(v.col_ok)]
        step = [
            *k_columns(cols),
            *v.xs.load(v.x + v.cols, ok, self.spec.x),
            *v.row.load(v.a + v.cols, ok, dtype),
            v.acc.let(v.row * v.xs, cols.sign),
        ]
        return [
            *[v.acc.zeros(Code("(BLOCK_K,)"))] * (cols.steps > 1),
            *cols.loop(v.k, _unrolled(cols, cols.block, self._shrink_warps()), step),
        ]

    def bank_work(self, term: Banked) -> tuple[Work, int]:
        step = [
            v.use.let(v.column // BLOCK),
            v.rank.let(v.column % BLOCK),
            v.a.let(banks.factor(v.use, 0) + v.rank * v.K),
            *self._row_of_a(term.dtype),
            *banks.columns(v.use, v.rank, fn("tl.sum", v.acc)),
            *store(v.u + v.column, v.found, "f32"),
        ]
        step = [step[0], *banks.unless_mode(term, step[1:])]
        body = [
            v.BLOCK_K.constant(self.shrink_columns.block),
            v.uses.let(banks.row(term, banks.row_of_token())),
            *v.column.each(fn("range", v.block, banks.entries() * BLOCK, banks.programs(term)), step),
        ]
        return Work(f"Columns of u by a bank's schedule, {self.reach}: {{}}.", tuple(body)), banks.programs(term)

    def chain_work(self, term: Banked, stage: int) -> Work:
        body = bank_modes.stage_of_one(term, stage, self.spec.k, self.spec.x)
        return Work(f"What modes make for the next ones of their chains, {self.reach}: {{}}.", tuple(body))

    def mode_work(self, product: Product) -> tuple[Work, int]:
        blocks = dividing(GEMV_ROWS, product.mode.outputs, [product.period])
        few = tuple(block for block in blocks if product.mode.outputs >= block * GEMV_PROGRAMS) or blocks[-1:]
        rows = cut(product.mode.outputs, few)
        body = [
            *Emitter(product, rows, self.spec.x).gemv(),
            *store(v.u + (product.column or 0) + v.first + v.rows, _summed(product), "f32", [rows.mask(v.row_ok)]),
        ]
        doc = f"BLOCK_N columns of u, {self.reach}: {{}}."
        return Work(doc, tuple(self.framed(body, rows, product.mode.outputs))), rows.steps

    def multiply(self, i: int, rows: Cut) -> list[Code]:
        p, cols = self.spec.projections[i], self._cut_columns(rows.block)
        if p.packed:
            steps = packed.pieces(self.spec.k, GEMV_COLUMNS, GEMV_ELEMENTS // rows.block)
            range_ = _unrolled(steps, steps.block * STEP * rows.block, self._expand_warps())
            return packed.gemv(p.packed, rows, steps, range_, self.spec.x)
        if p.transposed:
            block = shape(v.BLOCK_K, v.BLOCK_N)
            w = v.w + row_of_w(p, self.spec.k) + v.rows[None, :]
            ok = [rows.mask(v.row_ok[None, :]), cols.mask(v.col_ok[:, None])]
            # Threads lie along rows of W here, so x has to change its layout anyway: as few numbers as there are.
            xs = v.xs.load(v.x + v.cols, [cols.mask(v.col_ok)], self.spec.x, view="[:, None]")
        else:
            block, w = shape(v.BLOCK_N, v.BLOCK_K), v.w + v.rows[:, None] * v.K + v.cols[None, :]
            ok = [rows.mask(v.row_ok[:, None]), cols.mask(v.col_ok[None, :])]
            # A row of x, loaded once and broadcast, would change its layout in shared memory: two barriers a step.
            xs = v.xs.load(fn("tl.broadcast_to", v.x + v.cols[None, :], block), ok[1:], self.spec.x)
        step = [
            *k_columns(cols),
            *xs,
            *v.ws.load(w, ok, p.weight.dtype),
            v.acc.let(v.ws * v.xs, cols.sign),
        ]
        return [
            v.BLOCK_K.constant(cols.block),
            v.w.let(v.first if p.transposed else v.first * v.K, "+="),
            *[v.acc.zeros(block)] * (cols.steps > 1),
            *cols.loop(v.k, _unrolled(cols, cols.block * rows.block, self._expand_warps()), step),
            v.out.let(fn("tl.sum", v.acc, axis=0 if p.transposed else 1)),
        ]

    def store(self, value: Code, dtype: str, rows: Cut) -> list[Code]:
        return store(v.y + v.rows, value, dtype, [rows.mask(v.row_ok)])

    def epilogue(self, i: int, rows: Cut) -> list[Code]:
        p, columns, ok = self.spec.projections[i], self.columns[i], [rows.mask(v.row_ok)]
        low = self.low_rank(p)
        lines = self.to_rows(p)
        added = v.out.load(v.bias + v.rows, ok, p.bias.dtype, sign="+=") if p.bias else []
        added += v.out.load(v.residual + v.rows, ok, p.residual.dtype, sign="+=") if p.residual else []
        lines += [] if p.rowscale else added  # loads that need not wait for u
        for narrow in self.given(p):
            lines += self._add(narrow, rows)
        of_x, of_u = ([e for e in columns.endings if (e.source is None) == on_x] for on_x in (True, False))
        for ending in of_x:
            lines += self._add_mode(ending, rows)
        if (low or p.banked or of_u) and not self.spec.swiglu:  # gate and up wait together
            lines += self.before_u(columns.endings)
        for narrow in low:
            lines += self._add(narrow, rows)
        if p.banked:
            many_ok = rows.mask(v.row_ok[:, None])
            modes = bank_modes.add_to_one(p.banked, p.rank, self.spec.x, many_ok)
            bank = banks.add_one(p.banked, p.rank, many_ok, bank_modes.begin(p.banked), modes)
            lines = [v.product.let(v.out), *lines, *bank]
        for ending in of_u:
            lines += self._add_mode(ending, rows)
        if p.rowscale:
            lines += [*v.out.load(v.rowscale + v.rows, ok, p.rowscale.dtype, sign="*="), *added]
        return lines

    def _add_mode(self, ending: Product, rows: Cut) -> list[Code]:
        return [*Emitter(ending, rows, self.spec.x).gemv(), v.out.let(_summed(ending), "+=")]

    def _add(self, narrow: Narrow, rows: Cut) -> list[Code]:
        ranks = cut(narrow.rank, GEMV_RANKS)
        pointer = narrow.matrix + v.rows[:, None] * narrow.rank + narrow.columns[None, :]
        ok = [rows.mask(v.row_ok[:, None]), ranks.mask(narrow.ok[None, :])]
        step = [
            *self._vector(narrow, ranks),
            *narrow.factors.load(pointer, ok, narrow.dtype),
            v.out.let(fn("tl.sum", narrow.factors * narrow.vectors[None, :], axis=1), "+="),
        ]
        return narrow.loop(ranks, step)

    def _vector(self, narrow: Narrow, ranks: Cut) -> list[Code]:
        """What the matrix of `narrow` multiplies."""
        return narrow.vectors.load(narrow.vector + narrow.columns, [ranks.mask(narrow.ok)], narrow.has)


class SingleLaunch(Gemv):
    """Shrinking and expanding programs in one launch. The counters of a token, `flags`, are one for each stage of
    shrinking, of the programs that have published, and one of those that have waited; the last of these clears them.

    On AMD a release waits for the stores of its own wave alone, and `publish` counts from the first: that wave holds
    all that a program writes to u, since it writes at most GEMV_ROWS[0] = 32 columns at a time and a wave has 64 lanes.
    """

    keeps_state = True

    def __init__(self, spec: KernelSpec, rows: int) -> None:
        super().__init__(spec, rows)
        self.published: list[int] = []  # by stage; each waits for earlier ones
        for stage in range(self.stages):
            self.published.append(sum(case.programs for case in self.shrinks(stage)))
        waiting = [case for case in self.expands() if "wait" in case.work.reads]
        self.waiting = sum(self.published[1:]) + sum(case.programs for case in waiting)

    def kernels(self) -> list[Kernel]:
        cases = [case for stage in range(self.stages) for case in self.shrinks(stage)]
        return [self._kernel("project", "Columns of u, then the rows of every y", [*cases, *self.expands()])]

    def shrinks(self, stage: int) -> list[Case]:
        publish = fn("publish", v.flags + stage)
        return [
            dataclasses.replace(case, work=Work(case.work.doc, (*case.work.body, publish)))
            for case in super().shrinks(stage)
        ]

    def chain_work(self, term: Banked, stage: int) -> Work:
        work = super().chain_work(term, stage)
        return Work(work.doc, (*(self._wait(stage - 1) if stage else []), *work.body))

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
            *(f"    {fn('tl.store', v.flags + flag, 0).text}" for flag in range(self.stages + 1)),
        ]
        doc = "Wait for the PUBLISHED programs of STAGE; the last to have waited clears the token's counters."
        params = ["flags", "STAGE: tl.constexpr", "PUBLISHED: tl.constexpr"]
        told = "Tell those who wait that this program has written to u."
        return (
            function("@triton.jit", "publish", ["flag"], told, publish),
            function("@triton.jit", "wait", params, doc, wait),
        )

    def before_u(self, endings: list[Product]) -> list[Code]:
        last = [e.launch - 1 for e in endings if e.source is not None] + [b.longest - 2 for _, b, _ in self.banks()]
        return self._wait(max([0, *last]))

    def _wait(self, stage: int) -> list[Code]:
        return [fn("wait", v.flags, stage, self.published[stage])]


class RedundantShrink(Gemv):
    """Every program computes u = s A x for itself; only low-rank terms need a u here."""

    repeats_shrink = True

    expanded = ("base", "rows", "shrink")

    def kernels(self) -> list[Kernel]:
        return [self._kernel("project", "The rows of every y", self.expands())]

    def column(self, i: int) -> int:
        return 0

    def _vector(self, narrow: Narrow, ranks: Cut) -> list[Code]:
        if narrow.term is None:
            return super()._vector(narrow, ranks)
        j = narrow.j
        cols = cut(self.spec.k, [block for block in GEMV_COLUMNS if block <= GEMV_ELEMENTS // ranks.block])
        # names that no other loop of a program has: where one runs once, Triton sees what it leaves in the next
        at, col_ok, xs = v[f"a{j}_cols"], v[f"a{j}_ok"], v[f"a{j}_xs"]
        factors, products = v[f"as{j}"], v[f"a{j}_products"]
        block = shape(ranks.block, cols.block)
        a = v[f"a{j}"] + narrow.columns[:, None] * v.K + at[None, :]
        ok = [ranks.mask(narrow.ok[:, None]), cols.mask(col_ok[None, :])]
        step = [
            *cols.index(at, col_ok, v.k, v.K),
            *xs.load(fn("tl.broadcast_to", v.x + at[None, :], block), ok[1:], self.spec.x),
            *factors.load(a, ok, narrow.dtype),
            products.let(factors * xs, cols.sign),
        ]
        return [
            *[products.zeros(block)] * (cols.steps > 1),
            *cols.loop(v.k, fn("tl.range", 0, v.K, cols.block), step),
            narrow.vectors.let(scaled(narrow.term, v[f"scale{j}"], fn("tl.sum", products, axis=1))),
        ]


def _summed(product: Product) -> Code:
    """The rows that `Emitter.gemv` leaves as parts."""
    return product.rescaled(fn("tl.sum", v[f"part{product.term}"], axis=1))


def _warps(elements: int) -> int:
    """Warps of a gemv program: 16 elements or more per thread and step, at most four warps."""
    return min(4, max(1, elements // 512))


def _unrolled(cols: Cut, elements: int, warps: int) -> Code:
    """The range of a loop over K for steps of `elements`, unrolled so that several loads of a thread are in flight."""
    factor = max(1, GEMV_UNROLLED * 32 * warps // elements)
    if cols.steps <= factor:
        return fn("tl.static_range", 0, v.K, v.BLOCK_K)
    whole = max(steps for steps in range(1, factor + 1) if cols.steps % steps == 0)
    factor = whole if 3 * whole > factor else factor  # without a loop for the rest, if that costs little
    return fn("tl.range", 0, v.K, v.BLOCK_K, loop_unroll_factor=factor)
