"""Records of the graphs compiled in this process, kept on disk too, for processes that compile from a warm cache."""

from __future__ import annotations

import logging
import threading

from gawscompile.codegen import cache
from gawscompile.debug.records import GraphRecord

log = logging.getLogger("gawscompile")


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
        note = "compiled from a warm cache whose record is gone: clear Inductor's cache to see its passes again"
        return GraphRecord(key, notes=[note])


RECORDS = Store()
