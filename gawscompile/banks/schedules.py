"""Schedules (`ir.banked`) of all modules of a bank, from what is chosen for each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gawscompile.banks.residents import Held
from gawscompile.ir.banked import FIELDS, PAD

Rows = tuple[tuple[tuple[Held, float], ...], ...]
"""What is active: the adapters of each row with their weights. All are resident."""


def made(chosen: Rows, rows: int, modules: int, width: int, compact: bool) -> np.ndarray:
    """``[modules, rows + 1, width, FIELDS]`` for a batch of `rows`, each choice for as many rows one after the other.
    `compact`: a row's entries are those that a module has, and no others."""
    found = np.zeros((modules, rows + 1, width, FIELDS), np.int32)
    each, room = rows // len(chosen), np.zeros(modules, np.int32)
    first = {row: number for number, row in reversed(list(enumerate(chosen)))}
    for number, row in enumerate(chosen):
        if not row:
            found[:, 1 + number * each : 1 + (number + 1) * each, 0, 6] = first[row] * each
            continue
        entries, counts = _entries(row, compact)
        mine = found[:, 1 + number * each : 1 + (number + 1) * each]
        mine[:, :, : entries.shape[1]] = entries[:, None, :width]
        mine[:, :, 0, 6] = first[row] * each
        mine[:, :, 0, 7] = counts[:, None]
        room = np.maximum(room, np.where(entries[:, :, 2] < 0, 0, entries[:, :, 3]).sum(axis=1))
    found[:, 0, 0, 0], found[:, 0, 0, 1] = rows, width
    found[:, 0, 0, 2] = -(-room // PAD) * PAD
    return found


def most(row: Sequence[tuple[Held, float]], compact: bool) -> int:
    """Entries that any module has for a row."""
    if not compact:
        return sum(held.entries.shape[1] for held, _ in row if held.entries is not None)
    counts = [(held.entries[:, :, 3] > 0).sum(axis=1) for held, _ in row if held.entries is not None]
    return int(np.max(sum(counts))) if counts else 0


def number_of(rows: Rows) -> int:
    """The number under which compiled graphs keep the schedules of `rows`: that of the only adapter, -1 for no adapter.
    0 for mixes, weighted adapters and rows that differ, whose schedules go at the next switch."""
    if len(rows) > 1 or len(rows[0]) > 1:
        return 0
    return next((held.number if weight == 1.0 else 0 for held, weight in rows[0]), -1)


def passed_on(row: Sequence[tuple[Held, float]]) -> np.ndarray:
    """Numbers that modes of a row make for the next ones of their chains, by module."""
    parts = [held.entries for held, _ in row if held.entries is not None]
    if not parts:
        return np.zeros(1, np.int64)
    entries = np.concatenate(parts, axis=1).astype(np.int64)
    before, rows, after = entries[:, :, 1], entries[:, :, 2], entries[:, :, 5]
    found: np.ndarray = np.where((rows < 0) & (after < 0), before * rows * after, 0).sum(axis=1)
    return found


def _entries(row: Sequence[tuple[Held, float]], compact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of a row's adapters, weighted, ``[modules, entries, FIELDS]``, and how many each module has."""
    parts = []
    for held, weight in row:
        assert held.entries is not None
        part = held.entries.copy()
        real, factor = part.view(np.float32), np.float32(weight * held.scale)
        real[:, :, 4] *= factor
        np.multiply(real[:, :, 5], factor, out=real[:, :, 5], where=part[:, :, 2] >= 0)  # a mode's is no real number
        parts.append(part)
    found = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    there = found[:, :, 3] > 0
    if compact:
        order = np.argsort(~there, axis=1, kind="stable")
        return np.take_along_axis(found, order[:, :, None], axis=1), there.sum(axis=1)
    return found, np.where(there.any(axis=1), found.shape[1], 0)
