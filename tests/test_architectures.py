"""Every LoRA of nineteen architectures is fused, or rejected for a reason that is true; and the answers hold."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gawscompile import explain
from tests.architectures import ARCHITECTURES, LAYERS
from tests.graphs import capture, tokens
from tests.numerics import error_ratio

FEW = ("Llama", "GPT-2")
"""Of decoders one with linears and one with Conv1D; the others are slow tests."""


@pytest.mark.parametrize(
    "name", [one if one in FEW else pytest.param(one, marks=pytest.mark.slow) for one in ARCHITECTURES]
)
def test_every_adapter_is_fused_or_rejected_for_a_true_reason(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    found = sum(hasattr(module, "lora_A") for module in model.modules())
    assert found == architecture.adapted, [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    captured = capture(model, kernels=True, **architecture.inputs(), **architecture.calls)
    context = captured.until()
    adapted = [entry for entry in context.record.linears if entry.adapters]
    assert len({entry.path for entry in adapted}) == len(adapted) == architecture.adapted
    reasons = Counter(entry.reason for entry in adapted if entry.status != "fused")
    assert reasons == architecture.refused, [(e.path, e.detail) for e in adapted if e.status != "fused"]
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


CACHED = [name for name, architecture in ARCHITECTURES.items() if architecture.calls]


GROWING = ("Llama", "T5")  # the others are for the slow ones
WRITTEN_OUT = {"Gemma 2", "gpt-oss", "Bloom"}
"""A soft cap, sinks and ALiBi: no op of the library has them."""


@pytest.mark.parametrize(
    "name", [name if name in GROWING else pytest.param(name, marks=pytest.mark.slow) for name in CACHED]
)
def test_decode_over_a_growing_cache(name):
    """One more token after a prefill: the graph of a decode step has every adapter that the model has there."""
    from transformers import DynamicCache, EncoderDecoderCache

    from gawscompile.demo.decoding import cache_keyword

    architecture = ARCHITECTURES[name]
    model = architecture.build()
    crossed = model.config.is_encoder_decoder
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if crossed else DynamicCache()
    with torch.no_grad():
        inputs = {"encoder_outputs": model.get_encoder()(tokens(2, 5))} if crossed else {}
        ids = "decoder_input_ids" if crossed else "input_ids"
        model(**inputs, **{ids: tokens(2, 4), cache_keyword(model): cache}, use_cache=True)
    step = {ids: tokens(2, 1, seed=3), cache_keyword(model): cache}
    captured = capture(model, kernels=True, **inputs, **step, use_cache=True)
    context = captured.until()
    # of an encoder-decoder one step runs the decoder without cross-attention's keys and values
    expected = 8 * LAYERS if crossed else architecture.adapted
    adapted = [entry for entry in context.record.linears if entry.adapters]
    assert [entry.status for entry in adapted] == ["fused"] * expected
    if name in WRITTEN_OUT:
        assert context.record.passes["fuse_attention"] == LAYERS
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # test_generation has static caches too
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "GPT-NeoX"])
def test_decode_with_a_static_cache(name):
    from transformers import StaticCache

    from gawscompile.demo.decoding import cache_keyword

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


def test_around_experts_every_linear_is_fused():
    """Mixtral's experts are tensors of three dimensions, and no linears. Attention, routers and the head are."""
    linears = capture(ARCHITECTURES["Mixtral"].build(), tokens(2, 7), use_cache=False).until().record.linears
    assert [entry.status for entry in linears] == ["fused"] * (5 * LAYERS + 1)
    assert sum(bool(entry.adapters) for entry in linears) == 4 * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errors_are_no_larger_than_the_better_known(name, dtype, record_testsuite_property):
    """20 seeds through parameters that are live: our error over the larger of eager's and Inductor's, against fp64."""
    architecture = ARCHITECTURES[name]
    ratio = error_ratio(architecture.build(dtype), architecture.build(), architecture.inputs(), architecture.calls)
    record_testsuite_property(f"{name}, {dtype}", f"{ratio:.2f}")  # --junitxml keeps it
    assert ratio <= 1.25
