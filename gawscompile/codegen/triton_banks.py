"""What a bank's adapters add, in Triton (`ir.banked`, entries for a GPU).

Few tokens: a program of `shrink` finds its token's row in the schedule and takes columns of u, one in `PROGRAMS`, as
many as the row's adapters have. The rows of y then add B u, an entry after the other.

Many tokens: rows of a tile that have the same adapters share the loads of A and B. The first of them in the tile works
for all, and the others' numbers are masked. A mask is a zero here, and factors are finite.
"""

from __future__ import annotations

from gawscompile.codegen.triton_text import Code, Cut, fn, v
from gawscompile.ir.banked import BLOCK, FIELDS, UNIT
from gawscompile.ir.operators import Banked

PROGRAMS = 64
"""That take the columns of u of a token, for each bank: one column each, or several where a row has more ranks."""


def programs(term: Banked) -> int:
    """That take its columns of u."""
    return min(PROGRAMS, term.columns)


def field(uses: Code, entry: Code | int, at: int, dtype: str = "") -> Code:
    """A number of an entry."""
    loaded = fn("tl.load", uses + entry * FIELDS + at if isinstance(entry, Code) else uses + (entry * FIELDS + at))
    return Code(f"{loaded.text}.to(tl.float32, bitcast=True)", loaded.reads) if dtype == "f32" else loaded


def factor(pool: Code, uses: Code, entry: Code, at: int) -> Code:
    """Where A (at 0) or B (at 1) of an entry begins."""
    return pool + field(uses, entry, at).to("i64") * UNIT


def row(term: Banked, schedule: Code, number: Code) -> Code:
    """Where the entries of a row are."""
    return schedule + (number + 1) * ((term.width or 0) * FIELDS)


def row_of_token(schedule: Code) -> Code:
    """The row of the one token of a program: `num_programs` tokens are `schedule[0]` rows."""
    return v.token // (fn("tl.num_programs", 0) // fn("tl.load", schedule))


def columns(uses: Code, entry: Code, rank: Code, product: Code) -> list[Code]:
    """``found``, columns of u: ``s A x``, a bias's weight, or nothing."""
    nothing = Code("0.0")
    return [
        v.ranks.let(field(uses, entry, 2)),
        v.scale.let(field(uses, entry, 4, "f32")),
        v.weight.let(field(uses, entry, 5, "f32")),
        v.found.let(fn("tl.where", rank < v.ranks, product * v.scale, nothing)),
        v.found.let(fn("tl.where", rank.equals(v.ranks), v.weight, nothing), "+="),
    ]


def add_one(term: Banked, j: int, offset: int, ok: Code | None) -> list[Code]:
    """``out += B u`` of one token's adapters, for the rows of a program."""
    uses, use, at, b, bs, us = _names(j, "uses", "use", "at", "from_b", "bank_bs", "bank_us")
    schedule = v[f"schedule{j}"]
    step = [
        b.let(factor(v[f"pool{j}"], uses, use, 1) + v.first * BLOCK),
        *bs.load(b + v.rows[:, None] * BLOCK + at[None, :], [ok], term.dtype),
        *us.load(v.u + offset + use * BLOCK + at, [], "f32"),
        v.out.let(fn("tl.sum", bs * us[None, :], axis=1), "+="),
    ]
    return [
        uses.let(row(term, schedule, row_of_token(schedule))),
        at.let(fn("tl.arange", 0, BLOCK)),
        *use.each(fn("range", field(uses, 0, 7)), step),
    ]


def each_kind(term: Banked, j: int | str, schedule: Code, body: list[Code]) -> list[Code]:
    """`body` for the rows of a tile, but only once for all that have the same adapters: where `uses` are the entries,
    `mine` says which tokens have them, and `count` how many they are, which is 0 for a row that was worked for."""
    each, rows, keys, one, end = _names(j, "each", "of_row", "keys", "one", "end")
    uses, mine, key, count = _names(j, "uses", "mine", "key", "count")
    first = fn("tl.min", fn("tl.where", mine, rows, one))
    steps = [
        uses.let(row(term, schedule, one)),
        key.let(field(uses, 0, 6)),
        mine.let(keys.equals(key) & v.token_ok),
        count.let(fn("tl.where", first.equals(one), field(uses, 0, 7), 0)),
        *body,
    ]
    return [
        each.let((v.token + v.left) // fn("tl.load", schedule)),
        rows.let(((v.token + v.tokens) // each).to("i32")),
        *keys.load(row(term, schedule, rows) + 6, [v.token_ok], "i32", "i32"),
        end.let((v.token + fn("tl.minimum", v.left, v.BLOCK_M) - 1) // each + 1),
        *one.each(fn("range", (v.token // each).to("i32"), end.to("i32")), steps),
    ]


def _names(j: int | str, *names: str) -> list[Code]:
    """Names that no other term uses."""
    return [v[f"{name}{j}"] for name in names]


def add_tile(term: Banked, j: int, offset: int, common: str, ok: Code | None) -> list[Code]:
    """``acc += B u`` for a tile of tokens and the rows of a program."""
    uses, use, at, b, bs, us = _names(j, "uses", "use", "at", "from_b", "bank_bs", "bank_us")
    mine, count = _names(j, "mine", "count")
    u = v.u + v.tokens[:, None] * v.WIDTH + (use * BLOCK + offset + at)[None, :]
    step = [
        *us.load(u, [mine[:, None]], "f32", common),
        b.let(factor(v[f"pool{j}"], uses, use, 1) + v.first * BLOCK),
        *bs.load(b + v.rows[None, :] * BLOCK + at[:, None], [ok], term.dtype, common),
        *v.acc.dot(us, bs, common, accumulate=True),
    ]
    body = use.each(fn("range", count), step)
    return [at.let(fn("tl.arange", 0, BLOCK)), *each_kind(term, j, v[f"schedule{j}"], body)]


RANKS = Cut(BLOCK, BLOCK)
"""The columns of u of an entry."""
