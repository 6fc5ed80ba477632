"""What compiling costs, cold and warm, by stage: gaws against Inductor, base and adapted, from 4 to 64 layers.

    python -m benchmarks.compile_time --json compile.json --markdown benchmarks/results/compile_time.md \\
        --plot benchmarks/results/compile_time.png

A cell is one first call (a decode step over a static cache, ``dynamic=False``, fp32) in a process of its own: what
torch.compile imports, traces, compiles and builds, and the call itself. Cold: both caches are empty folders; warm: a
second process on the same. Cells take turns, so that a slow minute of the machine meets all of them; numbers are
medians. Models of some layers are Llamas of SmolLM2's heads and a quarter of its width with random weights (compile
time does not go by width), adapted by a LoRA of rank 16 on every linear. With ``--json``, cells that the file holds
are not measured again: a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, memory
from gawscompile.calibration import measure
from gawscompile.demo.decoding import Decoder

LAYERS = (4, 8, 16, 30, 64)
SMOLLM2 = 0
"""The number of layers that stands for SmolLM2 itself, with its weights."""

REPEATS = {4: 3, 8: 3, 16: 3, SMOLLM2: 3}
"""How often a cell is measured, where it is more than once."""

PASSES = "our passes"
STAGES = ("imports, first run", "Dynamo", "AOTAutograd", PASSES, "Inductor", "C++ of Inductor", "kernels of ours")


@dataclass(frozen=True)
class Cell:
    """What is compiled, by whom, with which caches."""

    layers: int
    backend: str
    adapted: bool
    warm: bool = False

    @property
    def model(self) -> str:
        return "SmolLM2" if self.layers == SMOLLM2 else f"{self.layers} layers"


Row = dict[str, Any]
"""A measured cell: its fields, `repeat`, `seconds`, `cpu`, `stages`, `passes`, `counts`, `peak`."""


# ---- one cell, in its process ---------------------------------------------------------------------------------


def build(cell: Cell) -> Any:
    """The cell's model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    setup = common.Setup("smollm2")
    if cell.layers == SMOLLM2:
        base = common.load_base(setup)
    else:
        sizes: dict[str, Any] = {"hidden_size": 144, "intermediate_size": 384, "vocab_size": 512}
        sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
        config = LlamaConfig(**sizes, num_hidden_layers=cell.layers, tie_word_embeddings=True)
        base = LlamaForCausalLM(config).eval()
    return common.with_adapter(base, setup, share=False) if cell.adapted else base


def first_call(cell: Cell) -> Row:
    """Compiles in this process. Seconds of wall time and of this process and its compilers, stages, counts, bytes."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    model = build(cell)
    decoder = Decoder(model, model, 2 * common.PAST)
    decoder.fill([7] * common.PAST)
    decoder.seek()
    resident = memory.resident("VmRSS")
    memory.forget_peak()
    began, cpu = time.perf_counter(), _cpu_seconds()
    decoder.run = measure.compiled(model, cell.backend, dynamic=False)
    decoder.step_again()
    taken = time.perf_counter() - began
    spent = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
    peak = memory.resident("VmHWM")
    return {
        "seconds": taken,
        "cpu": _cpu_seconds() - cpu,
        "stages": stages(spent, taken),
        "passes": {n.removeprefix("gaws."): s for n, s in spent.items() if n.startswith("gaws.") and n != KERNELS},
        "counts": {**counters["gaws"], "hits": measure.cache_hits(), "graphs": measure.graphs_compiled()},
        "peak": None if peak is None or resident is None else peak - resident,
    }


def _cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


KERNELS = "gaws.kernels"


def stages(spent: dict[str, float], total: float) -> dict[str, float]:
    """Torch's own nested timings (`torch._dynamo.utils.compilation_time_metrics`) as `STAGES` that add up to `total`.

    All of the main thread: C++ is what it *waits* for, after building beside it.
    """
    dynamo, backend = spent["_compile.compile_inner"], spent["OutputGraph.call_user_compiler"]
    ours = spent.get("pass.joint_graph_passes.joint_custom_pre_pass", 0.0)
    kernels = spent.get(KERNELS, 0.0)
    joint = spent.get("_recursive_joint_graph_passes", 0.0) - ours
    inner = spent.get("compile_fx_inner", 0.0)
    waited = spent.get("async_compile.wait", 0.0)
    autograd = backend - inner - joint - ours - kernels
    return dict(
        zip(
            STAGES,
            (total - dynamo, dynamo - backend, autograd, ours, joint + inner - waited, waited, kernels),
            strict=True,
        )
    )


# ---- all cells ------------------------------------------------------------------------------------------------


def run(cell: Cell, caches: Path) -> Row:
    """`first_call` in a fresh process, on `caches`."""
    gaws = caches / "gaws"
    gaws.mkdir(exist_ok=True, mode=0o700)
    kept = Path(os.environ.get("GAWS_CACHE_DIR", Path.home() / ".cache" / "gawscompile")) / "models"
    if kept.is_dir() and not (gaws / "models").exists():
        (gaws / "models").symlink_to(kept.resolve())
    places = {"GAWS_CACHE_DIR": str(gaws), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    file = caches / "row.json"
    command = [sys.executable, "-m", "benchmarks.compile_time", "--cell", json.dumps(asdict(cell)), "--json", str(file)]
    if subprocess.run(command, stdout=2, env={**os.environ, **places}).returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(file.read_text(encoding="utf-8"))


def measure_all(layers: Iterable[int], most: int, known: list[Row], file: Path | None) -> list[Row]:
    """Every cell as often as `REPEATS` says (at most `most` times), but those that `known` holds."""
    rows = list(known)
    seen = {(row["layers"], row["backend"], row["adapted"], row["repeat"]) for row in known if row["warm"]}
    variants = [(backend, adapted) for adapted in (True, False) for backend in ("gaws", "inductor")]
    for repeat in range(most):
        for count in layers:
            turn = variants[repeat % 4 :] + variants[: repeat % 4]
            for backend, adapted in turn if repeat < REPEATS.get(count, 1) else ():
                if (count, backend, adapted, repeat) in seen:
                    continue
                with tempfile.TemporaryDirectory(prefix="gaws-compile-") as scratch:
                    for warm in (False, True):
                        cell = Cell(count, backend, adapted, warm)
                        rows.append({**asdict(cell), "repeat": repeat, **run(cell, Path(scratch))})
                        told = f"{cell.model}, {backend}, {'adapted' if adapted else 'base'}, {_heat(warm)}"
                        print(f"{told}: {rows[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
                common.write(file, json.dumps({"machine": measure.machine(), "rows": rows}, indent=1))
    return rows


def _heat(warm: bool) -> str:
    return "warm" if warm else "cold"


# ---- what it says ---------------------------------------------------------------------------------------------


def medians(rows: list[Row], value: Any) -> dict[Cell, float]:
    """The median of ``value(row)`` for each cell."""
    found: dict[Cell, list[float]] = {}
    for row in rows:
        found.setdefault(_cell(row), []).append(value(row))
    return {cell: statistics.median(values) for cell, values in found.items()}


def _cell(row: Row) -> Cell:
    return Cell(row["layers"], row["backend"], row["adapted"], row["warm"])


def exponent(points: dict[int, float]) -> float | None:
    """p of ``c · layers^p``, by least squares of logarithms; None for fewer than two points."""
    logs = [(math.log(n), math.log(y)) for n, y in points.items() if n != SMOLLM2 and y > 0]
    if len(logs) < 2:
        return None
    slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
    return slope


def seconds_table(rows: list[Row], markdown: bool) -> str:
    """A row for each model and variant: cold and warm, ratio to Inductor on the same model, memory, counts."""
    wall, cpu = medians(rows, lambda r: r["seconds"]), medians(rows, lambda r: r["cpu"])
    peak = medians(rows, lambda r: r["peak"] or math.nan)
    spread: dict[Cell, list[float]] = {}
    for row in rows:
        spread.setdefault(_cell(row), []).append(row["seconds"])
    body = []
    for cell in sorted(wall, key=lambda c: (c.layers or math.inf, not c.adapted, c.backend)):
        if cell.warm:
            continue
        warm = Cell(cell.layers, cell.backend, cell.adapted, True)
        other, other_warm = (Cell(cell.layers, "inductor", cell.adapted, heat) for heat in (False, True))
        last = next(row for row in reversed(rows) if _cell(row) == warm)["counts"]
        compared = cell.backend == "gaws" and other in wall
        body.append(
            [
                f"{cell.model}, {'adapted' if cell.adapted else 'base'}, {cell.backend}",
                f"{wall[cell]:.1f}",
                f"{min(spread[cell]):.1f}-{max(spread[cell]):.1f}",
                f"{cpu[cell]:.1f}",
                f"{wall[cell] / wall[other]:.2f}" if compared else "",
                f"{wall[warm]:.1f}",
                f"{min(spread[warm]):.1f}-{max(spread[warm]):.1f}",
                f"{wall[warm] / wall[other_warm]:.2f}" if compared else "",
                f"{peak[cell] / 2**20:.0f}",
                f"{last.get('passes', 0)}, {last.get('built', 0)}" if cell.backend == "gaws" else "",
            ]
        )
    heads = ["", "cold s", "range", "CPU s", "× Inductor", "warm s", "range", "× Inductor", "MB"]
    return measure.table([*heads, "warm: passes, builds"], body, markdown)


def stages_table(rows: list[Row], layers: int, markdown: bool) -> str:
    """Seconds of each stage of one model's variants."""
    variants = [cell for cell in dict.fromkeys(map(_cell, rows)) if cell.layers == layers]
    variants.sort(key=lambda cell: (cell.warm, not cell.adapted, cell.backend))
    heads = [f"{Cell(layers, '', False).model}, s"]
    heads += [f"{c.backend} {'adapted' if c.adapted else 'base'}, {_heat(c.warm)}" for c in variants]
    each = {stage: medians(rows, lambda r, stage=stage: r["stages"][stage]) for stage in STAGES}
    body = [[stage, *(f"{each[stage][cell]:.2f}" for cell in variants)] for stage in STAGES]
    return measure.table(heads, body, markdown)


def passes_table(rows: list[Row], markdown: bool) -> str:
    """Milliseconds of each of our passes by layers, on the adapted models, and how they grow."""
    cold = [row for row in rows if row["backend"] == "gaws" and row["adapted"] and not row["warm"]]
    models = sorted({row["layers"] for row in cold}, key=lambda n: n or math.inf)
    body = []
    for name in [*dict.fromkeys(name for row in cold for name in row["passes"]), PASSES]:
        value = medians(cold, lambda r, n=name: r["passes"].get(n, 0.0) if n != PASSES else r["stages"][PASSES])
        points = {cell.layers: seconds for cell, seconds in value.items()}
        grown = exponent(points)
        title = name if name != PASSES else "all, with copying and records"
        body.append([title, *(f"{1e3 * points[n]:.1f}" for n in models), "" if grown is None else f"{grown:.2f}"])
    heads = ["our passes, ms", *(Cell(n, "", True).model for n in models), "exponent"]
    return measure.table(heads, body, markdown)


def remarks(rows: list[Row]) -> str:
    """Growth of whole compiles, and our passes' share of the largest."""
    wall = medians(rows, lambda r: r["seconds"])
    lines = []
    for warm in (False, True):
        for backend in ("gaws", "inductor"):
            points = {c.layers: s for c, s in wall.items() if (c.backend, c.adapted, c.warm) == (backend, True, warm)}
            grown = exponent(points)
            if grown is not None:
                lines.append(f"{backend}, adapted, {_heat(warm)}: grows as layers to the power of {grown:.2f}.")
    share = medians(rows, lambda r: r["stages"][PASSES] / r["seconds"])
    for cell, found in share.items():
        if cell.backend == "gaws" and cell.adapted and not cell.warm and cell.layers in (SMOLLM2, 64):
            lines.append(f"Our passes on {cell.model}, adapted: {100 * found:.1f} % of the cold compile.")
    return "\n\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Seconds over layers, cold and warm, and the stages of the model with most to tell."""
    if (figure := common.figure(12, 3.8)) is None:
        return
    axes = figure.subplots(1, 3)
    wall = medians(rows, lambda r: r["seconds"])
    for warm, panel in zip((False, True), axes, strict=False):
        for backend, colour in (("gaws", "#2060c0"), ("inductor", "#c06020")):
            for adapted, style in ((True, "o-"), (False, "o--")):
                points = {c.layers: s for c, s in wall.items() if c == Cell(c.layers, backend, adapted, warm)}
                points.pop(SMOLLM2, None)
                points = dict(sorted(points.items()))  # whatever order they were measured in
                label = f"{backend}, {'adapted' if adapted else 'base'}"
                panel.plot(list(points), list(points.values()), style, color=colour, label=label, markersize=4)
        panel.set(xscale="log", yscale="log", xlabel="layers", ylabel="s", title=_heat(warm))
        panel.grid(alpha=0.3, which="both")
        panel.set_xticks(LAYERS, list(map(str, LAYERS)))
        panel.minorticks_off()
    axes[0].legend(fontsize=7)
    layers = SMOLLM2 if any(row["layers"] == SMOLLM2 for row in rows) else max(row["layers"] for row in rows)
    cells = [Cell(layers, backend, True, warm) for warm in (False, True) for backend in ("gaws", "inductor")]
    bottom = [0.0] * len(cells)
    for stage in STAGES:
        value = medians(rows, lambda r, stage=stage: max(0.0, r["stages"][stage]))
        heights = [value.get(cell, 0.0) for cell in cells]
        axes[2].bar([f"{c.backend}\n{_heat(c.warm)}" for c in cells], heights, bottom=bottom, label=stage)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes[2].set(title=f"{cells[0].model}, adapted", ylabel="s")
    axes[2].legend(fontsize=7)
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--no-smollm2", action="store_true", help="only models with random weights")
    parser.add_argument("--repeat", type=int, default=3, help="of each cell at most; large models are measured once")
    parser.add_argument("--quick", action="store_true", help="4 and 8 layers, once")
    parser.add_argument("--json", type=Path, help="everything measured; cells found there are not measured again")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    if given.cell:
        common.write(given.json, json.dumps(first_call(Cell(**json.loads(given.cell)))))
        return
    layers = [4, 8] if given.quick else [*given.layers, *([] if given.no_smollm2 else [SMOLLM2])]
    facts, known = measure.machine(), []
    if given.json and given.json.is_file():
        kept = json.loads(given.json.read_text(encoding="utf-8"))
        facts, known = kept["machine"], kept["rows"]
    rows = measure_all(layers, 1 if given.quick else given.repeat, known, given.json)

    def report(markdown: bool) -> str:
        told = [stages_table(rows, n, markdown) for n in sorted({row["layers"] for row in rows}) if n in (SMOLLM2, 30)]
        tables = [seconds_table(rows, markdown), *told, passes_table(rows, markdown)]
        return "\n\n".join([measure.describe(facts), *tables, remarks(rows)])

    common.publish("What compiling costs", "compile_time", argv, given.markdown, report)
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    main()
