"""Kronecker adapters of a bank, in Triton: chains of mode products whose sizes stand in the schedule (`ir.banked`).

A chain ``s M_p … M_1 x`` is computed mode by mode. The first launch computes the first mode of every chain, the next
launch the second, and so on, but for the last mode of a chain. Results lie in u in fp32, behind the columns of the
bank's ranks, one mode after the other. The last mode is an epilogue of the base's rows. It reads the result of the mode
before it, or x where the chain has one mode.

The kernel reads the sizes of a mode from the schedule. Number ``(b, o, a)`` of a result is the dot of row o of G and of
the numbers ``(b, i, a)`` of the mode's input. A tile of tokens computes it without `tl.dot`.
"""

from __future__ import annotations

from gawscompile.codegen.triton_banks import each_kind, entries, factor, field, row, row_of_token, rows_of_tile
from gawscompile.codegen.triton_text import Code, fn, shape, store, v
from gawscompile.ir.operators import Banked

PROGRAMS = 64
"""The most programs that compute the modes of a launch, for each token (or tile) and bank."""

ROWS = 16
"""A program of a launch that writes u computes so many numbers at a time."""

COLUMNS = 64
"""A program for one token multiplies so many columns of G at a time."""


def programs(term: Banked, k: int) -> int:
    """How many programs compute the modes of a launch."""
    return min(PROGRAMS, -(-term.between(k) // ROWS))


def all_programs(term: Banked, k: int) -> int:
    """The same for all launches together."""
    return max(term.longest - 1, 0) * programs(term, k)


# --- An entry of the schedule ------------------------------------------------------------------------------


def _sizes(term: Banked) -> list[Code]:
    """The sizes of the mode ``I_slices ⊗ G ⊗ I_apart`` of the entry `use`: G has `high` rows and `wide` columns.
    `after` is `apart`, negated where the chain goes on. An entry that is no mode has no columns."""
    mode, after, nothing = v.mode, field(v.use, 5), Code("0")
    return [
        mode.let(field(v.use, 2) < 0),
        v.high.let(fn("tl.where", mode, nothing - field(v.use, 2), 1)),
        v.wide.let(fn("tl.where", mode, field(v.use, 3), 0)),
        v.after.let(fn("tl.where", mode, after, 1)),
        v.apart.let(fn("tl.abs", v.after)),
        *[v.slices.let(fn("tl.where", mode, field(v.use, 1), 0))] * (term.longest > 1),
    ]


def _follow(term: Banked) -> list[Code]:
    """Update `place`, the number of the next entry in its chain, and `behind`, where the results of all modes so far
    end in u."""
    if term.longest < 2:
        return []
    goes_on = v.mode & (v.after < 0)
    return [
        v.behind.let(fn("tl.where", goes_on, v.slices * v.high * v.apart, 0), "+="),
        v.place.let(fn("tl.where", goes_on, v.place + 1, 0)),
    ]


def begin(term: Banked) -> list[Code]:
    """Set `place` and `behind` for the first entry of a row."""
    return [v.place.let(Code("0")), v.behind.let(Code("0"))] * (term.longest > 1)


def _positions(numbers: Code) -> list[Code]:
    """For each of the `numbers` of a result: where its row of G begins, and where in the input its first number is."""
    return [
        v.from_g.let(factor(v.use, 0)),
        v.from_g.let(numbers // v.apart % v.high * v.wide, "+="),
        v.in_z.let(numbers // (v.apart * v.high) * (v.apart * v.wide) + numbers % v.apart),
    ]


def _made_before() -> Code:
    """Where in u the result of the mode before begins, behind the columns of the ranks."""
    return v.behind - v.slices * v.wide * v.apart


# --- For one token -----------------------------------------------------------------------------------------


def _dots_of_one(source: Code, has: str, dtype: str, columns: Code, ok: Code | None) -> list[Code]:
    """``part += …``, whose sums along its second axis are the numbers."""
    along = v.cols_g[None, :]
    mask = [ok, (v.cols_g < v.wide)[None, :]]
    step = [
        v.cols_g.let(v.i + fn("tl.arange", 0, COLUMNS)),
        *v.gs.load(v.from_g[:, None] + along, mask, dtype),
        *v.zs.load(v.from_z[:, None] + along * v.apart, mask, has),
        v.part.let(v.gs * v.zs, "+="),
    ]
    return [v.from_z.let(source), v.from_z.let(v.in_z, "+="), *v.i.each(fn("range", 0, columns, COLUMNS), step)]


def stage_of_one(term: Banked, place: int, k: int, x: str) -> list[Code]:
    """One program's share of the modes with number `place` in their chains, for one token. `u` points behind the
    columns of the ranks. The last mode of a chain is left to `add_to_one`."""
    source, has = (v.x, x) if place == 0 else (v.u + _made_before(), "f32")
    piece = [
        v.rows.let(v.piece * ROWS + fn("tl.arange", 0, ROWS)),
        v.row_ok.let(v.rows < v.made),
        *_positions(v.rows),
        v.part.zeros(shape(ROWS, COLUMNS)),
        *_dots_of_one(source, has, term.dtype, v.wide, v.row_ok[:, None]),
        *store(v.u + v.behind + v.rows, fn("tl.sum", v.part, axis=1), "f32", [v.row_ok]),
    ]
    return [
        v.uses.let(row(term, row_of_token())),
        *begin(term),
        *v.use.each(fn("range", entries()), _step(term, place, k, piece)),
    ]


def _step(term: Banked, place: int, k: int, piece: list[Code]) -> list[Code]:
    made = v.mode & (v.after < 0) & v.place.equals(place)
    return [
        *_sizes(term),
        v.made.let(fn("tl.where", made, v.slices * v.high * v.apart, 0)),
        *v.piece.each(fn("range", v.block, fn("tl.cdiv", v.made, ROWS), programs(term, k)), piece),
        *_follow(term),
    ]


def add_to_one(term: Banked, offset: int, x: str, ok: Code | None) -> list[Code]:
    """``out += s G z`` of an entry that ends a chain, for the rows of a program and one token."""
    if not term.longest:
        return []
    sources = _sources(term, v.x, v.u + offset + term.columns, x)
    return [
        *_sizes(term),
        *_positions(v.row),
        v.part.zeros(shape(v.BLOCK_N, COLUMNS)),
        *(line for source, has, wide in sources for line in _dots_of_one(source, has, term.dtype, wide, ok)),
        v.out.let(fn("tl.sum", v.part, axis=1) * field(v.use, 4, "f32"), "+="),
        *_follow(term),
    ]


def _sources(term: Banked, x: Code, u: Code, dtype: str) -> list[tuple[Code, str, Code]]:
    """The inputs that the last mode of a chain can have, x and u: a pointer, the dtype, and the number of G's columns
    to multiply, which is 0 unless this is the input."""

    def columns(where: Code) -> Code:
        return fn("tl.where", where, v.wide, 0)

    ends = v.mode & (Code("0") < v.after)
    if term.longest == 1:
        return [(x, dtype, columns(ends))]
    first, later = v.place.equals(0), Code("0") < v.place
    return [(x, dtype, columns(ends & first)), (u + _made_before(), "f32", columns(ends & later))]


# --- For a tile of tokens ----------------------------------------------------------------------------------


def _dots_of_tile(
    source: Code, has: str, dtype: str, columns: Code, ok: Code | None, both: list[Code | None]
) -> list[Code]:
    """``part += …`` for the tokens of a kind; `source` is where each token's numbers begin, `both` masks tokens and
    numbers."""
    step = [
        *v.gs.load(v.from_g + v.i, [ok], dtype),
        *v.zs.load(v.from_z + v.i * v.apart, both, has),
        v.part.let(v.zs * v.gs[None, :], "+="),
    ]
    return [v.from_z.let(source), v.from_z.let(v.in_z[None, :], "+="), *v.i.each(fn("range", columns), step)]


def stage_of_tile(term: Banked, place: int, k: int, x: str) -> list[Code]:
    """`stage_of_one` for a tile of tokens."""
    in_u = v.u + v.tokens[:, None] * v.WIDTH
    source, has = (v.x + v.tokens[:, None] * v.K, x) if place == 0 else (in_u + _made_before(), "f32")
    piece = [
        v.rows.let(v.piece * ROWS + fn("tl.arange", 0, ROWS)),
        v.row_ok.let(v.rows < v.made),
        v.both_ok.let(v.mine[:, None] & v.row_ok[None, :]),
        *_positions(v.rows),
        v.part.zeros(shape(v.BLOCK_M, ROWS)),
        *_dots_of_tile(source, has, term.dtype, v.wide, v.row_ok, [v.both_ok]),
        *store(in_u + (v.behind + v.rows)[None, :], v.part, "f32", [v.both_ok]),
    ]
    steps = [*begin(term), *v.use.each(fn("range", v.count), _step(term, place, k, piece))]
    return [*rows_of_tile(term), *each_kind(term, steps)]


def add_to_tile(term: Banked, offset: int, x: str, ok: Code | None) -> list[Code]:
    """``acc += s G z`` of the chains of a kind, for a tile of tokens and the rows of a program."""
    if not term.longest:
        return []
    in_u = v.u + v.tokens[:, None] * v.WIDTH + (offset + term.columns)
    sources = _sources(term, v.x + v.tokens[:, None] * v.K, in_u, x)
    both = [v.mine[:, None], ok and ok[None, :]]
    step = [
        *_sizes(term),
        *_positions(v.row),
        v.part.zeros(shape(v.BLOCK_M, v.BLOCK_N)),
        *(line for source, has, wide in sources for line in _dots_of_tile(source, has, term.dtype, wide, ok, both)),
        v.weight.let(field(v.use, 4, "f32")),
        v.acc.let(fn("tl.where", v.mine[:, None], v.part * v.weight, Code("0.0")), "+="),
        *_follow(term),
    ]
    return [*begin(term), *v.use.each(fn("range", v.count), step)]
