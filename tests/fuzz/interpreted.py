"""Calls of Triton kernels, in a process of their own: its interpreter must be chosen before Triton is imported.

The process reads one call a line, as JSON, and answers each with a line. It ends when its input does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from tests.fuzz.calls import Call

ROOT = Path(__file__).parents[2]


def fault(call: Call) -> str | None:
    """`Call.fault`, in the other process. Raises `RuntimeError` for what is raised there."""
    other = _process()
    assert other.stdin is not None and other.stdout is not None
    other.stdin.write(json.dumps(dataclasses.asdict(call)) + "\n")
    other.stdin.flush()
    line = other.stdout.readline()
    if not line:
        _process.cache_clear()
        raise RuntimeError(f"the interpreting process ended with {other.wait()}")
    answer = json.loads(line)
    if answer["raised"]:
        raise RuntimeError(answer["raised"])
    found: str | None = answer["fault"]
    return found


@functools.cache
def _process() -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "tests.fuzz.interpreted"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    import torch

    from tests.codegen.triton_interpret_cases import repair_interpreter

    repair_interpreter()
    warnings.simplefilter("ignore")  # numpy's, of overflows that are wanted
    torch.set_num_threads(1)
    for line in sys.stdin:
        answer: dict[str, str | None] = {"fault": None, "raised": None}
        try:
            answer["fault"] = Call(**json.loads(line)).fault()
        except Exception as error:
            answer["raised"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
