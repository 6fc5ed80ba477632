"""Generation over a compiled forward: whatever searches, and whatever keeps the past, the tokens are eager's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.architectures import ARCHITECTURES
from tests.graphs import small_llama, tokens
from tests.ways import WAYS, compiled, fusing

IDS = tokens(2, 5)
LINEARS = 7  # of a layer, all of them with a LoRA


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: prefill and decode of one model, compiled once, serve all tests."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module", params=WAYS)
def pair(request):
    """A model and its compiled twin, which generates the same."""
    torch._dynamo.reset()  # or the other way's code would serve it
    model = small_llama(layers=1)
    other = twin(model, request.param)
    with fusing(LINEARS):  # or right answers would tell nothing
        assert torch.equal(*(generated(each, do_sample=False) for each in (model, other)))
    return model, other


def twin(model, way):
    """`gawscompile.compile` compiles what ``generate`` calls; under torch.compile one does that by hand."""
    other = copy.deepcopy(model)
    if way == "gawscompile.compile":
        return compiled(way, other)
    inner = other.get_base_model()
    inner.forward = compiled(way, inner.forward)
    return other


def generated(model, **settings):
    """Six new tokens, or what else `generate` returns, after the same seed."""
    torch.manual_seed(0)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **lengths, **settings)


SEARCHES = {
    "top-k": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "top-p": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "dynamic cache": {"do_sample": False, "cache_implementation": "dynamic"},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_searches(pair, search):
    assert torch.equal(*(generated(each, **SEARCHES[search]) for each in pair))


@pytest.mark.slow
def test_scores(pair):
    """What is returned beside tokens is eager's too."""
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    want, got = (generated(each, **settings) for each in pair)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.scores + got.logits, want.scores + want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_attentions_and_hidden_states(way):
    torch._dynamo.reset()
    model = small_llama(layers=2, attn_implementation="eager")  # others have no attentions to give
    settings = {"output_attentions": True, "output_hidden_states": True}
    with fusing(2 * LINEARS):
        other = twin(model, way)
        want, got = (
            generated(each, do_sample=False, return_dict_in_generate=True, **settings) for each in (model, other)
        )
    assert torch.equal(got.sequences, want.sequences)
    assert [len(step) for step in got.attentions] == [2] * 6
    for name in ("attentions", "hidden_states"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        want, got = (each(IDS, use_cache=False, **settings) for each in (model, other))
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3
    torch.testing.assert_close(got.attentions, want.attentions, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.hidden_states, want.hidden_states, rtol=1e-4, atol=1e-4)


QUANTISED = {"cache_implementation": "quantized"}
GROUPS = {"nbits": 4, "q_group_size": 16, "residual_length": 4}


@pytest.mark.slow
@pytest.mark.parametrize("library", ["fp8", "quanto", "hqq"])
def test_quantised_caches(pair, library):
    """Keys and values are quantised in the forward; fp8 is transformers' own. HQQ's search for a scale branches on a
    value, which breaks the graph in every layer."""
    if library != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto"}.get(library, library))
    config = {"backend": library, **(GROUPS if library != "fp8" else {})}
    with fusing(LINEARS if library != "hqq" else None):
        assert torch.equal(*(generated(each, do_sample=False, cache_config=config, **QUANTISED) for each in pair))


@pytest.mark.slow
def test_offloaded_cache(pair):
    """Needs a stream of an accelerator, compiled or not: the error is torch's."""
    for each in pair:
        with pytest.raises((RuntimeError, AssertionError), match=r"accelerator|CUDA"):
            generated(each, do_sample=False, cache_implementation="offloaded")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("way", WAYS)
def test_sliding_windows(way, cache):
    """A window of four tokens: the cache is full before the prompt ends."""
    torch._dynamo.reset()
    model = ARCHITECTURES["Mistral"].build()
    with fusing(2 * LINEARS):
        found = [generated(each, do_sample=False, cache_implementation=cache) for each in (model, twin(model, way))]
    assert torch.equal(*found)
