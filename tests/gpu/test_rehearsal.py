"""The suite's own logic without a GPU: the tests of this folder, and the benchmark, on the stand-in for one."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cells
from tests.caches import seeded
from tests.gpu import stand_in

HERE = Path(__file__).parent


pytestmark = pytest.mark.skipif(stand_in.installed(), reason="this is the rehearsal")


def rehearse(*command: str, cache: Path, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    environment = os.environ | {
        "GAWS_GPU_STAND_IN": "1",
        "TRITON_INTERPRET": "1",
        "GAWS_CACHE_DIR": str(cache),
        "PYTHONPATH": path(),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = (sys.executable, "-m", *command)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_the_suite(tmp_path: Path):
    report = tmp_path / "report.xml"
    ignored = f"--ignore={HERE / 'test_rehearsal.py'}"
    done = rehearse("pytest", str(HERE), ignored, "-m", "not slow", f"--junit-xml={report}", cache=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    ran, left = set(), set()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        (left if case.find("skipped") is not None else ran).add(str(case.get("name")).partition("[")[0])
    only_a_device = {
        "test_real_shapes",
        "test_torch_approves_of_the_transparent_op",
        "test_the_device_of_the_tensors_is_the_one_that_runs",
        "test_export",
    }
    assert left == only_a_device
    assert {"test_every_plan", "test_two_streams_at_once", "test_an_adapted_model_in_a_graph", "test_models"} <= ran


def path() -> str:
    return os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def benchmark(folder: Path, *flags: str) -> tuple[str, list[dict]]:
    """The report, and the rows, of a rehearsed benchmark."""
    done = rehearse("tests.gpu.rehearse", "--out", str(folder), "--layers", "1", *flags, cache=folder / "cache")
    assert done.returncode == 0, done.stderr[-6000:]
    return (folder / "gpu.md").read_text(), json.loads((folder / "gpu.json").read_text())["rows"]


@pytest.fixture(scope="module")
def inductor_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `inductor_code` prints: case → plans and Inductor's code."""
    pytest.importorskip("triton")
    folder = seeded(tmp_path_factory.mktemp("code") / "gaws")
    environment = os.environ | {"GAWS_CACHE_DIR": str(folder), "PYTHONPATH": path(), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.inductor_code"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_inductor_makes_code_of_the_op(inductor_code: dict[str, dict]):
    found = inductor_code["opaque"]
    ast.parse(found["code"])
    assert len(found["plans"]) == found["code"].count("torch.ops.gaws.project.default(") == 2
    assert "_gemv" not in found["code"]
    assert "with torch.cuda._DeviceGuard(0):" in found["code"]


@pytest.mark.parametrize("case", ["transparent", "many", "tuned"])
def test_inductor_makes_code_of_the_kernels_themselves(inductor_code: dict[str, dict], case: str):
    """Before it has decomposed the library's calls among them; with all that they read of their module."""
    found = inductor_code[case]
    ast.parse(found["code"])
    names = {plan.partition("[")[0] for plan in found["plans"]}
    assert names == ({"redundant_shrink"} if case == "transparent" else {"fused_tile", "gemm_accumulate"})
    assert "gaws.project" not in found["code"]
    launched = [line.strip().partition(".run(")[0] for line in found["code"].splitlines() if ".run(" in line]
    ours = [name for name in launched if not name.startswith("triton_")]
    if case == "transparent":
        assert [name.rstrip("_0123456789") for name in ours] == ["project_gemv"] * 2
    else:
        assert [name.rstrip("_0123456789") for name in ours] == [
            *("shrink_tile", "expand_tile", "shrink_tile", "accumulate_tile")
        ]
        assert found["code"].count("extern_kernels.mm(") == 1
        assert ("'restore_value': ('y',)" in found["code"]) == (case == "tuned")
    assert "tl.constexpr(256)" in found["code"], "K, which the kernels read of their module"


@pytest.mark.slow
def test_the_benchmark(tmp_path: Path):
    cells = ["card", "llama-3.2-1b, kernels, 1 token", "llama-3.2-1b, decode, batch 1"]
    report, rows = benchmark(tmp_path, "--variants", "3", "--cells", *cells)
    assert "A rehearsal on a CPU" in report and "## Failed\n\nNothing." in report and "## Skipped\n\nNothing." in report
    timed = [row for row in rows if row["kind"] == "model" and row["in_turns"]]
    assert [(row["backend"], row["adapter"]) for row in timed] == [
        ("inductor", "base"),
        ("gaws", "base"),
        ("gaws", "lora"),
    ]
    assert timed[2]["plans"] and not timed[0]["plans"]
    ways = {(row["group"], row["adapter"], row["what"].partition("[")[0]) for row in rows if row["kind"] == "kernel"}
    assert {("q, k, v", "LoRA r=2", what) for what in ("single_launch", "two_launch", gpu_cells.SHRINK_EXPAND)} <= ways
    assert {("gate, up", "none", what) for what in ("stream", gpu_cells.MM)} <= ways
    assert "llama-3.2-1b, decode, batch 1, LoRA r=2 over gaws' base ≤ 1.03×: not" not in report


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path: Path):
    report, rows = benchmark(tmp_path, "--minutes", "30")
    assert "## Failed\n\nNothing." in report
    from benchmarks.gpu_cells import agenda

    assert {row["cell"] for row in rows if row["kind"] == "end"} == {cell.name for cell in agenda(layers=1)}


@pytest.mark.parametrize("name", stand_in.REPLACED)
def test_the_stand_in_takes_no_more_than_torch_does(name: str):
    """Or a call that works in rehearsal would not on a device. Torch's may take more."""
    real, ours = getattr(torch.cuda, name), getattr(stand_in, name)
    if name in ("Stream", "Event"):
        real = real.__new__
    ours_takes = set(inspect.signature(ours).parameters)
    takes = set(inspect.signature(real).parameters)
    assert ours_takes <= takes, f"{name} takes {sorted(takes)}"


@pytest.mark.parametrize("name", ["Stream", "Event", "CUDAGraph"])
def test_the_stand_in_has_only_methods_that_torch_has(name: str):
    real, ours = getattr(torch.cuda, name), getattr(stand_in, name)
    for method, function in inspect.getmembers(ours, inspect.isfunction):
        if not method.startswith("_"):
            assert hasattr(real, method), f"torch.cuda.{name} has no {method}"
            if not hasattr(getattr(real, method), "__text_signature__"):
                taken = set(inspect.signature(getattr(real, method)).parameters)
                assert set(inspect.signature(function).parameters) <= taken
