"""``python -m tests.fuzz --level 1 --seconds 60 --seed 0``: cases in turn, what they reached, and what failed.

Ends with 1 where a case failed. Cases of one level follow from their seeds, which count up from ``--seed``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from typing import Any

import torch

from tests.fuzz.coverage import Coverage, Failure

LEVELS = {1: "passes", 2: "kernels", 3: "runs"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--level", type=int, nargs="+", choices=LEVELS, default=sorted(_there()), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--seconds", type=float, help="for all levels together; 60, where no number of cases is given")
    parser.add_argument("--cases", type=int, help="of each level")
    parser.add_argument("--failures", type=int, default=20, help="to print at most; then a level ends")
    given = parser.parse_args(arguments)
    seconds = given.seconds if given.seconds or given.cases else 60.0
    torch.set_num_threads(1)
    failed = False
    for level in given.level:
        failures = _level(level, given, seconds / len(given.level) if seconds else None)
        failed = failed or bool(failures)
    return int(failed)


def _there() -> list[int]:
    """The levels that this checkout has."""
    return [level for level, name in LEVELS.items() if importlib.util.find_spec(f"tests.fuzz.{name}")]


def _level(level: int, given: Any, seconds: float | None) -> list[Failure]:
    module = importlib.import_module(f"tests.fuzz.{LEVELS[level]}")
    coverage, failures, cases, start = Coverage(), [], 0, time.monotonic()
    while (given.cases is None or cases < given.cases) and len(failures) < given.failures:
        if seconds is not None and time.monotonic() - start > seconds:
            break
        try:
            failure = module.run(given.seed + cases, coverage)
        except Exception:
            print(f"level {level}, seed {given.seed + cases}: the fuzzer itself is at fault", flush=True)
            raise
        cases += 1
        if failure is not None:
            failures.append(failure)
            print(f"level {level}, {failure}", flush=True)
    took = time.monotonic() - start
    print(coverage.table(module.MUST_REACH))
    for kind, names in coverage.missing(module.MUST_REACH).items():
        print(f"not reached: {kind}: {', '.join(names)}")
    wrong = sum(failure.kind == "wrong" for failure in failures)
    print(
        f"level {level}: {cases} cases in {took:.0f} s, seeds {given.seed} to {given.seed + cases - 1}: "
        f"{wrong} wrong, {len(failures) - wrong} crashes",
        flush=True,
    )
    return failures


if __name__ == "__main__":
    sys.exit(main())
