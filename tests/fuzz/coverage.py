"""What the levels of the fuzzer share: what a case reports, and what it reached.

A level is a module of this package with

    LEVEL: int
    MUST_REACH: dict[str, frozenset[str]]                      # kind of thing ("pass", "plan", "reason", …) → names
    def run(seed: int, coverage: Coverage) -> Failure | None   # one case, the same for the same seed

`run` counts what it reaches with ``coverage.reach(kind, name)``. It returns a `Failure` for a wrong answer or an
exception of ours, shrunk if it can, and raises only if the fuzzer itself is at fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Failure:
    """A case that went wrong. `seed` replays it: ``python -m tests.fuzz --level LEVEL --seed SEED --cases 1``."""

    level: int
    seed: int
    kind: Literal["wrong", "crash"]
    message: str
    """What is wrong, on one line if it can be: the output and its error, or exception and pass."""

    program: str = ""
    """The smallest program that still fails, as Python that can be run."""

    def __str__(self) -> str:
        replay = f"python -m tests.fuzz --level {self.level} --seed {self.seed} --cases 1"
        return f"{self.kind}: {self.message}\n  replay: {replay}\n{self.program}"


@dataclass
class Coverage:
    """How often each thing was reached, by kind: passes that matched, plans, reasons of rejections, …"""

    reached: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def reach(self, kind: str, name: str, times: int = 1) -> None:
        self.reached[kind][name] += times

    def missing(self, must: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
        """Of what must be reached, what was not: kind → names; kinds that are complete are left out."""
        found = {kind: sorted(set(names) - self.reached[kind].keys()) for kind, names in must.items()}
        return {kind: names for kind, names in found.items() if names}

    def table(self, must: Mapping[str, Iterable[str]]) -> str:
        """Every kind with its names and counts, most frequent first; what is missing has a count of 0."""
        lines = []
        for kind in dict.fromkeys([*must, *self.reached]):
            counts = dict.fromkeys(must.get(kind, ()), 0) | self.reached[kind]
            lines.append(f"{kind}:")
            width = max(map(len, counts), default=0)
            lines += [f"  {name:<{width}}  {n:>7}" for name, n in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]
        return "\n".join(lines)
