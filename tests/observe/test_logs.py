"""PyTorch's channels, in a process where they are on: TORCH_LOGS, TORCH_TRACE, TORCH_COMPILE_DEBUG."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gawscompile.backend import STAGES
from gawscompile.observe.channels import ARTIFACTS

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
import torch
ours = {name for name in sys.modules if name.startswith("gawscompile.")}
assert ours == {"gawscompile.observe", "gawscompile.observe.channels"}, ours  # importing torch imports no more of us
from tests.graphs import Pair
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.wide = torch.nn.Linear(32, 8).double()
    def forward(self, x):
        return self.wide(self.pair(x).double())
with torch.no_grad():
    torch.compile(Model().eval(), backend="gaws")(torch.randn(1, 3, 32))
"""


def installed(folder: Path) -> Path:
    """A folder that makes a process see the entry points of pyproject.toml, whatever is installed here."""
    text = (ROOT / "pyproject.toml").read_text()
    groups = re.findall(r'^\[project\.entry-points\."?([\w.]+)"?\]\n((?:[\w.]+ = "[\w.:]+"\n)+)', text, re.MULTILINE)
    assert dict(groups).keys() == {"torch.backends", "torch_dynamo_backends"}
    info = folder / "gawscompile-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gawscompile\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{rows}".replace('"', "") for group, rows in groups))
    return folder


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """(stderr, folder of the trace, folder of torch's debugging) of one process with all channels on."""
    folder = tmp_path_factory.mktemp("channels")
    environment = {**os.environ, "PYTHONPATH": f"{installed(folder)}:{ROOT}"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    environment |= {"TORCH_LOGS": "+gaws", "TORCH_TRACE": str(folder / "trace"), "TORCH_COMPILE_DEBUG": "1"}
    environment |= {"TORCH_COMPILE_DEBUG_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, folder


def test_torch_logs_has_passes_plans_kernels_and_rejections(said):
    text, _ = said
    lines = text.splitlines()
    for artifact in ARTIFACTS:
        assert any(f"[__{artifact}]" in line for line in lines), artifact
    assert any("linears fused into" in line for line in lines)
    assert any("+operator_sum" in line for line in lines)
    assert any("wide: DTYPE: torch.float64" in line for line in lines)
    assert any("group 0: pair.q, pair.k: m = 3: gemv_cpp" in line for line in lines)
    assert any("at::vec" in line for line in lines)


def test_a_structured_trace_has_every_step(said):
    _, folder = said
    (file,) = (folder / "trace").glob("*.log")
    names = re.findall(r'"artifact": {"name": "(gaws_[^"]+)"', file.read_text())
    step = f"gaws_{list(STAGES).index('recover_operators') + 1:02d}_recover_operators"
    assert {"gaws_00_captured", step, f"{step}_diff", "gaws_plans", "gaws_operators"} <= set(names)
    records = [line for line in file.read_text().splitlines() if "gaws_plans" in line]
    assert all(json.loads(line[line.index("{"):])["frame_id"] == 0 for line in records)  # tlparse sorts by frame


def test_dumps_lie_in_torchs_own_debugging_folder(said):
    _, folder = said
    (index,) = folder.glob("torch_compile_debug/run_*/gaws/graph_00_*/index.html")
    assert (index.parent / "graph.json").is_file()
    inductor = list(folder.glob("torch_compile_debug/run_*/torchinductor"))
    assert inductor and inductor[0].parent == index.parent.parent.parent
