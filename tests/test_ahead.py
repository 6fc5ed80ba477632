"""A whole model planned for a GPU that is not here: launches of a decoder layer, and `gawscompile emit`."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from torch.fx import Graph

from benchmarks import training_work
from benchmarks.common import ADAPTERS, Setup, with_adapter
from gawscompile import ahead, cli
from gawscompile.codegen import triton
from gawscompile.ir.types import SpecError
from gawscompile.planning import cost
from gawscompile.planning.devices import GPUS
from gawscompile.planning.table import Program

pytest.importorskip("triton")


def _layer(**sizes: int) -> torch.nn.Module:
    """One decoder layer of LLaMA-3.2-1B, with few words."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    given = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**{"vocab_size": 64, "num_hidden_layers": 1, **given, **sizes})
    return LlamaModel(config).to(torch.bfloat16).eval()


def _launches(traced: list[ahead.Traced]) -> int:
    programs = [Program.parse(group.program) for graph in traced for group in graph.record.groups]
    return sum(len(triton.launches(program.spec, triton.Plan.parse(program.table.pick(1)))) for program in programs)


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


def test_nothing_is_hoisted_for_a_gpu():
    """A CPU's kernels are given DoRA's scale: here the graph computes it. In training no product is turned."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
    for training in (False, True):
        (graph,) = ahead.trace(model, GPUS["H100"], torch.randn(3, 64), training=training)
        assert any(entry.status == "fused" for entry in graph.record.linears)
        assert not any(entry.hoisted for entry in graph.record.linears)
        assert "turn_products" not in graph.record.passes


@pytest.mark.slow
@pytest.mark.parametrize(("wide", "shares"), [(True, (0.63, 0.51)), (False, (0.70, 0.58))], ids=["fp32", "bf16"])
def test_a_training_step_reads_and_launches_less(wide: bool, shares: tuple[float, float]):
    """Launches and bytes over those of the graph as traced, with fp32 factors (PEFT's default) and with factors in
    bf16. docs/training.md has them."""
    found = training_work.work("H100", wide)
    fused = [entry.backward for entry in found.traced.record.linears if entry.adapters and entry.status == "fused"]
    assert sorted(fused) == [False] * 6 + [True] * 6
    assert found.shares == pytest.approx(shares, abs=0.01)


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


@pytest.mark.parametrize("adapter", ["lora", "lora --bank", "gaws"])
def test_emit_writes_sources_binaries_and_a_table(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from transformers import LlamaConfig

    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = ["emit", "--model", str(tmp_path / "model"), "--adapter", *adapter.split(), "--target", "hip:gfx942"]
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
    specs = [(folder / "kernel.py").read_text() for folder in modules]
    assert all(("bank(f32 x16)" in text) == adapter.endswith("--bank") for text in specs)
    assert cli.main(command) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.fixture
def in_training(tmp_path: Path) -> list[str]:
    """What the commands are told of a small model that trains."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--training", "--tokens", "8"]


@pytest.mark.slow
def test_explain_has_the_backward(in_training: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["explain", *in_training, "--adapter", "lora"]) == 0
    assert "down_proj (backward)" in capsys.readouterr().out


@pytest.mark.slow  # traces and compiles a training step: test_training has the fast ones
def test_emit_has_the_backward(in_training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert cli.main(["emit", *in_training, "--target", "cuda:90", "--out", str(out), "--adapter", "lora"]) == 0
    specs = [(folder / "kernel.py").read_text() for folder in out.iterdir() if folder.is_dir()]
    assert any(" wt=" in text and " given(" in text for text in specs)
    assert "down_proj (backward)" in capsys.readouterr().out


def test_there_must_be_an_adapter_to_train(in_training: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["explain", *in_training]) == 2
    assert "no adapter to train: name one by --adapter" in capsys.readouterr().err
    assert cli.main(["explain", *in_training, "--adapter", "lora", "--bank"]) == 2
    assert "leave out --bank" in capsys.readouterr().err


def test_emit_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["emit", "--target", "sm_90", "--out", str(tmp_path / "out")]) == 2
    assert "not a target: 'sm_90'; did you mean cuda:90?" in capsys.readouterr().err
    with pytest.raises(SpecError, match="nothing to emit"):
        ahead.emit([], "cuda:90", 1, tmp_path)


class _Two(torch.nn.Module):
    """Two linears of one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = torch.nn.Linear(48, 32, bias=False), torch.nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), self.v(x).sin()


def _adapted() -> torch.nn.Module:
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(_Two(), peft.LoraConfig(r=4, target_modules=["q", "v"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def test_a_graph_that_holds_its_parameters_is_fused():
    """As an exported one does: they are attributes, and asserts on dtypes stand after every cast."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from gawscompile.backend import GawsPass
    from gawscompile.options import Options

    model, x = _adapted(), torch.randn(2, 48)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    with torch.no_grad():
        held = make_fx(call, tracing_mode="fake")(x, *parameters)
    body = next(node for node in held.graph.nodes if node.op != "placeholder")
    for i, (parameter, node) in enumerate(zip(parameters, held.graph.find_nodes(op="placeholder")[1:], strict=True)):
        held.register_parameter(f"p{i}", torch.nn.Parameter(parameter))
        with held.graph.inserting_before(body):
            attribute = held.graph.get_attr(f"p{i}")
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        held.graph.erase_node(node)
    product = held.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    with held.graph.inserting_after(product):
        held.graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (product, None, None, torch.float32))
    hook = GawsPass(Options(strict=True), "held")
    hook(held.graph)
    held.recompile()
    assert [len(group.members) for group in hook.record.groups] == [2] and _calls(held.graph) == 1
    assert len(held.graph.find_nodes(op="placeholder")) == 1, "attributes they stay"
    for got, want in zip(held(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_package_holds_the_fused_model(tmp_path: Path):
    model, x = _adapted(), torch.randn(2, 48)
    record = ahead.package(model, tmp_path / "two.pt2", x)
    assert [len(group.members) for group in record.groups] == [2]
    run = torch._inductor.aoti_load_package(str(tmp_path / "two.pt2"))
    for _ in range(2):
        for got, want in zip(run(x), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        x = torch.randn(2, 48)
    with pytest.raises(ValueError, match="without parameters"):
        ahead.package(torch.nn.Identity(), tmp_path / "none.pt2", x)
