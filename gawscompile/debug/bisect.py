"""``gawscompile bisect SCRIPT``: the first rewrite with which a script fails.

The script runs in processes of its own, with ``GAWS_FUEL=n`` for fewer and fewer n. Any prefix of the pipeline is a
program (`unfinished.py`), so the smallest n that fails ends with the rewrite that is wrong. A script fails by its
exit status: an assertion, an exception, a crash. Inductor's caches are off, so that nothing is taken from a run before.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gawscompile.ir.records import plain


class BisectError(ValueError):
    """There is nothing to find; the message says why."""


@dataclass(frozen=True)
class Culprit:
    """The first rewrite that makes the script fail: the `number`-th of `total` of the process."""

    number: int
    total: int
    stage: str
    node: str
    modules: tuple[str, ...]
    dump: Path
    error: str

    def __str__(self) -> str:
        return "\n".join(
            [
                f"rewrite {self.number} of {self.total} breaks it: pass {self.stage}, at {plain(self.node)}, "
                f"of {', '.join(map(plain, self.modules))} ({self.dump.name})",
                f"  the script then says: {plain(self.error)}",
                f"  what it changed: {self.dump / 'index.html'}",
                f"  alone, with random weights: gawscompile repro {self.dump}",
                f"  until it is put right: options={{'disable': ['{self.stage}']}}, or GAWS_DISABLE={self.stage}",
            ]
        )


def bisect(command: Sequence[str], out: Path | None = None, say: Callable[[str], None] = print) -> Culprit:
    """The culprit for a script with its arguments; dumps of the failing run go to `out`, by default a new folder.

    Raises `BisectError` where the script does not fail, or fails with no rewrite at all.
    """
    if not Path(command[0]).is_file():
        raise BisectError(f"{command[0]}: no such script (gawscompile bisect [--out DIR] SCRIPT [ARGUMENTS])")
    out = (out or Path(tempfile.mkdtemp(prefix="gaws-bisect-"))).resolve()
    error = _run(command, None, out / "all")
    if error == "":
        raise BisectError(f"{command[0]} does not fail (its exit status is 0): there is nothing to find")
    matches = _matches(out / "all")
    if not matches:
        raise BisectError(f"{command[0]} fails and compiles no graph with backend 'gaws' before: {error}")
    total = len(matches)
    say(f"fails with all {total} rewrites")
    if error := _run(command, 0):
        raise BisectError(f"{command[0]} fails with no rewrite too (GAWS_FUEL=0), so none is to blame: {error}")
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        fails = _run(command, middle) != ""
        say(f"{'fails' if fails else 'works'} with {middle}")
        good, bad = (good, middle) if fails else (middle, bad)
    error = _run(command, bad, out / "first")
    if error == "":
        raise BisectError(f"{command[0]} does not fail in every run: {bad} rewrites failed, and then did not")
    stage, node, modules, number = matches[bad - 1]
    graphs = [graph for run in ("first", "all") for graph in sorted((out / run).glob(f"graph_{number}_*"))]
    return Culprit(bad, total, stage, node, tuple(modules), graphs[0], error)


def _run(command: Sequence[str], fuel: int | None, dump: Path | None = None) -> str:
    """What the script says when it fails, "" where it does not."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GAWS_FUEL", "GAWS_DUMP")}
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if fuel is not None:
        environment["GAWS_FUEL"] = str(fuel)
        environment["GAWS_STRICT"] = "1"  # a rewrite so wrong that its meaning cannot be traced is found too
    if dump is not None:
        environment["GAWS_DUMP"] = str(dump)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return f"{(raised or lines or ['nothing'])[-1]} (exit status {done.returncode})"


def _matches(dump: Path) -> list[tuple[str, str, list[str], str]]:
    """(pass, node, modules, number of the graph) of every rewrite of a run, in order, from its dumps."""
    found = []
    for graph in sorted(dump.glob("graph_*"), key=lambda path: int(path.name.split("_")[1])):
        for step in sorted(graph.glob("[0-9][0-9]_*.json")):
            for _, node, modules in json.loads(step.read_text())["matches"]:
                found.append((step.stem.partition("_")[2], node, modules, graph.name.split("_")[1]))
    return found
