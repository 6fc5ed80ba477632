"""What a bank's adapters add, in Triton (`ir.banked`, entries for a GPU).

Few tokens: a program of `shrink` finds its token's row in the schedule and takes columns of u, one in `PROGRAMS`, as
many as the row's adapters have. The rows of y then add B u, an entry after the other.

Many tokens: rows of a tile that have the same adapters share the loads of A and B. The first of them in the tile works
for all, and the others' numbers are masked. A mask is a zero here, and factors are finite.
"""

from __future__ import annotations

from gawscompile.codegen.triton_text import Code, Cut, fn, v, when
from gawscompile.ir.banked import BLOCK, FIELDS, UNIT
from gawscompile.ir.operators import Banked

PROGRAMS = 64
"""That take the columns of u of a token, for each bank: one column each, or several where a row has more ranks."""

RANKS = Cut(BLOCK, BLOCK)
"""The columns of u of an entry."""


def programs(term: Banked) -> int:
    """That take its columns of u."""
    return min(PROGRAMS, term.columns)


# --- The schedule ------------------------------------------------------------------------------------------


def row(term: Banked, number: Code) -> Code:
    """Where the entries of a row are."""
    return v.schedule + (number + 1) * ((term.width or 0) * FIELDS)


def row_of_token() -> Code:
    """The row of the one token of a program: `num_programs` tokens are `schedule[0]` rows."""
    return v.token // (fn("tl.num_programs", 0) // fn("tl.load", v.schedule))


def field(entry: Code | int, at: int, dtype: str = "") -> Code:
    """A number of an entry of the row."""
    loaded = fn("tl.load", v.uses + entry * FIELDS + at if isinstance(entry, Code) else v.uses + (entry * FIELDS + at))
    return Code(f"{loaded.text}.to(tl.float32, bitcast=True)", loaded.reads) if dtype == "f32" else loaded


def entries() -> Code:
    """How many the row has."""
    return field(0, 7)


def factor(entry: Code, at: int) -> Code:
    """Where A (at 0) or B (at 1) of an entry begins."""
    return v.pool + field(entry, at).to("i64") * UNIT


def each_kind(term: Banked, body: list[Code]) -> list[Code]:
    """`body` for the rows of a tile, but only once for all that have the same adapters: where `uses` are the entries,
    `mine` says which tokens have them, and `count` how many they are, which is 0 for a row that was worked for."""
    first = fn("tl.min", fn("tl.where", v.mine, v.of_row, v.one))
    steps = [
        v.uses.let(row(term, v.one)),
        v.key.let(field(0, 6)),
        v.mine.let(v.keys.equals(v.key) & v.token_ok),
        v.count.let(fn("tl.where", first.equals(v.one), entries(), 0)),
        *body,
    ]
    return v.one.each(fn("range", (v.token // v.each).to("i32"), v.end.to("i32")), steps)


def rows_of_tile(term: Banked) -> list[Code]:
    """What `each_kind` reads: the row of each token, and what it has in common with others."""
    return [
        v.each.let((v.token + v.left) // fn("tl.load", v.schedule)),
        v.of_row.let(((v.token + v.tokens) // v.each).to("i32")),
        *v.keys.load(row(term, v.of_row) + 6, [v.token_ok], "i32", "i32"),
        v.end.let((v.token + fn("tl.minimum", v.left, v.BLOCK_M) - 1) // v.each + 1),
    ]


# --- u and y -----------------------------------------------------------------------------------------------


def has_ranks(term: Banked, entry: Code) -> list[Code]:
    """The test whether an entry is a block of ranks, where others can be."""
    return [Code("-1") < field(entry, 2)] * bool(term.longest)


def unless_mode(term: Banked, body: list[Code]) -> list[Code]:
    """`body` for an entry that is a block of ranks."""
    return when(has_ranks(term, v.use)[0], body) if term.longest else body


def columns(entry: Code, rank: Code, product: Code) -> list[Code]:
    """``found``, columns of u: ``s A x``, a bias's weight, or nothing."""
    nothing = Code("0.0")
    return [
        v.ranks.let(field(entry, 2)),
        v.scale.let(field(entry, 4, "f32")),
        v.weight.let(field(entry, 5, "f32")),
        v.found.let(fn("tl.where", rank < v.ranks, product * v.scale, nothing)),
        v.found.let(fn("tl.where", rank.equals(v.ranks), v.weight, nothing), "+="),
    ]


def add_one(term: Banked, offset: int, ok: Code | None, before: list[Code], modes: list[Code]) -> list[Code]:
    """``out += B u + d ⊙ product`` of one token's adapters, for the rows of a program. `modes` is done for each entry,
    `before` before the first (`triton_bank_modes`)."""
    dora = fn("tl.where", v.at[None, :].equals(v.ranks + 1), v.bank_bs, Code("0.0"))
    step = [
        v.from_b.let(factor(v.use, 1) + v.first * BLOCK),
        *v.bank_bs.load(v.from_b + v.rows[:, None] * BLOCK + v.at[None, :], [ok], term.dtype),
        *v.bank_us.load(v.u + offset + v.use * BLOCK + v.at, [], "f32"),
        v.out.let(fn("tl.sum", v.bank_bs * v.bank_us[None, :], axis=1), "+="),
        v.ranks.let(field(v.use, 2)),
        v.weight.let(field(v.use, 5, "f32")),
        v.dora.let(fn("tl.sum", dora, axis=1) * v.weight, "+="),
    ]
    return [
        v.uses.let(row(term, row_of_token())),
        v.at.let(fn("tl.arange", 0, BLOCK)),
        v.dora.zeros(Code("(BLOCK_N,)", frozenset(["BLOCK_N"]))),
        *before,
        *v.use.each(fn("range", entries()), [*unless_mode(term, step), *modes]),
        v.out.let(v.dora * v.product, "+="),
    ]


def add_tile(term: Banked, offset: int, common: str, ok: Code | None, modes: list[Code]) -> list[Code]:
    """``acc += B u + d ⊙ acc`` for a tile of tokens and the rows of a program, where acc is W x. `modes` is done for
    each kind of tokens (`triton_bank_modes`)."""
    from_b = v.from_b.let(factor(v.use, 1) + v.first * BLOCK)
    u = v.u + v.tokens[:, None] * v.WIDTH + (v.use * BLOCK + offset + v.at)[None, :]
    of_dora = [
        from_b,
        v.weight.let(field(v.use, 5, "f32")),
        *v.ds.load(v.from_b + v.rows * BLOCK + v.ranks + 1, [ok], term.dtype),
        v.dora.let(v.ds * v.weight, "+="),
    ]
    scale = [v.ranks.let(field(v.use, 2)), *when(v.ranks < BLOCK - 1, of_dora)]
    step = [
        from_b,
        *v.bank_us.load(u, [v.mine[:, None]], "f32", common),
        *v.bank_bs.load(v.from_b + v.rows[None, :] * BLOCK + v.at[:, None], [ok and ok[None, :]], term.dtype, common),
        *v.acc.dot(v.bank_us, v.bank_bs, common, accumulate=True),
    ]
    body = [
        v.dora.zeros(Code("(BLOCK_N,)", frozenset(["BLOCK_N"]))),
        *v.use.each(fn("range", v.count), unless_mode(term, scale)),
        v.acc.let(fn("tl.where", v.mine[:, None], v.acc * v.dora[None, :], Code("0.0")), "+="),
        *v.use.each(fn("range", v.count), unless_mode(term, step)),
        *modes,
    ]
    return [v.at.let(fn("tl.arange", 0, BLOCK)), *rows_of_tile(term), *each_kind(term, body)]
