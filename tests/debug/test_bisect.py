"""A planted fault: `bisect` names the pass and the match, and `repro` shows the fault in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from gawscompile import explain
from gawscompile.debug.bisect import BisectError, bisect
from gawscompile.debug.repro import ReproError, repro, script
from tests.graphs import Pair
from tests.planted import ROOT, in_copy, planted

SCRIPT = """
import torch
from tests.graphs import Pair
model, x = Pair().eval(), torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="gaws")(x), model(x), rtol=1e-3, atol=1e-3)
"""



FAKE = """
import json, os, pathlib, sys
fuel, stages = int(os.environ.get("GAWS_FUEL", 30)), {"canonicalize": 12, "lower": 18}
if "GAWS_DUMP" in os.environ:
    folder, number = pathlib.Path(os.environ["GAWS_DUMP"]) / "graph_00_ab", 0
    folder.mkdir(parents=True)
    for place, (stage, count) in enumerate(stages.items()):
        matches = [(n, f"node{n}", [f"layers.{n}"]) for n in range(number, number + count) if n < fuel]
        (folder / f"0{place}_{stage}.json").write_text(json.dumps({"matches": matches}))
        number += count
assert os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"
if fuel >= int(sys.argv[1]):
    raise ValueError("the answer is wrong")
"""


@pytest.mark.parametrize("bad", [1, 2, 12, 13, 22, 30])
def test_the_search_finds_the_first(tmp_path, bad):
    (tmp_path / "fake.py").write_text(FAKE)
    said: list[str] = []
    found = bisect([str(tmp_path / "fake.py"), str(bad)], tmp_path / "out", said.append)
    assert (found.number, found.total) == (bad, 30) and len(said) <= 6
    assert (found.stage, found.node) == ("canonicalize" if bad <= 12 else "lower", f"node{bad - 1}")
    assert found.modules == (f"layers.{bad - 1}",) and "the answer is wrong (exit status 1)" in str(found)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A copy of the project in which siblings are swapped, and what bisect says of a script that fails with it."""
    folder = planted("siblings swapped", tmp_path_factory.mktemp("faulty"))
    (folder / "script.py").write_text(SCRIPT)
    done = in_copy(folder, "-m", "gawscompile.cli", "bisect", "--out", "found", "script.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.mark.slow
def test_bisect_names_pass_and_match(faulty):
    folder, done = faulty
    first, *rest = done.stdout.splitlines()
    assert "pass group_siblings" in first and "of q, k " in first, done.stdout
    number, total = first.split()[1], first.split()[3]
    assert 0 < int(number) < int(total)
    # with one rewrite fewer it works, with it it does not
    for fuel, works in ((int(number) - 1, True), (int(number), False)):
        program = f"import os; os.environ['GAWS_FUEL'] = '{fuel}'; exec(open('script.py').read())"
        assert (in_copy(folder, "-c", program).returncode == 0) == works
    assert any("GAWS_DISABLE=group_siblings" in line for line in rest)
    assert (folder / "found" / "first").is_dir()


@pytest.mark.slow
def test_repro_shows_it_in_a_fresh_process_and_not_without_the_fault(faulty):
    folder, _ = faulty
    made = in_copy(folder, "-m", "gawscompile.cli", "repro", "found/all")
    assert made.returncode == 0, made.stderr
    (path,) = (folder / "found" / "all").glob("*/repro.py")
    alone = in_copy(folder, str(path))
    assert alone.returncode == 1 and "WRONG" in alone.stdout, (alone.stdout, alone.stderr)
    well = subprocess.run([sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert well.returncode == 0 and "right" in well.stdout, (well.stdout, well.stderr)


def test_a_script_that_does_not_fail_or_always_does(tmp_path):
    works, fails = tmp_path / "works.py", tmp_path / "fails.py"
    works.write_text("")
    fails.write_text("raise SystemExit('always')")
    with pytest.raises(BisectError, match="does not fail"):
        bisect([str(works)], tmp_path / "a")
    with pytest.raises(BisectError, match=r"compiles no graph with backend 'gaws' before: always"):
        bisect([str(fails)], tmp_path / "b")
    (tmp_path / "fake.py").write_text(FAKE)
    with pytest.raises(BisectError, match=r"fails with no rewrite too .*the answer is wrong"):
        bisect([str(tmp_path / "fake.py"), "0"], tmp_path / "c", lambda text: None)
    with pytest.raises(BisectError, match="no such script"):
        bisect([str(tmp_path / "nowhere.py")])


def test_a_folder_without_a_dump_and_with_several(tmp_path):
    with pytest.raises(ReproError, match="holds no dump of a graph; make one with GAWS_DUMP"):
        repro(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "graph.json").write_text("{}")
    with pytest.raises(ReproError, match="holds 2 graphs; name one: a, b"):
        repro(tmp_path)


@pytest.mark.slow
def test_names_constants_and_symbolic_sizes_come_along(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module('"""\nraise SystemExit(9) #\u2028', Pair())

        def forward(self, x):
            (inner,) = self.children()
            return inner(x) * torch.tensor([1.0, float("inf")])[:1] + x.shape[1]

    explain(Odd().eval(), torch.randn(1, 5, 32), options={"dump": str(tmp_path)}, dynamic=True)
    path = repro(tmp_path, tmp_path / "odd.py")
    assert "dynamic = True" in path.read_text() and "SystemExit(9)" in path.read_text()
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "right" in done.stdout, (done.stdout, done.stderr)
    (file,) = tmp_path.glob("*/graph.json")
    data = json.loads(file.read_text())
    data["lines"].insert(-1, "x = higher_order.cond(y)")
    with pytest.raises(ReproError, match="no operation of aten"):
        script(data)
