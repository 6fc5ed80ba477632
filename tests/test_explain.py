"""explain: an entry for every linear, as a table and as data; the command line prints it."""

from __future__ import annotations

import json

import torch

from gawscompile import explain
from gawscompile.cli import main
from gawscompile.debug.records import Reason
from tests.graphs import small_llama, tokens


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
    model = small_llama(layers=1)
    compiled = torch.compile(model, backend="gaws")
    ids = tokens(1, 3)
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        assert len(explain(compiled, ids, use_cache=False).fused) == 8
        assert torch.equal(compiled(ids, use_cache=False).logits, before)
    assert torch.equal(ids, tokens(1, 3))


def test_the_command_prints_it(tiny_llama_dir, capsys):
    assert main(["explain", "--model", str(tiny_llama_dir), "--rank", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(entry["adapters"] for entry in data["linears"]) == 14
    assert main(["explain", "--model", str(tiny_llama_dir)]) == 0
    assert capsys.readouterr().out.startswith("15 linears in 1 graph(s)")


def test_the_command_says_what_it_cannot_find(tmp_path, capsys):
    assert main(["explain", "--model", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gawscompile: ") and "nowhere" in error
