"""Packed weights in the C++ emitter: the types of `packed.cpp` that say how a group's are kept."""

from __future__ import annotations

from pathlib import Path

from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.packed import Packed
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import dtype_of

_HERE = Path(__file__).parent
_ORDERS, _PACKED, _DOTS, _ROWS, _TILES = (
    (_HERE / f"{name}.cpp").read_text().strip()
    for name in ("packed_orders", "packed", "packed_dots", "packed_rows", "packed_tiles")
)


def prelude(spec: KernelSpec) -> list[str]:
    """What kernels of a group with packed weights build on."""
    terms = packed_of(spec).values()
    parts = [_ORDERS, _PACKED, _DOTS] * bool(terms) + [_ROWS] * any(term.summed_apart for term in terms)
    return parts + [_TILES] * any(term.kept.layout == "tiles" for term in terms)


def constants(spec: KernelSpec) -> list[str]:
    """The levels of a group's codes of 4 bits."""
    lines = []
    for kept in dict.fromkeys(term.kept for term in packed_of(spec).values()):
        if kept.layout in ("pairs", "halves"):
            levels = ", ".join(f"{float(level)}f" for level in kept.levels or range(16))
            lines.append(f"constexpr float {kept.name}[16] = {{{levels}}};")
    return lines


def _codes(term: Packed) -> str:
    """The C++ type of how its codes lie and what they stand for."""
    kept = term.kept
    if kept.layout == "bytes":
        return f"Byte<{CPP_TYPES[kept.dtype]}>"
    return f"{'Pairs' if kept.layout == 'pairs' else 'Halved'}<{kept.name}>"


def packed_of(spec: KernelSpec) -> dict[int, Packed]:
    """The packed bases of a group, by their projections' numbers."""
    return {i: p.packed for i, p in enumerate(spec.projections) if p.packed is not None}


def in_blocks(term: Packed | None) -> bool:
    """Whether it lies in blocks or tiles of rows, which are summed up together."""
    return term is not None and term.kept.by_groups


def weights(spec: KernelSpec) -> list[str]:
    """Each packed weight's part of a call."""
    lines = []
    for i, term in packed_of(spec).items():
        groups, factor = term.k // term.group, f"{term.factor!r}f"
        scales = zeros = "Nothing{}"
        if term.kept.layout == "blocks":
            lines.append(f"  const auto q{i} = blocks_of<K, N{i}, {term.group}>(w{i}, wt{i}, ws{i});")
            continue
        if term.kept.layout == "tiles":
            full = str(spec.x == "f32").lower()
            sizes = f"K, N{i}, {term.group}, {term.kept.rows}, {full}"
            lines.append(f"  const auto q{i} = tiles_of<{sizes}>(w{i}, ws{i}, {_order(i, term)});")
            continue
        if term.levels is not None:
            scales = f"Coded<{groups}>{{ws{i}, wl{i}, wo{i}, *wb{i}, {factor}}}"
        elif term.scales is not None:
            scales = f"Plain<{groups}, {CPP_TYPES[dtype_of(term.scales)]}>{{ws{i}, {factor}}}"
        if term.zeros is not None:
            zeros = f"Plain<{groups}, {CPP_TYPES[dtype_of(term.zeros)]}>{{wz{i}, 1.0f}}"
        kept = f"packed<K, N{i}, {term.group}, {_codes(term)}>"
        lines.append(f"  const auto q{i} = {kept}(w{i}, {scales}, {zeros});")
    return lines


def _order(i: int, term: Packed) -> str:
    return "nullptr" if term.order is None else f"wi{i}"


def activations(spec: KernelSpec) -> list[str]:
    """x in the orders in which the group's codes are read: a thread's own."""
    terms = packed_of(spec)
    kinds = {_ordered(term): term for term in terms.values() if not in_blocks(term)}
    tiles = {_in_tiles(i, term): (i, term) for i, term in terms.items() if term.kept.layout == "tiles"}
    return [
        f"    const auto {name} = {'halved' if t.summed_apart else 'ordered'}<{_codes(t)}, K, {t.group}>(x, m);"
        for name, t in kinds.items()
    ] + [
        f"    const auto {name} = in_tiles<{i if t.order is not None else -1}>(q{i}, x, m);"
        for name, (i, t) in tiles.items()
    ]


def apart(i: int, term: Packed) -> str:
    """A weight whose rows are summed up in memory, as `rows_apart` takes it."""
    if term.kept.layout == "tiles":
        return f"by_blocks(q{i}, {_in_tiles(i, term)})"
    return f"by_blocks(q{i}, x)" if in_blocks(term) else f"by_halves(q{i}, {_ordered(term)})"


def _in_tiles(i: int, term: Packed) -> str:
    """x as a weight in tiles reads it: one for all whose groups have one size and that have no order of their own."""
    return f"x_by{term.group}" if term.order is None else f"x_of{i}"


def dot(i: int, term: Packed) -> str:
    """W x, as a part of a projection."""
    return f"unpacked(q{i}, {_ordered(term)})"


def _ordered(term: Packed) -> str:
    """x, as this weight reads it."""
    return f"x_{term.kept.name}_{term.group}{'_apart' * term.summed_apart}"


def row_bytes(term: Packed) -> int:
    """Of a row of codes, with its scales."""
    return max(1, term.bytes // term.n)
