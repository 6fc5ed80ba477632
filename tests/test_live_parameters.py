"""Whatever a user does to a parameter between calls shows in the next one; nothing recompiles where torch need not."""

from __future__ import annotations

import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from tests.changes import (
    assigned_data_of_all,
    from_inference_mode,
    fused_adamw,
    in_place,
    loaded,
    moved,
    through_data,
)
from tests.graphs import randomise, small_llama, tokens

IDS = tokens(1, 3)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def pair():
    """A model and its compiled form, shared by all changes: they add up."""
    model = small_llama(layers=1)
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    logits(compiled)
    return model, compiled


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: what is compiled once must serve every test."""


def loaded_by_assignment(model):
    model.load_state_dict({name: value * 1.05 for name, value in model.state_dict().items()}, assign=True)


def hotswapped(model):
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    state = {name: value * -1.1 for name, value in model.state_dict().items() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


CHANGES = [
    *(in_place, through_data, assigned_data_of_all, fused_adamw, loaded, hotswapped, moved, from_inference_mode),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_call_shows_it(pair, change):
    model, compiled = pair
    before, graphs = logits(compiled), graphs_compiled()
    change(model)
    after = logits(compiled)
    torch.testing.assert_close(after, logits(model), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3
    assert graphs_compiled() == graphs


def test_replaced_parameter_objects_show(pair):
    model, compiled = pair
    before = logits(compiled)
    loaded_by_assignment(model)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            b = module.lora_B["default"]
            b.weight = torch.nn.Parameter(torch.randn_like(b.weight))
    after = logits(compiled)
    torch.testing.assert_close(after, logits(model), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.slow
def test_another_dtype_or_rank_is_compiled_anew():
    model = small_llama(layers=1)
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    logits(compiled)
    model.to(torch.bfloat16)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=0.1, atol=0.1)
    model.float()
    for module in model.modules():
        if hasattr(module, "lora_B"):
            a, b = module.lora_A["default"], module.lora_B["default"]
            a.weight = torch.nn.Parameter(a.weight[:4].clone())
            b.weight = torch.nn.Parameter(b.weight[:, :4].clone())
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_two_models_share_base_weights_and_differ_in_adapters():
    from peft import LoraConfig, get_peft_model

    from gawscompile.calibration.measure import sharing_copy

    base = small_llama(layers=1, lora=None)
    config = LoraConfig(r=8, target_modules="all-linear")
    first, second = (randomise(get_peft_model(sharing_copy(base), config).eval(), seed, 0.5) for seed in (0, 1))
    ours = [torch.compile(m, backend="gaws", options={"strict": True}) for m in (first, second)]
    for _ in range(2):
        for model, compiled in zip((first, second), ours, strict=True):
            torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(ours[0]), logits(ours[1]), rtol=1e-2)
    assert first.base_model.model.lm_head.weight is second.base_model.model.lm_head.weight
