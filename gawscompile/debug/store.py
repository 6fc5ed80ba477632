"""Records of the graphs compiled in this process, kept on disk too, for processes that compile from a warm cache."""

from __future__ import annotations

import logging
import threading

from gawscompile import forks
from gawscompile.codegen import cache
from gawscompile.debug.dump import Dump
from gawscompile.debug.records import GraphRecord

log = logging.getLogger("gawscompile")

AGAIN = "To see its passes again, compile once with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"


class Store:
    """The records in order of compilation."""

    def __init__(self) -> None:
        self._records: list[GraphRecord] = []
        self._lock = threading.Lock()

    def compiled(self, key: str, record: GraphRecord | None) -> GraphRecord:
        """A graph was compiled: with its record if our passes ran, with none if it came from a cache."""
        if record is not None:
            self._write(record)
        else:
            record = self._read(key)
        with self._lock:
            self._records.append(record)
        return record

    def matches(self) -> int:
        """Rewrites that went ahead in all graphs."""
        return sum(record.matches for record in self._records)

    def dumped(self, key: str, dumps: list[Dump]) -> list[Dump]:
        """A graph's dumps: kept, if our passes ran, or those that the process kept in which they did."""
        file = cache.folder("records") / f"{key}.dump"
        if dumps:
            raw = [dump.pack() for dump in dumps]
            cache.put(file, b"".join(len(one).to_bytes(8, "little") + one for one in raw))
            return dumps
        kept = cache.get(file)
        while kept:
            size = int.from_bytes(kept[:8], "little")
            dumps, kept = [*dumps, Dump.unpack(kept[8 : 8 + size])], kept[8 + size :]
        if not dumps:
            log.warning("gaws: no dump: the graph came from a warm cache and its dump is gone. %s", AGAIN)
        return dumps

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

    def _read(self, key: str) -> GraphRecord:
        try:
            raw = cache.get(cache.folder("records") / f"{key}.json")
            if raw is not None:
                return GraphRecord.from_json(raw.decode())
        except (OSError, cache.CacheError) as error:
            log.warning("gaws: the record of a graph cannot be read (%s)", error)
        note = f"compiled from a warm cache whose record is gone. {AGAIN}"
        return GraphRecord(key, notes=[note])


RECORDS = Store()
forks.held_across(RECORDS._lock)
