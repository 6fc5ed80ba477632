"""Every LoRA of seventeen architectures is fused, or rejected for a reason that is true; and the answers hold."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from gawscompile import explain
from tests.architectures import ARCHITECTURES, LAYERS
from tests.graphs import capture, tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_adapter_is_fused_or_rejected_for_a_true_reason(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    found = sum(hasattr(module, "lora_A") for module in model.modules())
    assert found == architecture.adapted, [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    captured = capture(model, **architecture.inputs(), **architecture.calls)
    context = captured.until()
    adapted = [entry for entry in context.record.linears if entry.adapters]
    assert len({entry.path for entry in adapted}) == len(adapted) == architecture.adapted
    reasons = Counter(entry.reason for entry in adapted if entry.status != "fused")
    assert reasons == architecture.refused, [(e.path, e.detail) for e in adapted if e.status != "fused"]
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


CACHED = [name for name, architecture in ARCHITECTURES.items() if architecture.calls]


@pytest.mark.parametrize("name", CACHED)
def test_decode_over_a_growing_cache(name):
    """One more token after a prefill: the graph of a decode step has every adapter that the model has there."""
    from transformers import DynamicCache, EncoderDecoderCache

    from gawscompile.decoding import cache_keyword

    architecture = ARCHITECTURES[name]
    model = architecture.build()
    crossed = model.config.is_encoder_decoder
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if crossed else DynamicCache()
    with torch.no_grad():
        inputs = {"encoder_outputs": model.get_encoder()(tokens(2, 5))} if crossed else {}
        ids = "decoder_input_ids" if crossed else "input_ids"
        model(**inputs, **{ids: tokens(2, 4), cache_keyword(model): cache}, use_cache=True)
    captured = capture(model, **inputs, **{ids: tokens(2, 1, seed=3), cache_keyword(model): cache}, use_cache=True)
    context = captured.until()
    # of an encoder-decoder one step runs the decoder without cross-attention's keys and values
    expected = 8 * LAYERS if crossed else architecture.adapted
    adapted = [entry for entry in context.record.linears if entry.adapters]
    assert [entry.status for entry in adapted] == ["fused"] * expected
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-NeoX"])
def test_decode_with_a_static_cache(name):
    from transformers import StaticCache

    from gawscompile.decoding import cache_keyword

    architecture = ARCHITECTURES[name]
    model = architecture.build()

    def cache():
        made = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(tokens(1, 5), **{cache_keyword(model): made})
        return made

    with torch.no_grad():
        want = model(tokens(1, 1, seed=3), **{cache_keyword(model): cache()}).logits
        compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
        got = compiled(tokens(1, 1, seed=3), **{cache_keyword(model): cache()}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    report = explain(model, tokens(1, 1), **{cache_keyword(model): cache()})
    assert sum(bool(entry.adapters) and entry.status == "fused" for entry in report.linears) == architecture.adapted


def test_experts_are_named_with_their_reason():
    """Mixtral's experts are tensors of three dimensions: PEFT's adapters on them are parametrisations, not linears."""
    model = ARCHITECTURES["Mixtral"].build()
    report = explain(model, tokens(2, 7), use_cache=False)
    fused = [entry for entry in report.linears if entry.adapters and entry.status == "fused"]
    assert len(fused) == 4 * LAYERS
    assert all(entry.reason for entry in report.linears if entry.status != "fused")


def outputs(result) -> torch.Tensor:
    return (result.logits if "logits" in result else result.last_hidden_state).double()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errors_are_no_larger_than_the_better_known(name, dtype, record_testsuite_property):
    """20 seeds through parameters that are live: our error over the larger of eager's and Inductor's, against fp64."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(dtype)
    inputs, calls = architecture.inputs(), architecture.calls
    if dtype != torch.float32:
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    wide = architecture.build().double()
    if hasattr(wide.config, "_attn_implementation"):
        wide.set_attn_implementation("eager")
    if hasattr(wide.config, "_experts_implementation"):
        wide.config._experts_implementation = "eager"  # the grouped matmul of the default knows no fp64
    wide_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    variants = {
        "eager": model,
        "inductor": torch.compile(model, dynamic=False),
        "gaws": torch.compile(model, backend="gaws", dynamic=False, options={"strict": True}),
    }
    start = {key: value.clone() for key, value in model.state_dict().items()}
    logs = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.state_dict().items():
                if parameter.is_floating_point() and parameter.dim() >= 2:
                    noise = torch.randn(parameter.shape, generator=generator) * start[key].float().std()
                    parameter.copy_(noise)
            wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()}, strict=False)
            reference = outputs(wide(**wide_inputs, **calls))
            errors = {n: (outputs(run(**inputs, **calls)) - reference).norm().item() for n, run in variants.items()}
        logs.append(math.log(errors["gaws"] / max(errors["eager"], errors["inductor"])))
    ratio = math.exp(sum(logs) / len(logs))
    record_testsuite_property(f"{name}, {dtype}", f"{ratio:.2f}")  # --junitxml keeps it
    assert ratio <= 1.25
