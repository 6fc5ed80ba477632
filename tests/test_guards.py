"""gawscompile.compile: few guards are checked, and whatever one changes still shows in the next call."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

import gawscompile
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.observe.store import RECORDS
from tests.graphs import Pair, randomise, small_llama, tokens

IDS = tokens(1, 5)
OPTIONS = {"strict": True}


@torch.no_grad()
def logits(call):
    return call(IDS, use_cache=False).logits


def same(compiled, model):
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: what is compiled once must serve every test, and beyond torch's limit all would be eager."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def pair():
    """A model with two adapters and its compiled form, shared by all changes."""
    model = small_llama(layers=1)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules="all-linear"))
    randomise(model)
    mark = len(RECORDS)
    compiled = gawscompile.compile(model, options=OPTIONS)
    same(compiled, model)
    assert any(record.groups for record in RECORDS.since(mark))
    return model, compiled


def scaled(model, factor):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= factor


@pytest.mark.slow
def test_set_adapter(pair):
    model, compiled = pair
    first = logits(compiled)
    for names in ("other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        same(compiled, model)
    assert torch.equal(logits(compiled), first)


@pytest.mark.slow  # a row of test_guarantees
def test_scaling(pair):
    model, compiled = pair
    before = logits(compiled)
    scaled(model, 3.0)
    same(compiled, model)
    assert not torch.allclose(logits(compiled), before, atol=1e-3)
    scaled(model, 1 / 3)
    same(compiled, model)


@pytest.mark.slow  # a row of test_guarantees
def test_disabling(pair):
    model, compiled = pair
    before = logits(compiled)
    with model.disable_adapter():
        same(compiled, model)
        assert not torch.allclose(logits(compiled), before, atol=1e-3)
    same(compiled, model)


@pytest.mark.slow  # test_guarantees has a merged adapter, and one unmerged where another is active
def test_merging(pair):
    model, compiled = pair
    model.merge_adapter()
    same(compiled, model)
    model.unmerge_adapter()
    same(compiled, model)


def test_written_and_replaced_parameters_recompile_nothing(pair):
    model, compiled = pair
    same(compiled, model)
    graphs = graphs_compiled()
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if "lora_B" in name:
                parameter.mul_(-1.5)
            elif "norm" in name:
                parameter.data = parameter.data + 0.1
    same(compiled, model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    same(compiled, model)
    assert graphs_compiled() == graphs


def test_a_factor_that_does_not_fit_is_eagers_error_and_not_an_answer(pair):
    model, compiled = pair
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    kept = layer.weight
    layer.weight = torch.nn.Parameter(kept[:2].clone())
    with pytest.raises(RuntimeError, match=r"shape|size"):
        logits(model)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        logits(compiled)
    layer.weight = kept
    same(compiled, model)


@pytest.mark.slow  # rows of test_guarantees
def test_an_adapter_that_came_later_and_one_that_went(pair):
    model, compiled = pair
    model.add_adapter("late", peft.LoraConfig(r=5, target_modules=["q_proj"]))
    randomise(model)
    model.set_adapter("late")
    same(compiled, model)
    model.delete_adapter("late")
    model.set_adapter("default")
    same(compiled, model)


def test_gradients_get_all_their_guards():
    model, x = Pair().eval(), torch.randn(1, 3, 32)
    compiled = gawscompile.compile(model, options=OPTIONS)
    model.requires_grad_(False)
    got = compiled(x)
    assert not got.requires_grad
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    model.requires_grad_(True)
    compiled(x).sum().backward()
    parameters = list(model.parameters())
    assert len(parameters) == 12 and all(p.grad is not None for p in parameters)


@pytest.mark.slow  # a row of test_guarantees
def test_a_module_of_another_dtype_recompiles():
    """GPT-2's position embedding keeps the sum in fp32, so eager takes a bf16 embedding, in half the memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch._dynamo.reset()
    sizes = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": 128,
        "n_positions": 64,
        "tie_word_embeddings": False,
    }
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    model = randomise(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"])).eval())
    compiled = gawscompile.compile(model, options=OPTIONS)
    same(compiled, model)
    graphs = graphs_compiled()
    base.transformer.wte.to(torch.bfloat16)
    same(compiled, model)
    assert graphs_compiled() == graphs + 1


@pytest.mark.slow
def test_resized_embeddings_recompile(pair):
    model, compiled = pair
    same(compiled, model)
    graphs = graphs_compiled()
    model.resize_token_embeddings(136, mean_resizing=False)
    same(compiled, model)
    assert logits(compiled).shape[-1] == 136 and graphs_compiled() == graphs + 1


@pytest.mark.slow  # a row of test_guarantees
def test_an_adapter_of_another_rank_recompiles(pair, tmp_path):
    model, compiled = pair
    same(compiled, model)
    other = small_llama(layers=1, lora=peft.LoraConfig(r=12, lora_alpha=24, target_modules="all-linear"))
    randomise(other, seed=7).save_pretrained(tmp_path)
    before, graphs = logits(compiled), graphs_compiled()
    hotswap_adapter(model, str(tmp_path), "default")
    same(compiled, model)
    assert not torch.allclose(logits(compiled), before, atol=1e-3) and graphs_compiled() == graphs + 1


def test_what_it_cannot_take_is_said():
    with pytest.raises(ValueError, match="takes no mode"):
        gawscompile.compile(torch.nn.Linear(2, 2), mode="max-autotune")
