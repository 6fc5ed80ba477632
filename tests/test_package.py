"""The wheel, in a clean environment: it brings every pass, and torch.compile finds the backend."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gawscompile.passes import PIPELINE

ROOT = Path(__file__).parent.parent

HELPERS = {"context", "opaque_bases", "refusals", "spell_out"}
PROGRAM = """
import importlib, pathlib, pkgutil, torch
import gawscompile.passes as passes
assert "site-packages" in passes.__file__, passes.__file__
names = [module.name for module in pkgutil.iter_modules(passes.__path__)]
for name in names:
    importlib.import_module(f"gawscompile.passes.{name}")
assert "gaws" in torch._dynamo.list_backends()
model, x = torch.nn.Linear(8, 4), torch.randn(1, 8)
with torch.no_grad():
    got = torch.compile(model, backend="gaws", options={"strict": True})(x)
torch.testing.assert_close(got, model(x))
print(*names)
"""


@pytest.mark.slow
def test_the_wheel_brings_every_pass_into_a_clean_environment(tmp_path):
    def sh(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    sh(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    names = ("vectors", "prelude", "modes", "projections", "checksum", "sums")
    packed = ("packed_orders", "packed", "packed_dots", "packed_rows", "packed_tiles")
    kernels = [f"codegen/{name}.cpp" for name in (*names, *packed)]
    runtime = [f"runtime/{name}.cpp" for name in ("dispatch", "hoisted", "unchanged")]
    sources = ("passes/lower.py", *runtime, *kernels)
    for needed in (*sources, "demo/lighthouse.txt", "observe/dump.html"):
        assert f"gawscompile/{needed}" in inside
    assert not [name for name in inside if name.startswith(("tests/", "passes/", "benchmarks/"))]
    sh(sys.executable, "-m", "venv", str(tmp_path / "clean"))
    python = str(tmp_path / "clean" / "bin" / "python")
    sh(python, "-m", "pip", "install", "--quiet", str(wheel))
    names = set(sh(python, "-c", PROGRAM).split())
    stages = {stage.__name__.rpartition(".")[2] for stage in PIPELINE}
    assert names == stages | HELPERS


def test_the_folder_by_its_bare_name_is_refused():
    done = subprocess.run([sys.executable, "-c", "import passes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "import gawscompile.passes" in done.stderr
