"""explain: an entry for every linear, as a table and as data; the command line prints it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics

from gawscompile import cache, explain
from gawscompile.calibration.measure import cache_hits
from gawscompile.cli import main
from gawscompile.debug.explain import assemble
from gawscompile.debug.report import predict
from gawscompile.ir.records import GraphRecord, Reason
from gawscompile.ir.spec import KernelSpec
from gawscompile.observe.store import RECORDS
from gawscompile.planning import cost
from gawscompile.planning.table import PlanTable
from tests.graphs import Pair, small_llama, tokens


class Odd(torch.nn.Module):
    """Linears of every fate: fused, computed weight, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(8, 4)
        self.wide = torch.nn.Linear(8, 4).double()
        self.unused = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.plain(x) + self.wide(x.double()).float()


def test_every_linear_of_a_model_has_an_entry():
    model = small_llama(layers=2)
    report = explain(model, tokens(1, 3), use_cache=False)
    modules = dict(model.named_modules())
    wanted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    wanted |= {name for name in modules if name.endswith("lm_head")}
    paths = [entry.path for entry in report.linears]
    assert set(paths) == wanted and len(paths) == len(wanted) == 15
    for entry in report.linears:
        base = getattr(modules[entry.path], "base_layer", modules[entry.path])
        assert entry.shape == tuple(base.weight.shape) and entry.status == "fused"
        assert entry.adapters == (0 if entry.path.endswith("lm_head") else 1)
        assert entry.path in report.groups[entry.group].members and entry.plan and entry.kernel
        assert ("LowRank" in entry.operators or "B" in entry.operators) == bool(entry.adapters)
    qkv = next(entry for entry in report.linears if entry.path.endswith("layers.1.self_attn.k_proj"))
    members = report.groups[qkv.group].members
    assert [m.rpartition(".")[2] for m in members] == ["q_proj", "k_proj", "v_proj"]


def test_rejections_are_typed_and_true():
    report = explain(Odd(), torch.randn(2, 8))
    fates = {entry.path: entry.reason for entry in report.linears}
    assert fates == {"plain": None, "wide": "DTYPE", "unused": "NOT_TRACED"}
    assert all(entry.reason in Reason.__members__ for entry in report.linears if entry.status == "rejected")


def test_the_table_and_the_data_say_the_same():
    report = explain(Odd(), torch.randn(2, 8))
    data = json.loads(json.dumps(report.to_dict()))
    text = str(report)
    assert text.startswith(report.summary()) and data["summary"] == report.summary()
    for entry in data["linears"]:
        assert entry["path"] in text and (entry["plan"] or entry["reason"]) in text
    assert report.summary() == (
        "3 linears in 1 graph(s): 1 fused into 1 groups; with adapters 0 of 0 fused; "
        "left as they were: 1 DTYPE, 1 NOT_TRACED"
    )


def test_explaining_a_compiled_model_leaves_it_and_the_inputs_as_they_were():
    model, x = Pair().eval(), torch.randn(1, 3, 32)
    compiled, given = torch.compile(model, backend="gaws"), x.clone()
    with torch.no_grad():
        before = compiled(x)
        assert len(explain(compiled, x).fused) == 3
        assert torch.equal(compiled(x), before)
    assert torch.equal(x, given)


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        torch._dynamo.graph_break("on purpose")
        return self.pair(x)


@pytest.fixture(scope="module")
def measured():
    """A report of a model that breaks, with everything measured."""
    torch._dynamo.reset()
    clear_compilation_metrics()  # recompiles are those of the process, which ran other tests
    return explain(Broken().eval(), torch.randn(1, 3, 32), measure=True)


def test_groups_say_what_they_spare_and_why_their_plan(measured):
    both, last = measured.groups
    assert both.members == ["pair.q", "pair.k"] and last.members == ["pair.o"]
    # q and k: a product with bias, two of LoRA, scale and sum each; o: the residual's sum besides
    assert (both.before.launches, last.before.launches) == (10, 6) and both.after.launches == last.after.launches == 1
    m, k, r = 3, 32, 4
    operands = 4 * (k * k + k + 2 * r * k)  # weight, bias, A and B
    assert int(both.after.bytes) == 2 * operands + 4 * m * k + 2 * 4 * m * k
    assert int(last.after.bytes) == operands + 4 * m * k * 3  # x, residual and result
    assert int(both.before.bytes) > int(both.after.bytes)
    assert PlanTable.parse(both.table).pick(m) == both.plan == "gemv_cpp" and len(both.costs) == 3
    model = cost.plan(KernelSpec.parse(both.spec))
    assert predict(both) == pytest.approx(model.seconds("gemv_cpp", m))
    symbolic = predict(dataclasses.replace(both, tokens="s0", plan=both.table))
    assert symbolic[1] == pytest.approx(model.seconds("gemv_cpp", 1))
    assert 1e-7 < both.measured < 1


def test_breaks_recompiles_and_guards_with_cause_and_remedy(measured):
    (trouble,) = [one for one in measured.troubles if one.kind == "graph break"]
    assert trouble.count >= 1 and "graph_break" in trouble.cause and trouble.remedy and measured.guards > 0
    clear_compilation_metrics()
    assert 0 < measured.guard_seconds < 1 and "guards first (" in measured.verdict()
    whole = explain(Pair().eval(), torch.randn(1, 3, 32), measure=True, serving=True)
    assert 0 < whole.guard_seconds < 1 and " more after a change alone." in whole.verdict()
    assert 0 < whole.watched < whole.guards
    assert whole.parts["projections"] > 0 and whole.parts["guards"] > 0 and "attention" not in whole.parts
    (rows,) = [rows for title, rows in whole.tables() if title == "Where a call's time goes"]
    assert len(rows) == 1 + len(whole.parts) and whole.to_dict()["parts"] == whole.parts
    torch._dynamo.reset()
    compiled = torch.compile(Pair().eval(), backend="gaws", dynamic=False)
    with torch.no_grad():
        for rows in (1, 2):
            compiled(torch.randn(rows, 1, 32))
    report = explain(Pair().eval(), torch.randn(1, 3, 32))
    (trouble,) = [one for one in report.troubles if one.kind == "recompile"]
    assert "size mismatch" in trouble.cause and "dynamic=True" in trouble.remedy


def test_the_verdict_is_one_paragraph_of_the_same_facts(measured):
    text = measured.verdict()
    assert "\n" not in text and text in str(measured) and measured.to_dict()["verdict"] == text
    wanted = ["3 of 3 linears with adapters", "2 launches", "16 operations", "graph break", "Remedy: "]
    wanted += [f"checks {measured.guards - measured.watched} guard", "with cold weights"]
    assert all(part in text for part in wanted)
    page = measured.to_html()
    assert text.split(". ")[0] in page and "pair.{q, k}" in page and "http:" not in page and "https:" not in page


def test_a_warm_start_explains_the_same():
    model, x = Pair().eval(), torch.randn(1, 5, 32)
    said = []
    for _ in range(2):
        torch._dynamo.reset()
        report = explain(model, x)
        report.troubles = []  # those of the process so far
        said.append((report.to_dict(), str(report)))
    assert said[0] == said[1] and said[0][0]["groups"][0]["before"]


def deleted(record, monkeypatch, forget=False):
    """The files of a record are gone, and where the process is told to `forget`, so is what it holds itself."""
    for file in cache.folder("records").glob(f"{record.key}.*"):
        file.unlink()
    if forget:
        monkeypatch.setattr(RECORDS, "_kept", {})


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_records_deleted_while_the_process_runs(monkeypatch, tmp_path, dynamic):
    model, x, mark = Pair(width=24).eval(), torch.randn(1, 6 + dynamic, 24), len(RECORDS)
    said = []
    for forget in (None, False, True):
        if forget is not None:
            deleted(RECORDS.since(mark)[0], monkeypatch, forget)
        torch._dynamo.reset()
        hits = cache_hits()
        report = explain(model, x, dynamic=dynamic)
        assert (cache_hits() > hits) == (forget is not None), "a warm start, but for the first"
        report.troubles = []  # those of the process so far
        said.append(report.to_dict())
        with torch.no_grad():
            compiled = torch.compile(model, backend="gaws", dynamic=dynamic)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert said[0] == said[1] == said[2] and len(said[0]["groups"]) == 2


def test_a_deleted_dump_is_made_again(monkeypatch, tmp_path, caplog):
    model, x, mark = Pair(width=24).eval(), torch.randn(1, 6, 24), len(RECORDS)
    for name in ("first", "second"):
        torch._dynamo.reset()
        explain(model, x, options={"dump": str(tmp_path / name)})
        deleted(RECORDS.since(mark)[0], monkeypatch)
    (first,), (second,) = ((tmp_path / name).glob("graph_*/graph.json") for name in ("first", "second"))
    assert first.read_text() == second.read_text() and "no dump" not in caplog.text


def test_a_record_that_is_lost_for_good_is_not_told_as_unfused():
    report = assemble([GraphRecord("key", lost=True)], Pair())
    assert {entry.reason for entry in report.linears} == {"RECORD_LOST"}


@pytest.mark.slow  # test_cli starts the same command
def test_the_command_prints_it(tiny_llama_dir, capsys, tmp_path):
    assert main(["explain", "--model", str(tiny_llama_dir), "--rank", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(entry["adapters"] for entry in data["linears"]) == 14
    dump = tmp_path / "dump"
    assert main(["explain", "--model", str(tiny_llama_dir), "--dump", str(dump)]) == 0
    assert capsys.readouterr().out.startswith("15 linears in 1 graph(s)")
    assert len(list(dump.glob("graph_00_*/index.html"))) <= 1


@pytest.mark.slow  # the page itself: test_names_are_data
def test_the_command_writes_a_page(tiny_llama_dir, tmp_path):
    page = tmp_path / "page.html"
    assert main(["explain", "--model", str(tiny_llama_dir), "--html", str(page)]) == 0
    assert "15 linears in 1 graph(s)" in page.read_text()


def test_the_command_says_what_it_cannot_find(tmp_path, capsys):
    assert main(["explain", "--model", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gawscompile: ") and "nowhere" in error
