"""Module paths and adapter names are data: no name changes a line of code, a file name or a report."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from gawscompile import cache, explain
from gawscompile.codegen import build, cpp
from gawscompile.ir.spec import KernelSpec

POISON = [
    "\n",
    *("\r\n", "\t", '"', "'", "*/", "/*", "//", "{", "}", "{0}", "%s", "\\", "\\n", "\0", "\x1b[31m", "$(touch x)"),
    *("`id`", ";", "| ", "; n=1 w=f32", "<b>", "&amp;", "\u202e", "\u200b", "\u2028", "\ufeff", "é", "層", "🙂"),
    *("../../etc", "#pragma omp", "__class__", "]", "['_modules']", "._modules['x']", "lambda: 0", 'R"(', ')"', "??/"),
    "base_layer",
]


def hostile(seed: int) -> str:
    generator = random.Random(seed)
    name = "".join(generator.choice(POISON) for _ in range(generator.randint(1, 6)))
    if seed % 10 == 0:
        name *= 10_000 // max(len(name), 1)
    return name.replace(".", "·") or "x"  # torch forbids dots, and empty names


class Named(torch.nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, torch.nn.Linear(32, 24))

    def forward(self, x):
        return sum(module(x) for module in self.children())


@pytest.fixture(scope="module")
def named():
    names = list(dict.fromkeys(hostile(seed) for seed in range(130)))[:100]
    assert len(names) == 100
    return names


@pytest.mark.slow
def test_a_hundred_hostile_names(named, tmp_path, monkeypatch):
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    build._pending.clear()
    model, x = Named(named).eval(), torch.randn(2, 32)
    report = explain(model, x, options={"strict": True})
    plain = explain(Named([f"layer{i}" for i in range(100)]).eval(), x, options={"strict": True})
    assert len(report.fused) == len(plain.fused) == 100
    # the same groups, plans and kernels as under good names: only what is called a path differs
    assert [(g.plan, g.spec, g.kernel) for g in report.groups] == [(g.plan, g.spec, g.kernel) for g in plain.groups]
    assert len(report.notes) == len(plain.notes)
    report.troubles, report.notes = [], []  # of the process, which ran other tests, and of what is around the kernels
    text = str(report)
    # a line for each entry and each group, headers, summary and verdict (Dynamo's spelling of some names cannot be
    # undone: those linears are listed a second time, as not traced)
    kinds = len({(group.program, group.tokens) for group in report.groups})
    assert len(text.splitlines()) == len(text.split("\n")) == len(report.linears) + kinds + 10
    assert all(c.isprintable() for line in text.split("\n") for c in line)
    assert all(len(line) < 1000 for line in text.split("\n") if not line.startswith(report.verdict()))
    page = report.to_html()
    assert "<b>" not in page and "<script" not in page and page.count("<tr>") == len(report.linears) + kinds + 2
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["linears"]) == len(report.linears)
    for path in (tmp_path / "cache").rglob("*"):
        entry = r"\.?[0-9a-f]{32}\.(so|cpp|json|h|h\.gch)(\.sha256)?|kernels|records|triton|locks|\d\d"
        assert re.fullmatch(entry, path.name), path
    source = cpp.emit(KernelSpec.parse(report.groups[0].spec))
    assert all(name not in source for name in named if name not in cpp.PRELUDE and len(name) > 9)
    assert source == cpp.emit(KernelSpec.parse(plain.groups[0].spec))


def test_messages_stay_on_one_line(named, monkeypatch, caplog):
    from gawscompile.passes import fuse_zflora

    def fail(graph, context):
        context.module = named[0]
        raise RuntimeError("broken\nlog line: forged")

    monkeypatch.setattr(fuse_zflora, "run", fail)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        torch.compile(torch.nn.Linear(32, 24), backend="gaws")(torch.randn(2, 32))
    (message,) = [r.getMessage() for r in caplog.records if r.name == "gawscompile"]
    assert "\n" not in message and "forged" in message


def test_adapters_are_read_from_safetensors_only(tmp_path, tiny_llama_dir, capsys):
    from gawscompile.cli import main

    torch.save({}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["explain", "--model", str(tiny_llama_dir), "--adapter", str(tmp_path)]) == 2
    assert "safetensors only" in capsys.readouterr().err
    assert cache.root().exists()
