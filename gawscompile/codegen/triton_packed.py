"""Packed weights in Triton (`ir.packed`): codes are loaded where other weights are, and become numbers in registers.

A byte of a weight of 4 bits has two columns that follow each other, and is loaded once.

Few tokens: rows are taken in pieces of `STEP` columns, which share a scale whatever the group. A thread has most of a
piece, or all of it, so what its products come to is scaled once, and a tile of scales is as small as one of pieces.
The upper halves of bytes meet x's even features, and the lower ones its odd features, so no thread needs another's.

Many tokens: a step over K lies within one group, so each row has one scale in it. The halves of bytes are put in order
there, on the way to shared memory that a `tl.dot` makes anyway. Weights are scaled in fp32 and rounded to x's dtype, in
which the dot takes them: as precise as a weight of that dtype.

Scales of whole rows, without zeros, come after the rows are summed up.
"""

from __future__ import annotations

from collections.abc import Sequence

from gawscompile.codegen.triton_text import Code, Cut, cut, fn, function, shape, v
from gawscompile.ir.packed import OUTER, READ, STEP, Packed
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import SpecError, dtype_of


def check(spec: KernelSpec) -> None:
    """Raises `SpecError`, naming the coding, where no kernel reads a weight's."""
    for p in spec.projections:
        if p.packed and p.packed.kept.layout not in READ["cuda"]:
            raise SpecError(f"no kernel on a GPU reads weights of the coding {p.packed.coding}: {spec}")


def _pairs(term: Packed) -> bool:
    return term.kept.layout == "pairs"


def _groups(term: Packed) -> int:
    """Of a row."""
    return term.k // term.group


def _row(term: Packed) -> Code:
    """The bytes of a row's codes."""
    return v.K // 2 if _pairs(term) else v.K


# --- Levels ------------------------------------------------------------------------------------------------


def helpers(projections: Sequence[Sum]) -> tuple[str, ...]:
    """The functions that make levels of codes of 4 bits."""
    terms = [p.packed for p in projections if p.packed and p.packed.kept.levels]
    return tuple(dict.fromkeys(_levels(term.coding, term.kept.levels) for term in terms))


def _levels(name: str, levels: Sequence[float]) -> str:
    """A tree of choices, bit by bit from the lowest: a kernel has no table that needs no load."""
    lines = []
    values = [repr(level) for level in levels]
    for bit in range(4):
        lines.append(f"clear{bit} = (codes & {1 << bit}) == 0")
        chosen = [f"level{bit}_{i}" for i in range(len(values) // 2)]
        for i, choice in enumerate(chosen):
            lines.append(f"{choice} = tl.where(clear{bit}, {values[2 * i]}, {values[2 * i + 1]})")
        values = chosen
    return function("@triton.jit", name, ["codes"], f"The levels of {name}.", [*lines, f"return {values[0]}"])


def _unpacked(term: Packed) -> list[Code]:
    """The levels that `codes` have: of a byte's first column and, where it has two, of its second."""
    if not _pairs(term):
        return [v.codes]
    return [fn(term.coding, half) for half in (Code("codes >> 4", v.codes.reads), v.codes & 15)]


# --- Scales ------------------------------------------------------------------------------------------------


def _late(term: Packed) -> bool:
    """Whether rows are scaled once they are summed up."""
    return term.scales is not None and term.group == term.k and term.zeros is None


def _moved(term: Packed) -> list[Code]:
    """Move what is read to the first row."""
    by_row = v.first * _groups(term)
    return [
        v.w.let(v.first * _row(term), "+="),
        *[v.scales.let(by_row, "+=")] * (term.scales is not None),
        *[v.zeros.let(by_row, "+=")] * (term.zeros is not None),
    ]


def _scales(term: Packed, at: Code, ok: list[Code | None]) -> list[Code]:
    """``scale``, those that lie `at` from the first row's on."""
    factor = Code(repr(term.factor))
    if term.levels is None:
        lines = v.scale.load(v.scales + at, ok, dtype_of(term.scales))
    else:
        outer = v.outer + (v.first * _groups(term) + at) // OUTER
        lines = [
            *v.coded.load(v.scales + at, ok, "u8", "i32"),
            *v.scale.load(v.levels + v.coded, ok, dtype_of(term.levels)),
            *v.scale.load(outer, ok, dtype_of(term.outer), sign="*="),
            *v.scale.load(v.offset, [], dtype_of(term.offset), sign="+="),
        ]
    return lines if term.factor == 1.0 else [*lines, v.scale.let(factor, "*=")]


def _zeros(term: Packed, at: Code, ok: list[Code | None]) -> list[Code]:
    """``zero``, of the same places."""
    return v.zero.load(v.zeros + at, ok, dtype_of(term.zeros)) if term.zeros is not None else []


def _scaled_rows(term: Packed, total: Code, rows: Cut, view: tuple[slice | None, ...] | None) -> list[Code]:
    """`total` times the scales of its rows, where they come late."""
    if not _late(term):
        return []
    lines = _scales(term, v.rows, [rows.mask(v.row_ok)])
    return [*lines, total.let(v.scale[view] if view else v.scale, "*=")]


# --- Few tokens --------------------------------------------------------------------------------------------


def pieces(k: int, columns: Sequence[int], elements: int) -> Cut:
    """How the pieces of a row are cut in steps of up to `elements` columns, and one of `columns` if one divides."""
    return cut(k // STEP, [block // STEP for block in columns if block <= elements])


def gemv(term: Packed, rows: Cut, steps: Cut, range_: Code, x: str) -> list[Code]:
    """``out`` = W x of one token, for the rows of a program."""
    each = STEP // 2 if _pairs(term) else STEP  # bytes of a piece
    tile = Code(f"(BLOCK_N, BLOCK_S, {each})", frozenset(["BLOCK_N", "BLOCK_S"]))
    codes = v.w + v.rows[:, None, None] * _row(term) + v.at[None, :, :]
    pieces_ok = [steps.mask(v.piece_ok[None, :, None])]
    ok = [rows.mask(v.row_ok[:, None]), steps.mask(v.piece_ok[None, :])]
    wide = [rows.mask(v.row_ok[:, None, None]), *pieces_ok]
    per_piece = term.scales is not None and not _late(term)
    # whole rows have one place each, else the pieces of a group have one
    group = v.pieces // (term.group // STEP)
    at = v.rows[:, None] * _groups(term) + group[None, :] if _groups(term) > 1 else v.rows[:, None]
    scale_ok = ok if _groups(term) > 1 else ok[:1]
    products = []
    for i, made in enumerate(_unpacked(term)):
        features = v.x + v.at[None, :, :] * (2 if _pairs(term) else 1) + i
        value = made - v.zero[:, :, None] if term.zeros is not None else made
        products += [
            *v[f"x{i}"].load(fn("tl.broadcast_to", features, tile), pieces_ok, x),
            v.products.let(value * v[f"x{i}"], "+=" if i else "="),
        ]
    sums = fn("tl.sum", v.products, axis=2)
    step = [
        *steps.index(v.pieces, v.piece_ok, v.k // STEP, None, v.BLOCK_S),
        v.at.let(v.pieces[:, None] * each + v.byte[None, :]),
        *v.codes.load(codes, wide, term.kept.dtype, "i32" if _pairs(term) else "f32"),
        *_zeros(term, at, scale_ok),
        *products,
        *(_scales(term, at, scale_ok) if per_piece else []),
        v.acc.let(sums * v.scale if per_piece else sums, steps.sign),
    ]
    return [
        v.BLOCK_S.constant(steps.block),
        *[v.BLOCK_K.constant(steps.block * STEP)] * (steps.steps > 1),
        *_moved(term),
        v.byte.let(fn("tl.arange", 0, each)),
        *[v.acc.zeros(shape(v.BLOCK_N, v.BLOCK_S))] * (steps.steps > 1),
        *steps.loop(v.k, range_, step),
        v.out.let(fn("tl.sum", v.acc, axis=1)),
        *_scaled_rows(term, v.out, rows, None),
    ]


# --- Many tokens -------------------------------------------------------------------------------------------


def columns_of_tile(term: Packed, blocks: Sequence[int]) -> Cut:
    """How K is cut in steps that lie within a group, of one of `blocks` if one does."""
    within = [block for block in blocks if block >= STEP and term.group % block == 0]
    return cut(term.k, [*within, STEP][:1])


def tile(term: Packed, rows: Cut, cols: Cut, x: str) -> list[Code]:
    """``acc`` = x Wᵀ of a tile of tokens and the rows of a program."""
    pairs, row_ok = _pairs(term), [rows.mask(v.row_ok)]
    at = v.rows * _groups(term) + v.k // term.group if _groups(term) > 1 else v.rows
    scaled = term.scales is not None and not _late(term)
    column, row = (slice(None), None), (None, slice(None))
    by, along = (column, row) if pairs else (row, column)  # halves of bytes are put in order along the last axis
    codes = v.w + v.rows[by] * _row(term) + (v.byte if pairs else v.cols)[along]
    ws = fn("tl.interleave", *_unpacked(term)) if pairs else v.codes
    ws = ws - v.zero[by] if term.zeros is not None else ws
    ws = ws * v.scale[by] if scaled else ws
    step = [
        *cols.index(v.cols, v.col_ok, v.k, None, v.BLOCK_K),
        *(Cut(cols.size // 2, cols.block // 2).index(v.byte, v.byte_ok, v.k // 2) if pairs else []),
        *v.xs.load(v.x + v.tokens[:, None] * v.K + v.cols[None, :], [v.token_ok[:, None]], x, x),
        *v.codes.load(codes, [row_ok[0] and v.row_ok[by]], term.kept.dtype, "i32" if pairs else "f32"),
        *_zeros(term, at, row_ok),
        *(_scales(term, at, row_ok) if scaled else []),
        v.ws.let(ws.to(x, "f32")),
        *v.acc.dot(v.xs, fn("tl.trans", v.ws) if pairs else v.ws, x, accumulate=cols.steps > 1),
    ]
    return [
        v.BLOCK_K.constant(cols.block),
        *_moved(term),
        *[v.acc.zeros(shape(v.BLOCK_M, v.BLOCK_N))] * (cols.steps > 1),
        *cols.loop(v.k, fn("range", 0, v.K, v.BLOCK_K), step),
        *_scaled_rows(term, v.acc, rows, (None, slice(None))),
    ]
