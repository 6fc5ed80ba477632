"""Packed weights in the C++ emitter: the types of `packed.cpp` that say how a group's are kept."""

from __future__ import annotations

from pathlib import Path

from gawscompile.ir.operators import Packed
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import dtype_of

PACKED = (Path(__file__).parent / "packed.cpp").read_text().strip()

_CODES = {
    "int8": "Byte<int8_t>",
    "uint8": "Byte<uint8_t>",
    "nf4": "Nibbles<NF4>",
    "fp4": "Nibbles<FP4>",
    "uint4_halves": "Split<UINT4>",
}


def packed_of(spec: KernelSpec) -> dict[int, Packed]:
    """The packed bases of a group, by their projections' numbers."""
    return {i: p.packed for i, p in enumerate(spec.projections) if p.packed is not None}


def in_blocks(term: Packed | None) -> bool:
    """Whether it lies in blocks of rows, which are summed up together."""
    return term is not None and term.kept.layout == "blocks"


def weights(spec: KernelSpec, types: dict[str, str]) -> list[str]:
    """Each packed weight's part of a call. `types` are C++'s by a dtype's name."""
    lines = []
    for i, term in packed_of(spec).items():
        groups, factor = term.k // term.group, f"{term.factor!r}f"
        scales = zeros = "Nothing{}"
        if term.levels is not None:
            scales = f"Coded<{groups}>{{ws{i}, wl{i}, wo{i}, *wb{i}, {factor}}}"
        elif term.scales is not None:
            scales = f"Plain<{groups}, {types[dtype_of(term.scales)]}>{{ws{i}, {factor}}}"
        if term.zeros is not None:
            zeros = f"Plain<{groups}, {types[dtype_of(term.zeros)]}>{{wz{i}, 1.0f}}"
        if in_blocks(term):
            lines.append(f"  const auto q{i} = blocks_of<K, N{i}, {term.group}>(w{i}, wt{i}, ws{i});")
            continue
        kept = f"packed<K, N{i}, {term.group}, {_CODES[term.coding]}>"
        lines.append(f"  const auto q{i} = {kept}(w{i}, {scales}, {zeros});")
    return lines


def activations(spec: KernelSpec) -> list[str]:
    """x in the orders in which the group's codes are read: a thread's own."""
    kinds = dict.fromkeys(_CODES[term.coding] for term in packed_of(spec).values() if not in_blocks(term))
    return [f"    const float* {_ordered(kind)} = ordered<{kind}, K>(x, m);" for kind in kinds]


def apart(i: int, term: Packed) -> tuple[str, str]:
    """What sums rows of a weight up in memory, and the x that it reads."""
    return ("by_blocks", "x") if in_blocks(term) else ("by_halves", _ordered(_CODES[term.coding]))


def dot(i: int, term: Packed) -> str:
    """W x, as a part of a projection."""
    return f"unpacked(q{i}, {_ordered(_CODES[term.coding])})"


def _ordered(kind: str) -> str:
    return "x_" + "".join(c if c.isalnum() else "_" for c in kind).strip("_").lower()


def row_bytes(term: Packed) -> int:
    """Of a row of codes, with its scales."""
    return max(1, term.bytes // term.n)
