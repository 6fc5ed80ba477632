"""Numbers of generated Triton kernels, in the interpreter, which runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gawscompile.codegen import triton as emitter
from gawscompile.ir.spec import KernelSpec
from tests.codegen import triton_interpret_cases as cases
from tests.codegen.interpreted_specs import CASES, CORE

ROOT = Path(__file__).parent.parent.parent

F32_EPSILON = torch.finfo(torch.float32).eps

OTHERS = {
    "seeds": "test_error_over_seeds",
    "overflow": "test_fp16_survives_a_large_scale",
    "live": "test_replaced_factors_show_in_the_next_call",
    "attention": "test_attention_of_few_queries",
}
"""What else is measured, and the test that reads it."""


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """What `triton_interpret_cases` measured: case → its lines, one for each plan. Of what the chosen tests ask for."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONHASHSEED": "1",
        "GAWS_CACHE_DIR": str(tmp_path_factory.mktemp("interpreted")),
    }
    numbers = [item for item in request.session.items if "test_triton_numbers.py::test_numbers[" in item.nodeid]
    asked = [item.callspec.params["case"] for item in numbers]
    asked += [name for name, test in OTHERS.items() if any(item.name == test for item in request.session.items)]
    command = [sys.executable, "-m", "tests.codegen.triton_interpret_cases", *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines: dict[str, list[dict]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        lines.setdefault(line["case"], []).append(line)
    return lines


ONCE = {"rank_17", "transposed_odd", "backward", "gaws_crossing", "gaws_diag", "gawsd_both", "blocks_crossing"}
ONCE |= {"lokr_low", "packed_uint8", "packed_fp4_coded", "packed_nf4_coded", "bank_beside", "bias_and_residual_odd"}
ONCE.add("bank_modes")
"""What the fast tests try with one number of tokens, beside all that is in `CORE`."""


def takes_long(case: str) -> bool:
    """Whether the interpreter is long at it, and others try what it does."""
    spec, _, tokens = case.rpartition("-m")
    repeats = case in ("bank_odd-m2", "packed_int8-m2", "packed_swiglu-m2")  # bank and packed_nf4 have two rows
    once = "6" if spec == "bank_modes" else "17" if f"{spec}-m17" in CASES else "2"
    if case in ("bank_modes_odd-m2", "bank_modes_odd-m6"):  # chains of all lengths: decode, and a tile
        return False
    return repeats or tokens in ("3", "5", "70") or (spec not in CORE and (spec not in ONCE or tokens != once))


@pytest.mark.parametrize("case", [pytest.param(one, marks=[pytest.mark.slow] * takes_long(one)) for one in CASES])
def test_numbers(interpreted: dict[str, list[dict]], case: str):
    text, m = CASES[case]
    spec = KernelSpec.parse(text)
    plans = cases.plans_for(spec, m)
    assert [line["plan"] for line in interpreted[case]] == list(map(str, plans))
    for plan, line in zip(plans, interpreted[case], strict=True):
        here = hashlib.sha256(emitter.emit(spec, plan).encode()).hexdigest()
        assert line["digest"] == here, "another process prints another text"
        for measured in line["projections"]:
            tolerance = 1.5 * measured["segments"] + F32_EPSILON
            assert all(measured[name] for name in ("finite", "guards_hold", "in_place", "flags_cleared")), line["plan"]
            assert measured["error"] <= tolerance, line["plan"]
            if m == 1:
                assert measured["weight_reads"] == [1], f"{line['plan']} does not read each weight exactly once"
            for part, distance in measured["without"].items():
                assert distance > tolerance, f"the tolerance would not notice that {part} is missing"


@pytest.mark.slow
def test_error_over_seeds(interpreted: dict[str, list[dict]]):
    """Against fp64, over many draws: at most a quarter more than the segment-by-segment sum errs in that dtype."""
    assert len(interpreted["seeds"]) == 38
    for line in interpreted["seeds"]:
        assert line["ratio"] <= 1.25, line


def test_fp16_survives_a_large_scale(interpreted: dict[str, list[dict]]):
    (line,) = interpreted["overflow"]
    assert len(line) == 6 and all(error < 1e-3 for name, error in line.items() if name != "case")


def test_replaced_factors_show_in_the_next_call(interpreted: dict[str, list[dict]]):
    assert interpreted["live"][0]["shows"]


def test_attention_of_few_queries(interpreted: dict[str, list[dict]]):
    lines = interpreted["attention"]
    assert len(lines) == 24 and {line["parts"] for line in lines} == {1, 3}
    for line in lines:
        assert line["error"] <= 2 * line["bound"], line
