"""Libraries above transformers' models: its pipelines, and sentence-transformers."""

from __future__ import annotations

import string

import peft
import pytest
import torch

from tests.graphs import randomise
from tests.ways import WAYS, compiled, fusing, settings

TEXTS = ["a lighthouse", "of the sea and the wind", "x", "some longer text about nothing at all"]
LINEARS = 7  # of a layer of Llama
both = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    """A random BERT of two layers with a tokenizer of single letters, as a local directory."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=len(words))).save_pretrained(folder)
    return folder


@pytest.mark.slow
@both
def test_text_generation(way, tiny_llama_dir):
    """A pipeline over a PEFT model. Under torch.compile its inner forward is compiled: `generate` calls that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = randomise(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).eval())
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = write(TEXTS, **greedy)
    if way == "gawscompile.compile":
        write = pipeline("text-generation", model=compiled(way, model), tokenizer=tokenizer, device="cpu")
    else:
        inner = model.get_base_model()
        inner.forward = compiled(way, inner.forward)
    with fusing(2 * LINEARS):
        assert write(TEXTS, **greedy) == want


@pytest.mark.slow
@both
def test_feature_extraction(way, bert_dir):
    """The compiled model itself goes into the pipeline."""
    from transformers import AutoModel, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(bert_dir)
    lora = peft.LoraConfig(r=4, target_modules=["query", "key", "value", "dense"])
    model = randomise(peft.get_peft_model(AutoModel.from_pretrained(bert_dir), lora).eval())
    found = []
    with fusing():
        for each in (model, compiled(way, model)):
            extract = pipeline("feature-extraction", model=each, tokenizer=tokenizer, device="cpu")
            found.append([torch.tensor(features) for features in extract(TEXTS)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # test_everyday has a model that is compiled in place
@pytest.mark.parametrize("how", ["forward", "whole"])
@pytest.mark.parametrize("way", WAYS)
def test_sentence_transformers(way, how, bert_dir):
    """`encode` with a LoRA, the transformer's forward or the whole module compiled."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bert_dir), device="cpu")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["query", "key", "value", "dense"]), model)
    randomise(model.eval())
    want = torch.tensor(model.encode(TEXTS))
    if how == "forward":
        inner = model[0].auto_model
        inner.forward = compiled(way, inner.forward)
    else:
        model.compile(**settings(way))
    with fusing():
        torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), want, rtol=1e-4, atol=1e-4)
