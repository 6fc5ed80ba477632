"""Where the factors of resident adapters lie: runs of one pool's numbers, lent and taken back.

A run that is taken back may still be read by a forward that is under way, by the snapshot of the bank that it took when
it began. Such a run *rests* until every snapshot that is older is gone, and is lent again only then.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

from gawscompile.ir.banked import UNIT


class Arena:
    """Runs of ``[0, size)``, each beginning at a multiple of `UNIT`; the first that is long enough is lent. Callers of
    everything but `read_by` hold one lock. Where a device reads them, `asynchronous`, callers wake what is quiet."""

    def __init__(self, size: int, asynchronous: bool = False) -> None:
        self.size, self._asynchronous = size // UNIT * UNIT, asynchronous
        self._free = [(0, self.size)]  # (begin, end), in order, none touching the next
        self._resting: list[tuple[int, int, int]] = []  # (when it was taken back, begin, end)
        self._clock = itertools.count(1)
        self._readers: dict[int, tuple[int, weakref.ref[Any]]] = {}  # snapshots that are alive: when they were taken

    def read_by(self, snapshot: Any) -> None:
        """Whoever holds `snapshot` may read what is lent now, until that is garbage."""
        name, readers = id(snapshot), self._readers
        readers[name] = next(self._clock), weakref.ref(snapshot, lambda _: readers.pop(name))

    def take(self, counts: Sequence[int]) -> list[int] | None:
        """The beginnings of runs of so many numbers, one behind the other if there is such room, else wherever each
        fits. None where one does not."""
        self._wake()
        sizes = [whole(count) for count in counts]
        begin = self._first(sum(sizes))
        if begin is not None:
            return list(itertools.accumulate(sizes[:-1], initial=begin))
        before, found = list(self._free), []
        for size in sizes:
            if (begin := self._first(size)) is None:
                self._free = before
                return None
            found.append(begin)
        return found

    def _first(self, size: int) -> int | None:
        for i, (begin, end) in enumerate(self._free):
            if end - begin >= size:
                self._free[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def give_back(self, begins: Sequence[int], counts: Sequence[int]) -> None:
        """Runs that were taken are nobody's."""
        now = next(self._clock)
        self._resting += [(now, begin, begin + whole(count)) for begin, count in zip(begins, counts, strict=True)]

    @property
    def coming(self) -> int:
        """Numbers that are free, or will be once nobody reads them."""
        return sum(end - begin for begin, end in self._free) + sum(end - begin for _, begin, end in self._resting)

    @property
    def resting(self) -> bool:
        """Whether a run that was taken back may still be read."""
        self._wake()
        return bool(self._resting)

    def _wake(self) -> None:
        if not self._asynchronous:
            self.wake(self.quiet())

    def quiet(self) -> list[tuple[int, int, int]]:
        """Runs that rest, and that no snapshot is left for."""
        oldest = min([when for when, _ in list(self._readers.values())], default=next(self._clock))
        return [run for run in self._resting if run[0] < oldest]

    def wake(self, quiet: Sequence[tuple[int, int, int]]) -> None:
        """Runs that were `quiet` are free: whatever a device was still doing for them is done."""
        if not quiet:
            return
        self._resting = [run for run in self._resting if run not in quiet]
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, *((begin, end) for _, begin, end in quiet)]):
            if merged and merged[-1][1] == begin:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((begin, end))
        self._free = merged


def whole(count: int) -> int:
    """Numbers that a run of `count` takes."""
    return -(-count // UNIT) * UNIT
