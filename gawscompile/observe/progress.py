"""One line on the terminal while a compile takes long: the graph, the stage, kernel n of N. Silent elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from types import TracebackType

PATIENCE, TICK = 2.0, 0.5
"""Seconds for which nobody needs to be told anything, and between two lines after that."""


class Progress:
    """A context that shows the stage last said, and the seconds so far, on one line of stderr that is gone at its end.

    Where stderr is no terminal it does nothing.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.stage = ""
        self._began = time.monotonic()
        self._done = threading.Event()
        self._writer: threading.Thread | None = None

    def say(self, stage: str) -> None:
        """What happens now."""
        self.stage = stage

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._writer = threading.Thread(target=self._run, name="gaws-progress", daemon=True)
            self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._writer is not None:
            self._writer.join()

    def _run(self) -> None:
        shown = False
        pause = PATIENCE
        while not self._done.wait(pause):
            text = f"gaws: {self.what}: {self.stage}, {time.monotonic() - self._began:.0f} s"
            _write(text[: shutil.get_terminal_size().columns - 1])
            shown, pause = True, TICK
        if shown:
            _write("")


def _write(text: str) -> None:
    print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)  # the line is cleared first
