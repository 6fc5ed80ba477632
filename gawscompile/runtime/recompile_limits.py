"""Torch's limits on recompiles, said in our words: past one, what no compiled variant fits runs eager, and stays so.

Dynamo compiles one function at most `torch._dynamo.config.recompile_limit` times. Whoever switches a ninth adapter on
goes on without the compiler, and so without us. Torch writes a warning in the very compile that it refuses; ours hangs
on it, and says what it means for adapters. Functions whose compiles never called our backend are none of our business.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from torch._dynamo.callback import callback_handler
from torch._guards import CompileContext

log = logging.getLogger("gawscompile")

_TORCH = logging.getLogger("torch._dynamo.convert_frame")
_SAID = re.compile(r"hit config\.(\w+) \((\d+)\)\s+function: (.*)\n\s+last reason: (.*)")


@dataclass(frozen=True)
class Hit:
    """A function that torch compiles no more: the limit's name and value, and the guard that failed last."""

    function: str
    limit: str
    value: int
    reason: str

    @property
    def cause(self) -> str:
        return (
            f"torch has compiled {self.function} as often as it may ({self.limit} = {self.value}): calls that none of"
            " the variants fits run eager from now on, without gaws and without Inductor (with fullgraph=True they"
            f" raise); last reason: {self.reason}"
        )

    @property
    def remedy(self) -> str:
        return (
            f"set torch._dynamo.config.{self.limit} higher than the number of adapters that one compiled model switches"
            " between, before its first call, or use fewer adapters per compiled model"
        )


class Limits(logging.Filter):
    """Takes nothing out of torch's log, and reads what it says of limits."""

    def __init__(self) -> None:
        super().__init__()
        self.hits: list[Hit] = []
        self._frames: set[int] = set()  # Dynamo's numbers of the functions that were compiled by our backend

    def compiling(self) -> None:
        """Our backend was called, so the function that Dynamo compiles just now is ours."""
        if not _remembers():
            self._frames.clear()
            self.hits.clear()
            callback_handler.register_start_callback(_remembered)
        _TORCH.addFilter(self)  # once, however often
        if (frame := _frame()) is not None:
            self._frames.add(frame)

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true. Torch's warning that a function of ours hit a limit comes with one of ours."""
        said = _SAID.search(record.getMessage()) if record.levelno == logging.WARNING else None
        if said is not None and _remembers() and _frame() in self._frames:
            hit = Hit(said[3], said[1], int(said[2]), said[4].strip())
            if hit not in self.hits:
                self.hits.append(hit)
                log.warning("gaws: %s. Remedy: %s.", hit.cause, hit.remedy)
        return True


LIMITS = Limits()


def _remembered(_: Any) -> None:
    """A callback that does nothing. `torch._dynamo.reset` forgets it, with all functions, and numbers them anew."""


def _remembers() -> bool:
    return _remembered in callback_handler.start_callbacks


def _frame() -> int | None:
    """Dynamo's number of the function that this thread compiles."""
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id
