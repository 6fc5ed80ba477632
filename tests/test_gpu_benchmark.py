"""benchmarks.gpu without a GPU: its tables, its bars, and what watches over the process that measures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cells, gpu_report
from benchmarks.shapes import SHAPES
from gawscompile.calibration import measure
from gawscompile.codegen import triton

FACTS = {**measure.machine(), "load": "0.0"}


def timing(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median, "minimum": median, "maximum": median, "count": 7}


def model(backend: str, adapter: str, ms: float | None, rank: int = 16, name: str = "llama-3.2-1b", **more) -> gpu.Row:
    row = {"kind": "model", "model": name, "case": "decode", "batch": 1, "whole": True, "backend": backend}
    row |= {"adapter": adapter, "rank": rank, "part_of": f"{name}, decode, batch 1"}
    return row | ({"ms": timing(ms), "in_turns": True, "plans": "", "ready_s": 9.0} if ms else {}) | more


def kernel(us: float, size: float, **more) -> gpu.Row:
    row = {"kind": "kernel", "model": "llama-3.2-3b", "group": "gate, up", "adapter": "LoRA r=16", "tokens": 1}
    row |= {"what": "single_launch[8]", "chosen": True, "bytes": size, "us": timing(us), "resources": ""}
    return row | {"predicted_us": 40.0} | more


COPY = {"kind": "fact", "name": "copy bandwidth", "value": 3e12, "unit": "bytes per second"}


def test_bars_are_met_missed_or_not_measured():
    rows = [COPY, model("inductor", "base", 1.0), model("gaws", "base", 0.9), model("gaws", "lora", 0.95)]
    kernels = [kernel(38.0, 100e6), kernel(40.0, 100e6, group="down"), kernel(9.0, 30e6, group="o")]
    lines = gpu_report.bars([*rows, *kernels])
    assert "LoRA r=16 over gaws' base ≤ 1.03×: 1.056, MISSED" in lines[0]
    assert "over Inductor's base ≤ 1.00×: 0.950, met" in lines[1]
    assert all(line.endswith("not measured") and "llama-3.2-3b" in line for line in lines[2:4])
    assert "gate, up" in lines[4] and lines[4].endswith("≥ 85%: 0.877, met")
    assert "down" in lines[5] and lines[5].endswith("≥ 85%: 0.833, MISSED") and len(lines) == 6
    assert gpu_report.bars(rows)[-1].endswith("not measured")


def test_later_rows_replace_earlier_ones_and_what_failed_is_told():
    failed = model("gaws", "zflora", None, kind="failed", why="RuntimeError: CUDA\nerror")
    rows = [model("gaws", "base", 2.0, in_turns=False), failed, model("gaws", "base", 1.5), kernel(50.0, 1e8)]
    rows.append({"kind": "skipped", "cell": "gpt2-large, prefill, batch 8", "why": "the time was over"})
    text = gpu_report.report(rows, FACTS, 12.0)
    assert "1.500" in text and "2.000" not in text and "(alone)" not in text.split("## Models")[1].split("###")[1]
    assert "zflora, decode, gaws, rank 16, batch 1: RuntimeError: CUDA error" in text
    assert "gpt2-large, prefill, batch 8: the time was over" in text
    assert "| single_launch |" in text and "1.25" in text, "the cost model said 40 µs, and it took 50"
    again = gpu_report.report([*rows, model("gaws", "zflora", 1.6)], FACTS, 12.0)
    assert "RuntimeError" not in again and "1.600" in again
    assert "rehearsal" not in text and "A rehearsal on a CPU" in gpu_report.report(rows, FACTS, 1.0, rehearsal=True)


def rows_of(script: str, until: float) -> list[gpu.Row]:
    script = f"import json, os, time\ndef tell(row): print({gpu.MARK!r} + json.dumps(row), flush=True)\n{script}"
    return list(gpu.watch([sys.executable, "-c", script], until))


BEGIN = "tell({'kind': 'begin', 'cell': 'a', 'seconds': 0.1})\n"


def test_a_process_that_dies_or_hangs_costs_one_cell(monkeypatch: pytest.MonkeyPatch):
    died = rows_of(BEGIN + "print('noise')\ntell({'kind': 'fact'})\nos._exit(7)", time.time() + 60)
    assert [row["kind"] for row in died] == ["begin", "fact", "failed"]
    assert died[-1]["cell"] == "a" and "ended with code 7" in died[-1]["why"]
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    began = time.time()
    hung = rows_of(BEGIN + "time.sleep(600)", time.time() + 60)
    assert time.time() - began < 60 and hung[-1] == {"kind": "failed", "cell": "a", "why": hung[-1]["why"]}
    assert "no end" in hung[-1]["why"] and "was ended" in hung[-1]["why"]


def options(**more) -> argparse.Namespace:
    given = gpu.arguments(["--minutes", "1"])
    return argparse.Namespace(**{**vars(given), **more})


def test_what_has_begun_is_not_begun_again_and_the_rest_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "names", lambda _: ["a", "b", "c", "d"])
    asked = []

    def watch(command, until):
        asked.append(command[command.index("--only") + 1 :])
        first = asked[-1][0]
        yield {"kind": "begin", "cell": first, "seconds": 1}
        if first == "b":
            yield {"kind": "failed", "cell": "b", "why": "a kernel that waits for ever"}
            return
        yield {"kind": "end", "cell": first}
        if first == "c":
            yield {"kind": "skipped", "cell": "d", "why": "3 s were left"}

    monkeypatch.setattr(gpu, "watch", watch)
    rows, saved = [], []
    gpu.run(options(), rows, lambda: saved.append(len(rows)))
    assert asked == [["a", "b", "c", "d"], ["b", "c", "d"], ["c", "d"]] and saved == sorted(saved) and len(saved) >= 7
    asked.clear()
    monkeypatch.setattr(gpu, "watch", lambda command, until: asked.append(command[command.index("--only") + 1 :]) or [])
    gpu.run(options(), list(rows), lambda: None)
    assert asked == [["b", "d"]], "resumed: what failed and what was skipped"


def test_a_process_that_does_not_start_is_not_started_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "WORKER", ["-c", "raise SystemExit(3)"])
    rows: list[gpu.Row] = []
    gpu.run(options(cells=["card"]), rows, lambda: None)
    assert [(row["kind"], row["cell"]) for row in rows] == [("failed", "the start of the process"), ("skipped", "card")]


def test_an_error_in_a_cell_is_told_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, capsys):
    class Broken(gpu_cells.Cell):
        name = "broken"

        def run(self, budget):
            yield {"kind": "fact", "name": "before", "value": 1.0, "unit": ""}
            raise RuntimeError("CUDA error: an illegal memory access")

    class Late(gpu_cells.Cell):
        name = "late"

        def run(self, budget):
            raise AssertionError("there was no time for it")

    cells = [Broken(5), gpu_cells.Kernels(5, "gpt2-large", 1), Late(900)]
    monkeypatch.setattr(gpu_cells, "agenda", lambda *_, **__: cells)
    monkeypatch.setattr(gpu_cells.Kernels, "run", lambda *_: iter([COPY]))
    gpu.work(options(worker=time.time() + 15, only=["broken", cells[1].name, "late"]))
    rows = [json.loads(line.removeprefix(gpu.MARK)) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["begin", "fact", "failed", "begin", "fact", "end", "skipped"]
    assert rows[2]["why"] == "RuntimeError: CUDA error: an illegal memory access"
    assert rows[1]["part_of"] == "broken" and rows[-1]["cell"] == "late"
    text = gpu_report.report(rows, FACTS, 1.0)
    assert "- broken: RuntimeError: CUDA error" in text and "- late: " in text
    again = [*rows, {"kind": "begin", "cell": "broken", "seconds": 5.0}, {"kind": "end", "cell": "broken"}]
    assert "RuntimeError" not in gpu_report.report(again, FACTS, 1.0), "it ran whole, later"


def test_an_error_of_the_device_leaves_the_rest_to_another_process(monkeypatch: pytest.MonkeyPatch, capsys):
    def poisoned() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cells = [gpu_cells.Kernels(5, "gpt2-large", 1), gpu_cells.Kernels(5, "gpt2-large", 2)]
    monkeypatch.setattr(gpu_cells, "agenda", lambda *_, **__: cells)
    monkeypatch.setattr(gpu_cells.Kernels, "run", lambda *_: iter([COPY]))
    monkeypatch.setattr(measure, "synchronize", poisoned)
    gpu.work(options(worker=time.time() + 60, only=[cell.name for cell in cells]))
    rows = [json.loads(line.removeprefix(gpu.MARK)) for line in capsys.readouterr().out.splitlines()]
    assert [row["kind"] for row in rows] == ["begin", "fact", "failed"] and "illegal memory" in rows[-1]["why"]


def test_the_agenda_has_everything_and_the_bars_first():
    cells = gpu_cells.agenda()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert sum(cell.seconds for cell in cells[:5]) < 7 * 60, "the bars' cells fit into one run"
    assert names[3:5] == ["llama-3.2-1b, decode, batch 1", "llama-3.2-3b, decode, batch 1"]
    models = [cell for cell in cells if isinstance(cell, gpu_cells.Models)]
    names = ("llama-3.2-1b", "llama-3.2-3b", "gpt2-large")
    wanted = {(model, case, batch) for model in names for case in ("decode", "prefill") for batch in (1, 8)}
    assert {(cell.model, cell.case, cell.batch) for cell in models} == wanted
    variants = {(backend, adapter) for backend, adapter, _ in gpu_cells.VARIANTS}
    theirs, ours = ("base", "merged", "lora"), ("base", "lora", "gaws", "zflora")
    assert variants == {*(("inductor", kind) for kind in theirs), *(("gaws", kind) for kind in ours)}
    assert {rank for backend, kind, rank in gpu_cells.VARIANTS if (backend, kind) == ("gaws", "lora")} == {8, 16, 64}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "gpt2-large"])
def test_groups_are_those_of_a_layer(name: str):
    layer = sum(p.n * spec.k for group, spec in gpu_cells.groups(name)[:4] for p in spec.projections)
    config = SHAPES[name].config(1)
    with torch.device("meta"):
        import transformers

        linears = getattr(transformers, SHAPES[name].model)(config)
    heads = linears.get_output_embeddings().weight.numel()
    weights = sum(p.numel() for p in linears.parameters() if p.dim() == 2)
    embeddings = sum(m.weight.numel() for m in linears.modules() if isinstance(m, torch.nn.Embedding))
    assert layer == weights - embeddings and heads > layer / 10
    for _, spec in gpu_cells.groups(name):
        assert triton.plans(spec)


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "sees no GPU; python -m tests.gpu.rehearse" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="the cells are card; llama"):
        gpu.names(gpu.arguments(["--cells", "nothing"]))


def test_torch_does_what_the_kernels_do():
    for name, spec in gpu_cells.groups("gpt2-large")[:1]:
        small = type(spec).parse(str(spec).replace("1280", "8").replace("3840", "24").replace("bf16", "f32"))
        from gawscompile.calibration import fit_gpu

        x, operands = fit_gpu.tensors(small, 3, "cpu")
        w, _, a, b = operands
        (y,) = gpu_cells.TORCH[gpu_cells.SHRINK_EXPAND](small, x, operands)
        torch.testing.assert_close(y, x @ (w + 2.0 * (b @ a).t()), rtol=1e-4, atol=1e-5)
        (bare,) = gpu_cells.TORCH[gpu_cells.MM](small, x, operands)
        torch.testing.assert_close(bare, x @ w)
        assert name == "c_attn"
