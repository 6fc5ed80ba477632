"""What a bank says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST_SAID = 20
"""Adapters, and modules, that a report has lines of."""


@dataclass(frozen=True)
class Info:
    """An adapter of a bank, as it was when it was asked for. `rank`: the largest of its modules, 0 of a Kronecker
    adapter. `bytes`: in the pool. `used`: when it was last activated, by `time.time`, 0.0 if never."""

    name: str
    rank: int
    bytes: int
    targets: tuple[str, ...]
    scale: float
    resident: bool
    pinned: bool
    active: bool
    used: float


def notes(bank: Any) -> list[str]:
    """Lines of `gawscompile.explain`: modules, memory, and the adapters that have a part of it."""
    found = sorted(bank, key=lambda info: (not info.active, -info.bytes))
    resident = [info for info in found if info.resident]
    used, whole = sum(info.bytes for info in found), bank.shared.pool.nbytes
    dtype = str(bank.shared.pool.dtype).removeprefix("torch.")
    lines = [
        f"adapter bank: {len(bank.modules)} modules, {len(found)} adapters, {len(resident)} of them resident in "
        f"{used / 2**20:.1f} of {whole / 2**20:.0f} MB of {dtype}"
    ]
    for info in resident[:MOST_SAID]:
        state = ", ".join(["active"] * info.active + ["pinned"] * info.pinned) or "idle"
        kind = f"rank {info.rank}" if info.rank else "Kronecker"
        size = f"{kind} on {len(info.targets)} modules, scale {info.scale:g}, {info.bytes / 2**20:.2f} MB"
        lines.append(f"adapter bank: {info.name}: {size}, {state}")
    if more := resident[MOST_SAID:]:
        lines.append(f"adapter bank: and {len(more)} more")
    left = list(bank.left_out.items())[:MOST_SAID]
    return lines + [f"adapter bank: {path} is not in it: {why}" for path, why in left]
