"""Checksums in the C++ emitter: ``gemv`` takes those of operands from which others are derived (`hoist_weights`).

A block of rows is hashed right after it was multiplied by the first tokens, as it lies in the first cache then: nobody
need read a weight once more from memory only to see whether it changed. Threads hash what they read, and add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gawscompile.codegen.spec import KernelSpec, Operand

CHECKSUM = (Path(__file__).parent / "checksum.cpp").read_text().strip()
"""Stands in kernels that take one, and in the op, which takes those of everything else."""


def can_sum(spec: KernelSpec, operand: Operand) -> bool:
    """Whether ``gemv`` reads `operand` by blocks of whole rows."""
    if operand.role == "weight":
        return not spec.projections[operand.projection].transposed
    return operand.role in ("a", "b", "c")


def begin(summed: Sequence[Operand]) -> list[str]:
    """A thread's own sums."""
    if not summed:
        return []
    names = ", ".join(f"sum_{o.name}" for o in summed)
    return ["    static_assert(ROWS == Checksum::ROWS);", f"    Checksum {names};"]


def sum_block(operand: Operand, block: str) -> str:
    """The rows of block number `block` join the sum of `operand`."""
    rows, columns = operand.shape
    return f"sum_{operand.name}.rows<{rows}, {columns}>({operand.name}, {block});"


def sum_rows(i: int, summed: Sequence[Operand]) -> list[str]:
    """The same for all that projection i's rows read, once: for the first tile of tokens."""
    own = [o for o in summed if o.projection == i and o.role != "a"]
    return [f"            if (t0 == 0) {sum_block(o, 'block')}" for o in own]


def each_block(blocks: str, lines: list[str], sums: list[str]) -> list[str]:
    """A loop over blocks of rows."""
    loop = f"          for (int64_t block = {blocks}; ++block)"
    return [f"{loop} {{", *lines, *sums, "          }"] if sums else [loop, *lines]


def finish(summed: Sequence[Operand]) -> list[str]:
    """All threads' sums become one."""
    return [
        f"    __atomic_fetch_add(sums + {at}, sum_{o.name}.folded(), __ATOMIC_RELAXED);" for at, o in enumerate(summed)
    ]
