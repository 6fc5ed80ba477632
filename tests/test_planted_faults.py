"""Planted faults: `verify` refuses what they make of a model, and the tests notice them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch

from gawscompile import explain
from tests.codegen.interpreted_specs import CASES
from tests.codegen.test_cpp import REPEATS
from tests.codegen.test_triton_numbers import takes_long
from tests.planted import FAULTS, ROOT, Zoo, judged, planted, suite


def test_faults_apply():
    for name, fault in FAULTS.items():
        assert (ROOT / "gawscompile" / fault.file).read_text().count(fault.old) == 1, name
    assert len(FAULTS) >= 40 and sum(fault.by == "fast" for fault in FAULTS.values()) >= 0.9 * len(FAULTS)


def test_what_is_planted_is_python():
    for name, fault in FAULTS.items():
        if fault.file.endswith(".py"):
            ast.parse((ROOT / "gawscompile" / fault.file).read_text().replace(fault.old, fault.new), name)


@pytest.mark.slow  # test_partial has its numbers; the faults below are compared with it
def test_the_zoo():
    model, x = Zoo().eval(), torch.randn(1, 3, 64)
    report = explain(model, x, options={"verify": True, "strict": True})
    assert report.passes["verify"] >= 9 and len(report.fused) >= 11
    with torch.no_grad():
        got = torch.compile(model, backend="gaws", options={"verify": True, "strict": True})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


HERE = {name: fault for name, fault in FAULTS.items() if fault.shows_here}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, fault in HERE.items() if not fault.unproven])
def test_verify_refuses_and_the_answer_stays_right(name, tmp_path):
    seen = judged(name, planted(name, tmp_path))
    assert seen.wrong > 1e-3, "the fault does not show on the zoo"
    assert seen.verified < 1e-4, seen.messages
    assert seen.refused


@pytest.mark.slow
@pytest.mark.parametrize("by", ["fast", "slow"])
def test_tests_that_notice_are_collected(by):
    """A test that was renamed, or has become slow, notices nothing."""
    wanted = {test for one in FAULTS.values() if one.by == by for test in one.tests.split() if "::" in test}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only"]
    command += ["-m", "slow" if by == "slow" else "not slow", *sorted(wanted)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = {line for line in printed.splitlines() if "::" in line}
    found |= {line.partition("[")[0] for line in found} | {line.rpartition("::")[0] for line in found}
    assert wanted <= found, sorted(wanted - found)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_the_suite_notices(name, tmp_path):
    done = suite(name, planted(name, tmp_path))
    assert done.returncode == 1, done.stdout[-2000:]


def test_numbers_that_notice_are_among_the_fast_ones():
    """A case that has become slow is not collected, and nobody would notice the fault."""
    for name, fault in FAULTS.items():
        if fault.by == "fast" and "::test_numbers[" in fault.tests:
            case = fault.tests.partition("[")[2].rstrip("]")
            assert case in CASES and not takes_long(case), name
        if fault.by == "fast" and "test_cpp.py::" in fault.tests:
            assert any(not any(f"[{slow}-" in test for slow in REPEATS) for test in fault.tests.split()), name
