"""Kronecker terms in Triton: how a chain of mode products is cut into launches, and the code of one of them.

A chain ``s M_p … M_1 x`` becomes one or more *products*, each a matrix mode ``I_before ⊗ G ⊗ I_after`` with some of the
modes before it folded into the load of its input. The last product is an epilogue of the base projection's tile: a
chain with one product costs no launch. The others write to columns of u, the first ones in the launch that makes
u = s A x; each further one waits for a launch of its own. Folded are

- every diagonal, as a multiplication of what is loaded;
- a mix (``after > 1``) before a block mode (``after = 1``), where computing it again in every program is cheap: before
  the epilogue where it costs a program less than a quarter of the columns of x, which it reads anyway for W; in an
  earlier launch where the block mode has few rows, so that few programs repeat it.

So GAWS and GAWS-D take one launch, LoKr with a full w2 two, and with a low-rank w2 two if its modes come as
``(I ⊗ w2_a)(w1 ⊗ I)(I ⊗ w2_b)`` or ``(I ⊗ w2_a)(I ⊗ w2_b)(w1 ⊗ I)``, else three.

The rows of a block mode within one slice are a product of matrices (`tl.dot` where there are many tokens; rows of
several slices in one tile take a `tl.dot` for each slice). A mix is a weighted sum of slices, element by element in
fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from gawscompile.codegen.triton_text import Code, Cut, cut, fn, scaled, shape, v
from gawscompile.ir.operators import Kronecker, Mode, as_number
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import DTYPES, SpecError, shape_of

REPEATED_ROWS = 64  # of a block mode that is no epilogue: up to here a mix before it is folded into its load
REPEATED_SHARE = 4  # a mix is folded into an epilogue that then does at most K / 4 more multiplications per token
FACTOR_ELEMENTS = 4096  # of a factor per program and step
FACTOR_COLUMNS = (512, 256, 128, 64, 32, 16, 8)
UNROLLED = 4  # steps whose loads are in flight together: without a `tl.dot`, Triton does not pipeline a loop
TILE_COLUMNS = {2: (64, 32, 16), 4: (32, 16)}  # of both operands of a `tl.dot` per step, by bytes per element
DOT_MINIMUM = 16  # the least edge of a `tl.dot` that every target takes


# --- Plans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Mode `at` of a term, on an input to which the modes from `start` on are applied as it is loaded.

    It reads columns of u from `source` on, or x where that is None, and writes columns of u from `column` on, or is
    the epilogue where that is None; both are relative to the columns of its projection. `launch` counts from 0.
    """

    term: int
    kron: Kronecker
    start: int
    at: int
    launch: int
    source: int | None
    column: int | None

    @property
    def mode(self) -> Mode:
        return self.kron.modes[self.at]

    @property
    def rows(self) -> int:
        """Of G."""
        rows = self.mode.rows
        assert rows is not None
        return rows

    @property
    def period(self) -> int:
        """Blocks of rows that divide this have one slice of x (of a block mode) or one row of G (of a mix)."""
        return self.rows if self.mode.after == 1 else self.mode.after

    @property
    def scaled(self) -> bool:
        """Whether the term's scale is applied here."""
        return self.start == 0 and self.kron.scale != 1.0

    @property
    def factors(self) -> range:
        """The modes whose tensors this reads."""
        return range(self.start, self.at + 1)

    def factor(self, at: int) -> str:
        """What the code calls the tensor of a mode."""
        return f"g{self.term}_{at}"

    def rescaled(self, value: Code) -> Code:
        """`value` times the scale of the term, if it is applied here."""
        return scaled(self.kron, v[f"kron_scale{self.term}"], value) if self.scaled else value

    def describe(self, projection: int) -> str:
        """For headers: ``G0_0_1 G0_0_0``, last factor first."""
        return " ".join(f"G{projection}_{self.term}_{at}" for at in reversed(self.factors))


@dataclass(frozen=True)
class Columns:
    """The columns of u that belong to one projection: those of its low-rank terms, of its banks, then of `products`."""

    products: tuple[Product, ...]
    width: int

    @property
    def endings(self) -> list[Product]:
        return [product for product in self.products if product.column is None]


def columns(spec: KernelSpec, p: Sum) -> Columns:
    """All mode products of `p`. Raises `SpecError`, naming the term, for one that is no chain from x to y."""
    width = p.rank + (p.banked.columns + p.banked.between(spec.k) if p.banked else 0)
    products: list[Product] = []
    for j, kron in enumerate(p.kronecker):
        _check(spec, p, kron)
        source = None
        cuts = _cuts(spec.k, kron)
        for launch, (start, at) in enumerate(cuts):
            column = None if at == len(kron.modes) - 1 else width
            products.append(Product(j, kron, start, at, launch, source, column))
            if column is not None:
                source = column
                width += kron.modes[at].outputs
    return Columns(tuple(products), width)


def _check(spec: KernelSpec, p: Sum, kron: Kronecker) -> None:
    sizes = [spec.k, *(mode.outputs for mode in kron.modes)]
    for mode, inputs in zip(kron.modes, sizes, strict=False):
        if min(mode.before, *shape_of(mode.matrix), mode.after) < 1:
            raise SpecError(f"the sizes of mode {mode.text()} of {kron.text()} must be at least 1")
        if mode.inputs != inputs:
            raise SpecError(f"mode {mode.text()} of {kron.text()} takes {mode.inputs} features, not {inputs}")
        if mode.blocks * (mode.rows or 1) * mode.columns >= 1 << 31:
            raise SpecError(f"the factor of mode {mode.text()} of {kron.text()} is too large for 32-bit offsets")
    if sizes[-1] != p.n:
        raise SpecError(f"{kron.text()} makes {sizes[-1]} features, not {p.n}")
    if not kron.modes or kron.modes[-1].rows is None:
        raise SpecError(f"{kron.text()} does not end with a matrix, and only such terms have a Triton kernel")


def _cuts(k: int, kron: Kronecker) -> list[tuple[int, int]]:
    """(start, at) of each product, the first one first."""
    found: list[tuple[int, int]] = []
    end = len(kron.modes)
    while end:
        at = start = end - 1
        cost = kron.modes[at].columns
        while start and (cost := _folded(k, kron, at, start - 1, cost)):
            start -= 1
        found.append((start, at))
        end = start
    return found[::-1]


def _folded(k: int, kron: Kronecker, at: int, candidate: int, cost: int) -> int:
    """Multiplications per token and block of rows if `candidate` is folded into the load of `at`; 0 if it is not."""
    mode, earlier = kron.modes[at], kron.modes[candidate]
    if earlier.rows is None:
        return cost
    cost *= earlier.columns
    if mode.after > 1 or earlier.after == 1:
        return 0
    if at == len(kron.modes) - 1:
        return cost if cost * REPEATED_SHARE <= k else 0
    return cost if (mode.rows or 0) <= REPEATED_ROWS and cost <= k else 0


# --- Code --------------------------------------------------------------------------------------------------


def common(dtype: str, other: str, of_u: bool = False) -> str:
    """Operands of one dtype meet in it (a dot sums in fp32), others in fp32, which holds every value of both.

    u may be rounded to bf16, which has the range of fp32. In fp16 it could overflow where the scale is large.
    """
    return dtype if dtype == other or (of_u and dtype == "bf16") else "f32"


@dataclass(frozen=True)
class Where:
    """Offsets into a tensor: which are inside, the shape of what is loaded, and whether pointers must grow to it."""

    ok: list[Code | None]
    shape: Code
    grow: bool = False

    def pointer(self, pointer: Code) -> Code:
        return fn("tl.broadcast_to", pointer, self.shape) if self.grow else pointer


@dataclass(frozen=True)
class Emitter:
    """The code of one product for the rows `start … start + BLOCK_N - 1`, which are cut as `rows` says.

    `x` is the dtype of x. The code uses ``start`` (the first row), ``row`` (all of them), ``rows`` (from 0) and their
    mask ``row_ok``; with `tiles` also ``tokens`` and ``token_ok``.
    """

    product: Product
    rows: Cut
    x: str
    tiles: bool = False

    def own(self, name: str, end: str = "") -> Code:
        """A name that no other term uses."""
        return v[f"{name}{self.product.term}{end}"]

    @property
    def uniform(self) -> bool:
        """Whether a program's rows have one slice of x, or of a mix one row of G, in common."""
        whole = self.product.mode.slices == self.product.mode.after == 1
        return whole or self.product.period % self.rows.block == 0

    @property
    def dtype(self) -> str:
        """Of the input: x's, or that of u."""
        return self.x if self.product.source is None else "f32"

    @property
    def common(self) -> str:
        """Of both operands of a dot."""
        return common(self.product.kron.dtype, self.dtype, of_u=self.product.source is not None)

    @property
    def dots(self) -> bool:
        return self.tiles and self.product.mode.after == 1

    def _from(self) -> tuple[Code, Code | None]:
        """Offsets of these rows in G and in the input: of each row, or of all where they agree."""
        p, mode = self.product, self.product.mode
        row, within = (v.start, v.rows) if self.uniform else (v.row, 0)
        if mode.after == mode.slices == 1:
            return v.row * mode.columns, None
        if mode.after == 1:
            of_g = v.row if mode.blocks > 1 else row % p.rows + within
            return of_g * mode.columns, row // p.rows * mode.columns
        g, place = row // mode.after, row % mode.after + within
        if mode.before == 1:
            return g * mode.columns, place
        outer, inner = p.rows * mode.after, mode.columns * mode.after
        return g % p.rows * mode.columns, row // outer * inner + place

    def gemv(self) -> list[Code]:
        """``part = …``, whose sums along its second axis are the rows, for one token."""
        p, mode = self.product, self.product.mode
        widest = max(FACTOR_COLUMNS[-1], FACTOR_ELEMENTS // self.rows.block)
        cols = cut(mode.columns, [block for block in FACTOR_COLUMNS if block <= widest])
        g_from, x_from = self._from()
        g_many, x_many = mode.after == 1 or not self.uniform, mode.after > 1 or not self.uniform
        g_base, x_base, at, xs, gs, part = map(self.own, ("g_from", "x_from", "cols", "xs", "gs", "part"))
        col_ok = self.own("col", "_ok")
        along = at[None, :] * mode.after
        x_at = (x_base[:, None] if x_many else x_base) + along if x_from else along
        g_at = (g_base[:, None] if g_many else g_base) + at[None, :]
        row_mask, col_mask = self.rows.mask(v.row_ok[:, None]), cols.mask(col_ok[None, :])
        # As for x and W: broadcast pointers, not values, whose layout would then change in shared memory.
        block = shape(v.BLOCK_N, cols.block)
        step = [
            *cols.index(at, col_ok, v.c),
            *self._input(xs, x_at, Where([row_mask if x_many else None, col_mask], block, not x_many)),
            *self._factor(gs, p.at, g_at, Where([row_mask if g_many else None, col_mask], block, not g_many)),
            part.let(gs * xs, cols.sign),
        ]
        return [
            self.formula(),
            g_base.let(g_from),
            *([x_base.let(x_from)] if x_from else []),
            *[part.zeros(block)] * (cols.steps > 1),
            *cols.loop(v.c, _unrolled(mode.columns, cols.block, self.rows.block * cols.block), step),
        ]

    def tile(self, into: Code, fresh: bool) -> list[Code]:
        """Add the rows for a tile of tokens to `into`, or start it with them where it is `fresh`."""
        return [self.formula(), *(self._dot(into, fresh) if self.dots else self._mix(into))]

    def _dot(self, into: Code, fresh: bool) -> list[Code]:
        p, mode = self.product, self.product.mode
        cols = cut(mode.columns, TILE_COLUMNS[DTYPES[self.common].itemsize], DOT_MINIMUM)
        g_base, x_base, at, slice_, xs, gs = map(self.own, ("g_from", "x_from", "cols", "slice", "xs", "gs"))
        col_ok, mine_ok = self.own("col", "_ok"), self.own("row", "_ok")
        g_from, x_from = self._from()
        x_from = x_from if self.uniform else slice_ * mode.columns
        mine = self.rows.mask(v.row_ok[None, :]) if self.uniform else mine_ok[None, :]
        x_where = Where([cols.mask(col_ok)], shape(v.BLOCK_M, cols.block))
        g_where = Where([mine, cols.mask(col_ok[:, None])], x_where.shape)
        once = cols.steps == 1 and self.uniform
        step = [
            *cols.index(at, col_ok, v.c),
            *self._input(xs, x_base + at if x_from else at, x_where, self.common),
            *self._factor(gs, p.at, g_base[None, :] + at[:, None], g_where, self.common),
            *into.dot(xs, gs, self.common, accumulate=not (fresh and once)),
        ]
        body = cols.loop(v.c, fn("range", 0, mode.columns, cols.block), step)
        place = [x_base.let(x_from)] if x_from else []
        if self.uniform:
            body = [*place, *body]
        else:
            last = fn("tl.minimum", (v.start + v.BLOCK_N - 1) // p.rows + 1, mode.slices)
            owned = (v.row // p.rows).equals(slice_)
            owned = v.row_ok & owned if self.rows.masked else owned
            body = [
                Code(f"# The rows may lie in several slices of {p.rows}."),
                *slice_.each(fn("range", v.start // p.rows, last), [mine_ok.let(owned), *place, *body]),
            ]
        start = [into.zeros(shape(v.BLOCK_M, v.BLOCK_N))] * (fresh and not once)
        return [g_base.let(g_from), *start, *body]

    def _mix(self, into: Code) -> list[Code]:
        p, mode = self.product, self.product.mode
        steps = Cut(mode.columns, 1)
        g_base, x_base, xs, gs = map(self.own, ("g_from", "x_from", "xs", "gs"))
        g_from, x_from = self._from()
        assert x_from is not None
        where = Where([self.rows.mask(v.row_ok)], shape(v.BLOCK_M, v.BLOCK_N))
        c = v.c if steps.steps > 1 else None
        g_where = Where([] if self.uniform else where.ok, where.shape)
        step = [
            *self._input(xs, x_base + c * mode.after if c else x_base, where),
            *self._factor(gs, p.at, g_base + c if c else g_base, g_where, view="" if self.uniform else "[None, :]"),
            into.let(gs * xs, steps.sign),
        ]
        return [
            g_base.let(g_from),
            x_base.let(x_from),
            *[into.zeros(where.shape)] * (steps.steps > 1),
            *steps.loop(v.c, _unrolled(mode.columns, 1), step),
        ]

    def formula(self) -> Code:
        """What is added to the rows, as a comment."""
        p = self.product
        factors = " ".join(f"({p.kron.modes[at].text()} {p.factor(at)})" for at in reversed(p.factors))
        number = as_number(p.kron.scale)
        scale = "" if not p.scaled else f"kron_scale{p.term} " if number is None else f"{number:g} "
        return Code(f"# {scale}{factors} {'x' if p.source is None else 'u'}")

    # --- Inputs

    def _input(self, name: Code, at: Code, where: Where, to: str = "f32") -> list[Code]:
        """`name`: the product's input at the offsets `at`, with what is folded into its load."""
        folded = list(self.product.factors)[:-1]
        if not folded:
            return self._read(name, at, where, to)
        return [*self._folded(name, folded, at, where), *[name.let(name.to(to))] * (to != "f32")]

    def _folded(self, name: Code, folded: list[int], at: Code, where: Where) -> list[Code]:
        """The modes `folded`, last one last, at the offsets `at` of their product; in fp32."""
        if not folded:
            return self._read(name, at, where)
        *others, last = folded
        mode = self.product.kron.modes[last]
        place, i, slices, summand, weight = (self.own(word, f"_{last}") for word in ("at", "i", "slices", "xs", "gs"))
        along = place if mode.after == 1 else place // mode.after
        along = along % (mode.rows or mode.columns) if mode.before > 1 else along
        view = "[None, :]" * self.tiles
        if mode.rows is None:
            g = self._factor(name, last, along, where, view=view, sign="*=")
            return [place.let(at), *self._folded(name, others, place, where), *g]
        outer, inner = mode.rows * mode.after, mode.columns * mode.after
        first = place % mode.after
        first = place // outer * inner + first if mode.slices > 1 else first
        step = [
            *self._folded(summand, others, slices + i * mode.after, where),
            *self._factor(weight, last, along * mode.columns + i, where, view=view),
            name.let(weight * summand, "+="),
        ]
        return [
            place.let(at),
            slices.let(first),
            name.zeros(where.shape),
            *i.each(_unrolled(mode.columns, 1), step),
        ]

    def _read(self, name: Code, at: Code, where: Where, to: str = "f32") -> list[Code]:
        """Load from x or u."""
        source = self.product.source
        pointer, ok = v.x if source is None else v.u + source, where.ok
        if self.tiles:
            pointer += v.tokens[:, None] * (v.K if source is None else v.WIDTH)
            at = at[None, :]
            ok = [v.token_ok[:, None], *(mask[None, :] for mask in ok if mask)]
        return name.load(where.pointer(pointer + at), ok, self.dtype, to)

    def _factor(
        self, target: Code, at: int, offset: Code, where: Where, to: str = "f32", view: str = "", sign: str = "="
    ) -> list[Code]:
        """Load from the tensor of mode `at`."""
        pointer = where.pointer(v[self.product.factor(at)] + offset)
        return target.load(pointer, where.ok, self.product.kron.dtype, to, view, sign)


def _unrolled(size: int, block: int, elements: int = 1) -> Code:
    """The range of a loop over `size` by steps that load `elements` of a factor."""
    steps = max(1, min(UNROLLED, 2 * FACTOR_ELEMENTS // elements))  # more in flight than that, and registers run out
    if size <= steps * block:
        return fn("tl.static_range", 0, size, block)
    return fn("tl.range", 0, size, block, loop_unroll_factor=steps)
