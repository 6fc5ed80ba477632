"""The cells of `benchmarks.gpu` on small models: rows, and none that failed."""

from __future__ import annotations

import time

import pytest

from benchmarks import gpu_cells, gpu_report
from gawscompile.calibration import measure
from tests.gpu.conftest import STAND_IN
from tests.gpu.small import shrink


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


def rows_of(cell: gpu_cells.Cell, seconds: float = 600.0) -> list[gpu_cells.Row]:
    rows = list(cell.run(gpu_cells.Budget(time.time() + seconds)))
    assert [row["why"] for row in rows if row["kind"] == "failed"] == []
    return rows


def test_the_card():
    facts = {row["name"]: row["value"] for row in rows_of(gpu_cells.Card(25))}
    assert facts["copy bandwidth"] > 0 and facts["multiprocessors"] > 0
    assert all(late < facts["seats"] for name, late in facts.items() if name.startswith("lateness"))


@pytest.mark.parametrize(
    ("model", "case", "batch", "count"),
    [
        ("llama-3.2-1b", "decode", 1, 3),
        pytest.param("llama-3.2-3b", "decode", 2, 2, marks=[pytest.mark.slow]),
        pytest.param("gpt2-large", "prefill", 2, 9, marks=[pytest.mark.slow]),
    ],
)
def test_models(model: str, case: str, batch: int, count: int):
    variants = gpu_cells.VARIANTS[:count]
    rows = rows_of(gpu_cells.Models(60, model, case, batch, 1, variants))
    timed = [row for row in rows if row["in_turns"]]
    assert [(row["backend"], row["adapter"], row["rank"]) for row in timed] == list(variants)
    assert all(row["ms"]["median"] > 0 for row in rows) and len(rows) == 2 * count
    assert all(bool(row["plans"]) == (row["backend"] == "gaws") for row in timed)
    text = gpu_report.report(rows, measure.machine(), 1.0)
    assert f"{model} (1 of 2 layers), no head, {case}, batch {batch}" in text and "(alone)" not in text.split("### ")[1]


def test_what_there_is_no_time_for_is_said():
    rows = rows_of(gpu_cells.Models(60, "llama-3.2-1b", "decode", 1, 1, gpu_cells.VARIANTS[:3]), seconds=-1.0)
    assert [row["kind"] for row in rows] == ["skipped"] * 3 and "s were left" in rows[1]["why"]


def test_an_error_costs_one_variant(monkeypatch: pytest.MonkeyPatch):
    def broken(self: object, base: object, variant: gpu_cells.Variant) -> tuple:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_cells.Models, "_record", broken)
    cell = gpu_cells.Models(60, "llama-3.2-1b", "decode", 1, 1, gpu_cells.VARIANTS[:2])
    rows = list(cell.run(gpu_cells.Budget(time.time() + 600)))
    assert [(row["kind"], row["why"]) for row in rows] == [("failed", "RuntimeError: out of memory")] * 2


@pytest.mark.parametrize("tokens", [1, pytest.param(128, marks=[pytest.mark.slow])])
def test_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch):
    every = gpu_cells.groups("llama-3.2-1b")
    monkeypatch.setattr(gpu_cells, "groups", lambda model: [every[1], every[6]])
    rows = rows_of(gpu_cells.Kernels(45, "llama-3.2-1b", tokens))
    assert all(row["us"]["median"] > 0 for row in rows)
    ways = {(row["group"], row["adapter"], row["what"].partition("[")[0]) for row in rows}
    lora = ["fused_tile", "gemm_accumulate", gpu_cells.MM, gpu_cells.SHRINK_EXPAND]
    lora += ["single_launch", "two_launch", "redundant_shrink"] * (tokens == 1)
    bare = ["fused_tile", "gemm_accumulate", gpu_cells.MM] + ["stream"] * (tokens == 1)
    assert ways == {("o", "LoRA r=2", what) for what in lora} | {("gate, up", "none", what) for what in bare}
    assert STAND_IN or all("registers" in row["resources"] for row in rows if row.get("chosen"))
