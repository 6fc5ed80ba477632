"""Dumps: every file says what happened, the page holds it all, a warm start writes the same, and off costs nothing."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest
import torch

from gawscompile import explain
from gawscompile.backend import STAGES
from gawscompile.ir.records import GraphRecord, GroupRecord
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_group
from gawscompile.observe.observer import kernels
from gawscompile.planning.cost import plan
from gawscompile.planning.devices import GPUS
from tests.graphs import Pair, small_llama, tokens


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """A dump of a cold compile, and the report that goes with it."""
    folder = tmp_path_factory.mktemp("dump")
    model = small_llama(layers=2)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        report = explain(model, tokens(1, 3), use_cache=False, options={"dump": str(folder)})
    (graph,) = folder.iterdir()
    return graph, report


def step(file):
    """The name of a pass's file in a dump."""
    return f"{list(STAGES).index(file.partition('.')[0]) + 1:02d}_{file}"


def test_a_folder_per_graph_has_every_step(dumped):
    folder, report = dumped
    found = files(folder)
    for number, name in enumerate(STAGES, 1):
        stem = f"{number:02d}_{name}"
        tree = ast.parse(found[f"{stem}.py"])
        assert isinstance(tree.body[0], ast.FunctionDef)
        said = json.loads(found[f"{stem}.json"])
        assert len(said["matches"]) >= report.passes.get(name, 0)
        assert bool(found[f"{stem}.diff"]) == bool(said["matches"])
    assert "layers.1.mlp.down_proj" in found["00_captured.py"] and "operator_sum" in found[step("recover_operators.py")]
    numbers = [match[0] for name in sorted(found) if name[:2].isdigit() and name.endswith(".json")
               for match in json.loads(found[name])["matches"]]
    assert numbers == list(range(1, len(numbers) + 1))  # what `fuel` counts


def test_groups_plans_and_kernels(dumped):
    folder, report = dumped
    plans = json.loads((folder / "plans.json").read_text())
    assert [group["members"] for group in plans] == [group.members for group in report.groups]
    for group in plans:
        assert all("m" in cost for cost in group["costs"].values())
        kernel = folder / "kernels" / group["kernel"].replace(":", "_")
        spec = (kernel / "spec.txt").read_text().splitlines()[0]
        assert str(KernelSpec.parse(spec)) == spec and "gemv" in (kernel / "kernel.cpp").read_text()
    operators = (folder / "operators.txt").read_text().splitlines()
    assert [line.split("\t")[:2] for line in operators] == [[e.path, e.operators] for e in report.linears]


def test_the_page_is_one_file_and_holds_the_data(dumped):
    folder, report = dumped
    text = (folder / "index.html").read_text()
    assert "http:" not in text and "https:" not in text and "src=" not in text
    _, _, rest = text.partition('<script id="data" type="application/json">')
    data = json.loads(rest.partition("</script>")[0])
    assert [step["name"] for step in data["steps"]] == ["captured", *STAGES]
    assert {e["path"] for e in data["record"]["linears"]} == {entry.path for entry in report.linears}
    assert data["kernels"].keys() == {group.kernel for group in report.groups}


def test_a_warm_start_writes_the_same(tmp_path, monkeypatch):
    model, x = Pair().eval(), torch.randn(1, 3, 32)
    for place in ("cold", "warm"):
        torch._dynamo.reset()
        explain(model, x, options={"dump": str(tmp_path / place)})
    cold, warm = (next((tmp_path / place).iterdir()) for place in ("cold", "warm"))
    said = [files(folder) for folder in (cold, warm)]
    assert cold.name.split("_")[2] == warm.name.split("_")[2] and said[0].keys() == said[1].keys()
    for name, text in said[0].items():
        assert text == said[1][name], name
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "empty"))  # ours is gone, Inductor's is not: passes run again
    torch._dynamo.reset()
    explain(model, x, options={"dump": str(tmp_path / "lost")})
    (lost,) = (tmp_path / "lost").iterdir()
    again = files(lost)
    assert again.keys() == said[0].keys()
    for name in again.keys() - {"index.html"}:  # which says how long the passes took
        assert again[name] == said[0][name], name


def test_what_is_left_alone_is_dumped_with_its_reason(tmp_path):
    model, x = torch.nn.Linear(8, 4).double(), torch.randn(2, 8, dtype=torch.float64)
    explain(model, x, options={"dump": str(tmp_path), "disable": ["fuse_epilogues"]})
    (folder,) = tmp_path.iterdir()
    (rejection,) = json.loads((folder / step("recover_operators.json")).read_text())["rejections"]
    assert rejection["reason"] == "DTYPE" and "DTYPE" in (folder / "operators.txt").read_text()
    assert "disabled" in (folder / step("fuse_epilogues.py")).read_text().splitlines()[0]


def test_a_graph_that_is_refused_is_dumped_as_it_came(tmp_path):
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    torch.compile(model, backend="gaws", options={"dump": tmp_path, "training": False})(x).sum().backward()
    (folder,) = tmp_path.iterdir()
    assert "aten.addmm" in (folder / "00_captured.py").read_text() and not list(folder.glob("01_*"))
    assert "gradients are needed" in (folder / "index.html").read_text()


def test_a_pass_that_fails_leaves_a_dump_up_to_it(tmp_path, monkeypatch):
    from gawscompile.passes import fuse_zflora

    def fail(graph, context):
        for node in graph.find_nodes(op="call_function", target=operator_group):
            context.allows(node)
            raise RuntimeError("broken")

    monkeypatch.setattr(fuse_zflora, "run", fail)
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(Exception, match="broken"):
        explain(Pair().eval(), torch.randn(1, 3, 32), options={"dump": str(tmp_path), "strict": True})
    (folder,) = tmp_path.iterdir()
    (match,) = json.loads((folder / step("fuse_zflora.json")).read_text())["matches"]
    assert match[1:] == ["operator_group", ["q", "k"]] and not (folder / step("fuse_kronecker.json")).exists()


def test_a_dump_that_cannot_be_written_costs_no_answer(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level(logging.WARNING)
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    with torch.no_grad():
        got = torch.compile(model, backend="gaws", options={"dump": tmp_path / "file"})(x)
        torch.testing.assert_close(got, model(x))
    assert any("the dump of a graph was not written" in r.getMessage() for r in caplog.records)


def test_kernels_of_a_gpu_have_a_source_per_plan():
    spec = KernelSpec.parse("k=576 x=bf16; n=576 w=bf16 out=bf16 lora(r=16 f32 s=2.0); n=192 w=bf16 out=bf16")
    table = plan(spec, GPUS["H100"]).table
    record = GraphRecord("key")
    for row, _ in table.rows:  # groups for different numbers of tokens share a kernel, and not its plans
        record.groups.append(GroupRecord(0, ["q"], "1", row, str(spec), "triton:ab", prefix="triton "))
    (found,) = kernels(record).values()
    assert found["spec"] == str(spec) and len(found["sources"]) == len(table.rows) > 1
    assert all(name.endswith(".py") and ast.parse(text) for name, text in found["sources"].items())


def test_off_nothing_is_listed(monkeypatch):
    from gawscompile.observe import dump, listing

    def never(*_):
        raise AssertionError("a graph was listed without a dump")

    for where in (listing, dump):
        monkeypatch.setattr(where, "listing", never)
    assert len(explain(Pair().eval(), torch.randn(1, 4, 32), options={"strict": True}).fused) == 3
