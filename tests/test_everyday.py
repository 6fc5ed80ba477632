"""Everyday use: each of the ways people call torch.compile and generate gives eager's answers."""

from __future__ import annotations

import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.observe.store import RECORDS
from tests.graphs import randomise, small_llama, tokens

IDS = tokens(1, 5)
OPTIONS = {"strict": True}


@pytest.fixture(autouse=True)
def fused():
    """Right answers are not enough: each test must have run generated kernels."""
    mark = len(RECORDS)
    yield
    assert any(record.groups for record in RECORDS.since(mark))


@pytest.fixture(scope="module")
def model():
    return small_llama(layers=1)


@torch.no_grad()
def logits(call, ids=IDS, **more):
    return call(ids, use_cache=False, **more).logits


def close(got, want, loose=1e-4):
    torch.testing.assert_close(got, want, rtol=loose, atol=loose)


def test_model_compile_in_place():
    model = small_llama(layers=1)
    want = logits(model)
    model.compile(backend="gaws", options=OPTIONS)
    close(logits(model), want)


def test_decorator_and_fullgraph(model):
    @torch.compile(backend="gaws", fullgraph=True, options=OPTIONS)
    def call(ids):
        return model(ids, use_cache=False).logits

    with torch.no_grad():
        close(call(IDS), logits(model))


@pytest.mark.slow
def test_one_graph_for_any_length_and_batch(model):
    compiled = torch.compile(model, backend="gaws", dynamic=True, options=OPTIONS)
    logits(compiled, tokens(2, 3))
    graphs = graphs_compiled()
    for shape in ((2, 5), (4, 3), (3, 9)):
        ids = tokens(*shape, seed=sum(shape))
        close(logits(compiled, ids), logits(model, ids))
    assert graphs_compiled() == graphs


def test_inference_mode_and_no_grad(model):
    compiled = torch.compile(model, backend="gaws", options=OPTIONS)
    want = logits(model)
    close(logits(compiled), want)
    with torch.inference_mode():
        close(compiled(IDS, use_cache=False).logits, want)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = small_llama(layers=1)
        compiled = torch.compile(model, backend="gaws", options=OPTIONS)
        close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


@pytest.mark.slow
def test_hooks_still_run():
    model = small_llama(layers=1)
    seen = []
    layer = model.base_model.model.model.layers[0]
    layer.self_attn.register_forward_hook(lambda module, inputs, output: seen.append(1))
    layer.mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0,))
    compiled = torch.compile(model, backend="gaws", options=OPTIONS)
    want = logits(model)
    seen.clear()
    close(logits(compiled), want)
    assert seen


def test_models_without_adapters():
    model = small_llama(layers=1, lora=None)
    close(logits(torch.compile(model, backend="gaws", options=OPTIONS)), logits(model))


def test_modules_to_save():
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = small_llama(layers=1, lora=lora)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    close(logits(torch.compile(model, backend="gaws", options=OPTIONS)), logits(model))


@pytest.mark.slow
def test_switching_adapters_recompiles_only_where_torch_does():
    from peft import LoraConfig

    model = small_llama(layers=1)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model, 5)
    counts = []
    for settings in ({"backend": "eager"}, {"backend": "gaws", "options": OPTIONS}):
        torch._dynamo.reset()
        model.set_adapter("default")
        compiled, graphs = torch.compile(model, **settings), graphs_compiled()
        for name in ("default", "second", "default", "second", "default"):
            model.set_adapter(name)
            close(logits(compiled), logits(model))
        with model.disable_adapter():
            close(logits(compiled), logits(model))
        counts.append(graphs_compiled() - graphs)
    assert counts[0] == counts[1] <= 4


@pytest.mark.slow
def test_scaling_after_compile_recompiles_only_where_torch_does():
    model = small_llama(layers=1)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    counts = []
    for settings in ({"backend": "eager"}, {"backend": "gaws", "options": OPTIONS}):
        torch._dynamo.reset()
        compiled, graphs = torch.compile(model, **settings), graphs_compiled()
        for factor in (1.0, 3.0, 0.5, 2.0):
            for layer in layers:
                layer.scaling["default"] = 2.0 * factor
            close(logits(compiled), logits(model))
        counts.append(graphs_compiled() - graphs)
    assert counts[0] == counts[1] <= 3


@pytest.mark.slow
def test_parameters_that_train_are_fused_with_and_without_gradients():
    model = small_llama(layers=1)
    assert any(parameter.requires_grad for parameter in model.parameters())
    compiled = torch.compile(model, backend="gaws", options=OPTIONS)
    close(logits(compiled), logits(model))
    mark = len(RECORDS)
    got = compiled(IDS, use_cache=False).logits  # gradients wanted: another graph, and backward works
    got.square().mean().backward()
    assert all(record.groups for record in RECORDS.since(mark))
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_compile_config():
    """transformers reads a CompileConfig on CPUs only if told to; its default mode and options cannot be combined."""
    from transformers import CompileConfig

    model = small_llama(layers=1, lora=None)
    config = CompileConfig(backend="gaws", mode=None, options=OPTIONS)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(**inputs, **settings)
    got = model.generate(**inputs, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(got, want)
