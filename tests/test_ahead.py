"""A whole model planned for a GPU that is not here: launches of a decoder layer, and `gawscompile emit`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx import Graph

from benchmarks.common import ADAPTERS, Setup, with_adapter
from gawscompile import ahead, cli
from gawscompile.codegen import triton
from gawscompile.codegen.spec import SpecError
from gawscompile.planning import cost
from gawscompile.planning.devices import GPUS
from gawscompile.planning.table import Program

pytest.importorskip("triton")


def _layer(**sizes: int) -> torch.nn.Module:
    """One decoder layer of LLaMA-3.2-1B, with few words."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    given = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, **{**given, **sizes})
    return LlamaModel(config).to(torch.bfloat16).eval()


def _launches(traced: list[ahead.Traced]) -> int:
    programs = [Program.parse(group.program) for graph in traced for group in graph.record.groups]
    return sum(len(triton.launches(program.spec, program.triton_plan(1))) for program in programs)


def _calls(graph: Graph) -> int:
    return sum("gaws.project" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("gpu", ["A100", "H100", "B200", "MI300X"])
def test_an_adapted_layer_launches_as_often_as_the_bare_one(gpu: str, layers: dict[str, list[ahead.Traced]]):
    for kind, traced in layers.items():
        programs = [Program.parse(group.program) for graph in traced for group in graph.record.groups]
        replanned = [cost.plan(program.spec, GPUS[gpu]).table.pick(1) for program in programs]
        counts = [
            len(triton.launches(program.spec, triton.Plan.parse(plan)))
            for program, plan in zip(programs, replanned, strict=True)
        ]
        assert sum(counts) == 4, f"{kind}: {list(zip(replanned, counts, strict=True))}"


@pytest.fixture(scope="module")
def layers() -> dict[str, list[ahead.Traced]]:
    setup = Setup("llama", "bfloat16", cast_adapters=True)
    token = torch.zeros(1, 1, dtype=torch.int64)
    base = _layer()
    found = {"none": ahead.trace(base, GPUS["H100"], input_ids=token)}
    for kind in ADAPTERS:
        found[kind] = ahead.trace(with_adapter(base, setup, kind), GPUS["H100"], input_ids=token)
    return found


def test_the_graph_calls_what_the_record_says(layers: dict[str, list[ahead.Traced]]):
    for kind, (graph,) in layers.items():
        assert _calls(graph.after) == len(graph.record.groups) == 4 and _calls(graph.before) == 0, kind
        assert all(group.kernel.startswith("triton:") for group in graph.record.groups)
        assert _launches([graph]) == 4


@pytest.mark.parametrize(
    ("target", "gpu"),
    [
        ("cuda:80", "A100"),
        ("cuda:86", "A100"),
        ("cuda:75", "A100"),
        ("cuda:90", "H100"),
        ("cuda:120", "B200"),
        ("hip:gfx90a", "MI300X"),
    ],
)
def test_targets_are_planned_for_as_the_nearest_gpu(target: str, gpu: str):
    assert ahead.gpu_for(target).name == gpu


@pytest.mark.parametrize("adapter", ["lora", "gaws"])
def test_emit_writes_sources_binaries_and_a_table(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from transformers import LlamaConfig

    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = ["emit", "--model", str(tmp_path / "model"), "--adapter", adapter, "--target", "hip:gfx942"]
    command += ["--tokens", "1", "--dtype", "bfloat16", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "resources.md").read_text().strip()
    modules = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(modules) == 4, "qkv, o, gate and up, down; both layers share theirs, and the bare head is the library's"
    for folder in modules:
        names = {path.suffix for path in folder.iterdir()}
        assert {".py", ".ttir", ".ttgir", ".amdgcn", ".hsaco"} <= names
        compile((folder / "kernel.py").read_text(), "kernel.py", "exec")
    rows = [line for line in printed.splitlines() if re.match(r"\| \d\d_", line)]
    assert len(rows) == 4 and all("layers.0" in row for row in rows)
    assert cli.main(command) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_emit_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["emit", "--target", "sm_90", "--out", str(tmp_path / "out")]) == 2
    assert "not a target: 'sm_90'; write cuda:90" in capsys.readouterr().err
    with pytest.raises(SpecError, match="nothing to emit"):
        ahead.emit([], "cuda:90", 1, tmp_path)
