"""A second process with a warm cache: the same answers and the same explain, no pass run; an edit shows at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.caches import environment

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, torch, gawscompile
from torch import nn
from gawscompile import passes
from gawscompile.calibration import measure

class Adapted(nn.Module):
    def __init__(self, n, k):
        super().__init__()
        self.base = nn.Linear(k, n)
        self.a, self.b = nn.Parameter(torch.randn(4, k)), nn.Parameter(torch.randn(n, 4))
    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T * 2.0

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.q, self.k, self.o = nn.LayerNorm(32), Adapted(32, 32), Adapted(32, 32), Adapted(48, 32)
        self.head = nn.Linear(48, 64)
    def forward(self, x):
        x = self.norm(x)
        return self.head(self.o(torch.softmax(self.q(x) * self.k(x), -1)))

x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
ran = []
for stage in passes.PIPELINE:
    stage.run = lambda graph, context, real=stage.run, name=stage.__name__: (ran.append(name), real(graph, context))
report = gawscompile.explain(Block(), x, options={"strict": True})
with torch.no_grad():
    model = Block()
    logits = torch.compile(model, backend="gaws", options={"strict": True})(x)
    wrong = (logits - model(x)).abs().max().item()
data = {"logits": logits.tolist(), "wrong": wrong, "passes": ran, "report": report.to_dict(), "text": str(report)}
print(json.dumps(data | {"where": gawscompile.__file__, "hits": measure.cache_hits()}))
"""


def run(caches: Path, package: Path = ROOT) -> dict:
    places = {**environment(caches), "PYTHONPATH": f"{package}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=places, cwd=caches)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["where"].startswith(str(package))
    return data


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cold(caches):
    return run(caches)


def test_warm_is_cold_without_the_work(caches, cold):
    warm = run(caches)
    assert cold["passes"] and not warm["passes"] and warm["hits"] > 0
    for key in ("logits", "report", "text"):
        assert warm[key] == cold[key], key
    assert cold["report"]["summary"].startswith("4 linears in 1 graph(s): 4 fused")


@pytest.mark.slow
def test_a_lost_record_is_made_again_and_kernels_are_rebuilt(caches, cold):
    """Our half of the cache is gone, Inductor's is not: the passes run once more, for the record alone."""
    kept = shutil.move(caches / "gaws", caches / "kept")
    try:
        alone = run(caches)
    finally:
        shutil.rmtree(caches / "gaws")
        shutil.move(kept, caches / "gaws")
    assert alone["hits"] > 0 and alone["passes"] == cold["passes"][: len(alone["passes"])] != []
    for key in ("logits", "report", "text"):
        assert alone[key] == cold[key], key


@pytest.mark.slow
def test_an_edited_pass_changes_the_result_at_once(caches, cold, tmp_path):
    package = tmp_path / "edited"
    shutil.copytree(ROOT / "gawscompile", package / "gawscompile", ignore=shutil.ignore_patterns("__pycache__"))
    edited = package / "gawscompile" / "passes" / "recover_operators.py"
    text = edited.read_text()
    assert text.count("        return scale.number\n") == 1
    edited.write_text(text.replace("        return scale.number\n", "        return -scale.number\n"))
    wrong = run(caches, package)
    assert wrong["passes"] and wrong["logits"] != cold["logits"] and wrong["wrong"] > 100 * cold["wrong"]
    assert run(caches)["logits"] == cold["logits"]
