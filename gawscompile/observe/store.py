"""Records of the graphs compiled in this process, kept on disk too, for processes that compile from a warm cache."""

from __future__ import annotations

import logging
import threading

from gawscompile import cache
from gawscompile.ir.records import GraphRecord
from gawscompile.observe.dump import Dump
from gawscompile.runtime import forks

log = logging.getLogger("gawscompile")

AGAIN = "To see its passes again, compile once with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"


class Store:
    """The records in order of compilation."""

    def __init__(self) -> None:
        self._records: list[GraphRecord] = []
        self._kept: dict[str, str] = {}  # by key, as JSON: files may be deleted during a process's life
        self._lock = threading.Lock()

    def lacks(self, key: str, dump: bool) -> bool:
        """Whether a graph that came from a cache has no record, here or on disk, or no `dump` where one is wanted."""
        return self._find(key) is None or (dump and not self._dumps(key))

    def compiled(self, key: str, record: GraphRecord | None) -> GraphRecord:
        """A graph was compiled: with its record if our passes ran, with none if it came from a cache."""
        if record is not None:
            with self._lock:
                self._kept[record.key] = record.to_json()
            self._write(record)
        else:
            found = self._find(key)
            note = f"compiled from a warm cache whose record is gone. {AGAIN}"
            record = GraphRecord(key, notes=[note], lost=True) if found is None else GraphRecord.from_json(found)
        with self._lock:
            self._records.append(record)
        return record

    def matches(self) -> int:
        """Rewrites that went ahead in all graphs."""
        return sum(record.matches for record in self._records)

    def dumped(self, key: str, dumps: list[Dump]) -> list[Dump]:
        """A graph's dumps: kept, if our passes ran, or those that the process kept in which they did."""
        if dumps:
            raw = [dump.pack() for dump in dumps]
            file = cache.folder("records") / f"{key}.dump"
            cache.put(file, b"".join(len(one).to_bytes(8, "little") + one for one in raw))
            return dumps
        kept = self._dumps(key)
        while kept:
            size = int.from_bytes(kept[:8], "little")
            dumps, kept = [*dumps, Dump.unpack(kept[8 : 8 + size])], kept[8 + size :]
        if not dumps:
            log.warning("gaws: no dump: the graph came from a warm cache and its dump is gone. %s", AGAIN)
        return dumps

    def _dumps(self, key: str) -> bytes | None:
        return cache.get(cache.folder("records") / f"{key}.dump")

    def since(self, mark: int) -> list[GraphRecord]:
        """Records added since `mark` (a former `len`)."""
        with self._lock:
            return self._records[mark:]

    def __len__(self) -> int:
        return len(self._records)

    def _write(self, record: GraphRecord) -> None:
        try:
            cache.put(cache.folder("records") / f"{record.key}.json", record.to_json())
        except Exception as error:
            log.warning("gaws: the record of a graph was not kept (%s); a warm start cannot explain it", error)

    def _find(self, key: str) -> str | None:
        """A graph's record as JSON: this process's own, or one that was kept on disk."""
        if key not in self._kept:
            try:
                raw = cache.get(cache.folder("records") / f"{key}.json")
            except (OSError, cache.CacheError) as error:
                log.warning("gaws: the record of a graph cannot be read (%s)", error)
                return None
            if raw is None:
                return None
            with self._lock:
                self._kept[key] = raw.decode()
        return self._kept[key]


RECORDS = Store()
forks.held_across(RECORDS._lock)
