"""Planted faults: `verify` refuses what they make of a model, and the tests notice them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gawscompile import explain
from tests.planted import FAULTS, Zoo

ROOT = Path(__file__).parent.parent

PROGRAM = """
import copy, json, logging, torch, gawscompile
from tests.planted import Zoo
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("gawscompile").addHandler(handler)
model = Zoo().eval()
wrong = {}
with torch.no_grad():
    # three dimensions: on flat activations Inductor itself loses an add's alpha (it makes an addmm of it)
    x = torch.randn(1, 64 if @LIBRARY@ else 2, 64)
    if @LIBRARY@:
        from gawscompile.planning import devices
        from tests.passes.test_choose_plan import FAST_LIBRARY
        devices.cpu = lambda: FAST_LIBRARY
    for verify in (False, True):
        torch._dynamo.reset()
        try:
            compiled = torch.compile(model, backend="gaws", options={"verify": verify})
            compiled(x)
            for p in model.parameters():  # what was kept from the first call shows in the second
                p.data = p.data * 1.05
            got, want = compiled(x), copy.deepcopy(model).double()(x.double())
        except RuntimeError as error:
            wrong[verify] = 1e9
            continue
        errors = [((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want)]
        wrong[verify] = max(errors) if all(e == e for e in errors) else 1e9
print(json.dumps({"wrong": wrong[False], "verified": wrong[True], "messages": messages, "at": gawscompile.__file__}))
"""


def planted(name: str, folder: Path) -> Path:
    """A copy of the project with the fault in it."""
    fault = FAULTS[name]
    for part in ("gawscompile", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    file = folder / "gawscompile" / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1, f"the fault {name!r} no longer applies: bring it up to date"
    file.write_text(text.replace(fault.old, fault.new))
    return folder


def in_copy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    places = {"GAWS_CACHE_DIR": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    environment = {**os.environ, **{k: str(v) for k, v in places.items()}, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_faults_apply():
    for name, fault in FAULTS.items():
        assert (ROOT / "gawscompile" / fault.file).read_text().count(fault.old) == 1, name
    assert len(FAULTS) >= 15


def test_the_zoo():
    model, x = Zoo().eval(), torch.randn(1, 3, 64)
    report = explain(model, x, options={"verify": True, "strict": True})
    assert report.passes["verify"] >= 9 and len(report.fused) >= 11
    with torch.no_grad():
        got = torch.compile(model, backend="gaws", options={"verify": True, "strict": True})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_verify_refuses_and_the_answer_stays_right(name, tmp_path):
    done = in_copy(planted(name, tmp_path), "-c", PROGRAM.replace("@LIBRARY@", str(FAULTS[name].library)))
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["at"].startswith(str(tmp_path))
    assert data["wrong"] > 1e-3, "the fault does not show on the zoo"
    assert data["verified"] < 1e-4, data["messages"]
    assert any("verify refused the rewrite of" in message for message in data["messages"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(name, tmp_path):
    folder = planted(name, tmp_path)
    done = in_copy(folder, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *FAULTS[name].tests.split())
    assert done.returncode == 1, done.stdout[-2000:]
