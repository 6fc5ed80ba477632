"""A GPU's first questions, in one command of at most 8 minutes; what does not fit is skipped and said.

    python -m benchmarks.gpu --out FOLDER               # gpu.md and gpu.json, written again after every row
    python -m benchmarks.gpu --out FOLDER --resume      # once more, for what is missing there

Everything runs as CUDA graphs: the models with and without adapters under Inductor and gaws, decode and prefill, and
each group's kernels beside `torch.mm` and a copy. The cells (`gpu_cells.agenda`) come in the order of importance. They
run in a process of their own, so that an error of the device, or a kernel that never ends, costs one cell: this one
watches, ends the process where a cell overruns, and starts another for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report
from benchmarks.common import write
from gawscompile.calibration import measure

Row = dict[str, Any]

WORKER = ["-m", "benchmarks.gpu"]
"""Python's arguments for the process that runs the cells."""
MARK = "@gaws-row "
"""Before every line of that process that is for us."""
GRACE, STARTS = 40.0, 90.0
"""Seconds that a cell may overrun its time, as a compilation cannot be interrupted, and that a process may take to
start."""
ENOUGH = 20.0
"""Seconds that must be left for another process to be worth its start."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = Path(os.environ.get("OUT") or "benchmarks/results")
    parser.add_argument("--out", type=Path, default=place, help="a folder (default: $OUT, or benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=7.0, help="until no cell begins (default 7)")
    parser.add_argument("--layers", type=int, default=2, help="of models that no bar is about (default 2)")
    parser.add_argument("--cells", nargs="+", metavar="TEXT", help="only cells whose names hold one of these")
    parser.add_argument("--variants", type=int, help="only the first so many variants of every model")
    parser.add_argument("--resume", action="store_true", help="keep the rows of gpu.json, and run what it lacks")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def names(options: argparse.Namespace) -> list[str]:
    """The cells that were asked for, in order. Ends the program where there are none of the names."""
    from benchmarks.gpu_cells import agenda

    found = [cell.name for cell in agenda(layers=options.layers)]
    chosen = [name for name in found if not options.cells or any(text in name for text in options.cells)]
    if not chosen:
        raise SystemExit(f"--cells {' '.join(options.cells)}: the cells are {'; '.join(found)}")
    return chosen


# --- The process that runs the cells -----------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Runs the cells named in ``--only`` and tells their rows on stdout. Leaves the rest to another process where the
    device is in error, which no later call of this one would survive."""
    from benchmarks.gpu_cells import VARIANTS, Budget, agenda

    cells = {cell.name: cell for cell in agenda(VARIANTS[: options.variants], options.layers)}
    for name in options.only:
        cell, left = cells[name], options.worker - time.time()
        if left < min(ENOUGH, cell.seconds):
            _tell({"kind": "skipped", "cell": name, "why": f"{max(0.0, left):.0f} s were left"})
            continue
        _tell({"kind": "begin", "cell": name, "seconds": min(left, cell.seconds)})
        try:
            for row in cell.run(Budget(min(options.worker, time.time() + cell.seconds))):
                _tell({"part_of": name, **row})
            measure.synchronize()  # an error of the device shows here at the latest, if it did not in a row
        except Exception as error:
            _tell({"kind": "failed", "cell": name, "why": f"{type(error).__name__}: {error}"})
            try:
                measure.synchronize()
            except Exception:
                return
        else:
            _tell({"kind": "end", "cell": name})


def _tell(row: Row) -> None:
    print(MARK + json.dumps(row), flush=True)


# --- The process that watches ------------------------------------------------------------------------------


def watch(command: list[str], until: float) -> Iterator[Row]:
    """The rows of one process. Where it overruns or dies, the last is ``failed``, about the cell that it was in."""
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    cell, limit = "the start of the process", min(time.time() + STARTS, until + GRACE)
    try:
        while True:
            line = lines.get(timeout=max(0.1, limit - time.time()))
            if line is None:
                if process.wait() != 0:
                    yield {"kind": "failed", "cell": cell, "why": f"the process ended with code {process.returncode}"}
                return
            if not line.startswith(MARK):
                continue
            row = json.loads(line.removeprefix(MARK))
            if row["kind"] == "begin":
                cell, limit = row["cell"], time.time() + row["seconds"] + GRACE
            yield row
    except queue.Empty:
        why = f"no end {GRACE:.0f} s after its time: a compilation that takes long, or a kernel that waits for ever"
        yield {"kind": "failed", "cell": cell, "why": f"{why}; the process was ended"}
    finally:
        process.kill()
        process.wait()


def _pump(lines: Iterable[str], into: queue.Queue[str | None]) -> None:
    """Every line, and then None."""
    for line in lines:
        into.put(line)
    into.put(None)


def run(options: argparse.Namespace, rows: list[Row], save: Any) -> None:
    """All cells that `rows` do not have whole; rows are appended and saved as they come."""
    until = time.time() + 60 * options.minutes
    left = [row for row in gpu_report.latest(rows) if row["kind"] in gpu_report.LEFT]
    done = {row["cell"] for row in rows if row["kind"] == "end"} - {row.get("part_of", row.get("cell")) for row in left}
    pending = [name for name in names(options) if name not in done]
    while pending and time.time() < until - ENOUGH:
        command = [sys.executable, *WORKER, "--worker", str(until), "--layers", str(options.layers)]
        command += ["--variants", str(options.variants)] * bool(options.variants)
        before = len(pending)
        for row in watch([*command, "--only", *pending], until):
            if row.get("cell") in pending:
                pending.remove(row["cell"])
            rows.append(row)
            save()
        if len(pending) == before:  # it did not come to a cell: another would not either
            break
    rows += [{"kind": "skipped", "cell": name, "why": "the time was over"} for name in pending]
    save()


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, writes. 1 where there is no GPU."""
    options = arguments(argv)
    if options.worker:
        work(options)
        return 0
    from gawscompile.calibration import gpu_timing

    if gpu_timing.DEVICE == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; python -m tests.gpu.rehearse runs this without", file=sys.stderr)
        return 1
    began, facts = time.time(), measure.machine()
    kept = options.out / "gpu.json"
    rows: list[Row] = json.loads(kept.read_text())["rows"] if options.resume and kept.is_file() else []

    def save() -> None:
        text = gpu_report.report(rows, facts, time.time() - began, rehearsal=gpu_timing.DEVICE != "cuda")
        command = shlex.join(sys.argv[1:] if argv is None else argv)
        write(options.out / "gpu.md", f"# On a GPU\n\n`python -m benchmarks.gpu {command}`\n\n{text}")
        write(kept, json.dumps({"machine": facts, "rows": rows}, indent=1))

    run(options, rows, save)
    print((options.out / "gpu.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
