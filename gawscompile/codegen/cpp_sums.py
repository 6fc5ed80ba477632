"""Checksums in the C++ emitter: ``gemv`` takes those of operands from which others are derived (`hoist_weights`).

Rows that `stream` reads are hashed on the way (`sums.cpp`), panels of columns and blocks of B's rows right after they
were multiplied by the first tokens, as they lie in a cache then: nobody need read a weight once more from memory only
to see whether it changed. Threads hash what they read, and add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gawscompile.ir.spec import KernelSpec, Operand

_HERE = Path(__file__).parent
CHECKSUM = (_HERE / "checksum.cpp").read_text().strip()
"""Stands in kernels that take one, and in the op, which takes those of everything else."""

SUMS = (_HERE / "sums.cpp").read_text().strip()
"""What those kernels have besides."""


def takes(operand: Operand) -> bool:
    """Whether ``gemv`` takes a checksum of `operand` as it reads it."""
    return operand.place.kind == "matrix" and operand.place.stage != "chain"


def unit_rows(spec: KernelSpec, operand: Operand) -> int:
    """Rows that are hashed together: one of those that `stream` reads, a block of B's short ones; 0: by columns."""
    if operand.role == "weight":
        return 0 if spec.projections[operand.projection].transposed else 1
    return 1 if operand.role == "a" else 4


def begin(summed: Sequence[Operand]) -> list[str]:
    """A thread's own sums."""
    return [f"    Checksum {', '.join(f'sum_{o.name}' for o in summed)};"] if summed else []


def finish(summed: Sequence[Operand]) -> list[str]:
    """All threads' sums become one."""
    return [
        f"    __atomic_fetch_add(sums + {at}, sum_{o.name}.folded(), __ATOMIC_RELAXED);" for at, o in enumerate(summed)
    ]
