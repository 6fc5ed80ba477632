"""approximate(): exact where ΔW has the form, honest about the error elsewhere, and never silent."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters import ApproximationError, SplitError, Splits, approximate
from gawscompile.adapters.approximate import nearest, nearest_kronecker
from tests.adapters.common import KINDS, Net, base, run
from tests.graphs import randomise as randomise_lora

SPLITS = {"gaws": {"splits": 4}, "gawsd": {"split_dim": 8}}
BOTH = pytest.mark.parametrize("kind", KINDS)


def lora(name="Llama", r=8):
    made = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
    return randomise_lora(peft.get_peft_model(base(name), made).eval())


def dense(kind, g, splits, rows, columns):
    if kind == "gaws":
        return torch.kron(torch.eye(splits.inputs, dtype=g.dtype), g)
    return torch.kron(g, torch.eye(columns // splits.inputs, dtype=g.dtype))


def kronecker_lora(kind, layer_kind):
    """A LoRA of full rank whose ΔW is exactly I_3 ⊗ G or G ⊗ I_8, over 24 inputs and 24 outputs."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 24) if layer_kind == "Linear" else Conv1D(24, 24)
    made = peft.LoraConfig(r=24, lora_alpha=24, target_modules=["proj"], fan_in_fan_out=layer_kind != "Linear")
    model = peft.get_peft_model(Net(layer).double(), made).eval()
    g = torch.randn((8, 8) if kind == "gaws" else (3, 3)).double()
    adapted = model.base_model.model.proj
    with torch.no_grad():
        adapted.lora_A["default"].weight.copy_(torch.eye(24))
        adapted.lora_B["default"].weight.copy_(dense(kind, g, Splits(3, 3), 24, 24))
    return model, layer, g


@BOTH
@pytest.mark.parametrize("layer_kind", ["Linear", "Conv1D"])
def test_an_exact_kronecker_is_recovered(kind, layer_kind):
    model, layer, g = kronecker_lora(kind, layer_kind)
    found = approximate(model, kind, splits=3, tolerance=1e-6)
    assert found.error < 1e-12
    (weights,) = found.state_dict.values()
    torch.testing.assert_close(weights.double(), g)
    (fit,) = found.fits
    assert (fit.module, fit.parameters, fit.parameters_before) == ("proj", g.numel(), 2 * 24 * 24)
    attached = found.attach(Net(layer).double())
    x = torch.randn(4, 24).double()
    with torch.no_grad():
        torch.testing.assert_close(attached(x), model(x), rtol=1e-5, atol=1e-5)


@BOTH
def test_a_random_lora_is_refused_and_left_alone(kind):
    model = lora()
    before = run(model)
    with pytest.raises(ApproximationError) as refused:
        approximate(model, kind, **SPLITS[kind], tolerance=0.1)
    message, found = str(refused.value), refused.value.result
    assert "14 of 14 modules" in message and "tolerance=" in message
    assert found.worst[0].error == found.error and f"{found.worst[0].module}: {found.error:.3f}" in message
    assert "down_proj" in found.summary()
    assert torch.equal(run(model), before)
    assert all(0.1 < fit.error <= 1 for fit in found.fits)


@BOTH
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "RoBERTa"])
def test_an_accepted_fit_is_an_adapter_for_a_fresh_base(kind, name, tmp_path):
    found = approximate(lora(name), kind, **SPLITS[kind], tolerance=1.0)
    attached = found.attach(base(name))
    assert not torch.equal(run(attached, name), run(base(name), name))
    found.save_pretrained(tmp_path)
    assert torch.equal(run(peft.PeftModel.from_pretrained(base(name), tmp_path), name), run(attached, name))


@BOTH
def test_the_error_is_that_of_the_dense_matrices_and_the_least_possible(kind):
    torch.manual_seed(0)
    delta = torch.randn(36, 24).double()
    splits = Splits(6, 6) if kind == "gaws" else Splits(2, 3)
    g, error = nearest(delta, kind, splits)
    off = lambda g: float((delta - dense(kind, g, splits, 36, 24)).norm() / delta.norm())  # noqa: E731
    assert error == pytest.approx(off(g), abs=1e-12)
    assert all(off(g + 0.01 * torch.randn_like(g)) > error for _ in range(5))


def test_sums_of_kronecker_products():
    torch.manual_seed(0)
    splits = Splits(4, 6)
    a, b = torch.randn(3, 6, 4).double(), torch.randn(3, 5, 2).double()
    delta = sum(torch.kron(a[t], b[t]) for t in range(3))
    errors = []
    for terms in (1, 2, 3, 100):
        left, right, error = nearest_kronecker(delta, splits, terms)
        again = sum(torch.kron(left[t], right[t]) for t in range(len(left)))
        assert error == pytest.approx(float((delta - again).norm() / delta.norm()), abs=1e-12)
        errors.append(error)
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-12
    # I ⊗ G is one of them, so one free term is never worse
    assert errors[0] <= nearest(delta, "gaws", Splits(2, 2))[1]


def test_terms_on_a_model():
    model = lora(r=1)
    errors = [approximate(model, "kronecker", split_dim=8, terms=terms, tolerance=1.0).error for terms in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6
    found = approximate(model, "kronecker", split_dim=8, terms=4, tolerance=1.0)
    assert found.factors["model.layers.0.self_attn.q_proj"][0].shape == (4, 8, 8)
    with pytest.raises(ValueError, match="no GAWS adapter"):
        found.attach(base())


def test_an_untrained_lora_is_fitted_by_zero():
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules="all-linear"))
    found = approximate(model, "gaws", splits=4)
    assert found.error == 0 and not any(value.any() for value in found.state_dict.values())


def test_refusals():
    model = lora()
    with pytest.raises(ValueError, match="'gaws', 'gawsd', 'kronecker'"):
        approximate(model, "lokr", splits=4)
    with pytest.raises(ValueError, match="add up to one"):
        approximate(model, "gaws", splits=4, terms=2)
    with pytest.raises(SplitError, match=r"names no splits.*Valid are"):
        approximate(model, "gaws")
    with pytest.raises(SplitError, match="5 does not divide"):
        approximate(model, "gaws", splits=5)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        approximate(model, "gaws", splits=4, adapter="other")
    scaled = peft.get_peft_model(base(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"q_proj.* has no ΔW"):
        approximate(scaled, "gaws", splits=4)


class Two(nn.Module):
    """``fc`` and ``block.fc``: one name is the other's end."""

    def __init__(self, first: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = first(16, 16)
        self.block = nn.ModuleDict({"fc": nn.Linear(16, 16)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["fc"](self.fc(x))


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


MORE_THAN_DELTA = {
    "DoRA": (peft.LoraConfig(target_modules=["fc"], use_dora=True), "not ΔW x"),
    "bias of B": (peft.LoraConfig(target_modules=["fc"], lora_bias=True), "not ΔW x"),
    "biases of the base": (peft.LoraConfig(target_modules=["fc"], bias="all"), "trained biases"),
    "PiSSA": (peft.LoraConfig(target_modules=["fc"], init_lora_weights="pissa"), "changed the base"),
    "OFT": (peft.OFTConfig(target_modules=["fc"], oft_block_size=4), "not ΔW x"),
    "MiSS": (peft.MissConfig(target_modules=["fc"], r=4), "cannot be had: .*Error"),
    "modules_to_save": (peft.LoraConfig(target_modules=r"fc", modules_to_save=["block.fc"]), "copy of block.fc"),
}


@pytest.mark.parametrize("name", MORE_THAN_DELTA)
def test_what_is_more_than_a_delta_is_refused(name):
    made, message = MORE_THAN_DELTA[name]
    model = randomised(peft.get_peft_model(Two(), made))
    with pytest.raises(ValueError, match=message):
        approximate(model, "gaws", splits=1, tolerance=1.0)


@pytest.mark.parametrize("to", ["gaws", "kronecker"])
def test_what_is_not_finite_is_refused(to):
    model = randomised(peft.get_peft_model(Two(), peft.LoraConfig(target_modules=["fc"])))
    with torch.no_grad():
        model.base_model.model.fc.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc .*not a finite matrix of 16 × 16"):
        approximate(model, to, splits=4, tolerance=1.0)


def test_the_fit_sits_where_the_old_adapter_did_and_nowhere_else():
    model = randomised(peft.get_peft_model(Two(), peft.LoraConfig(r=16, lora_alpha=16, target_modules=r"fc")))
    found = approximate(model, "gaws", splits=1, tolerance=1e-6)
    attached = found.attach(Two())
    assert attached.targeted_module_names == ["fc"]
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(attached(x), model(x))
    for wrapped in (model.base_model, torch.compile(model, backend="eager")):
        assert approximate(wrapped, "gaws", splits=1, tolerance=1e-6).state_dict.keys() == found.state_dict.keys()


def test_a_merged_and_a_disabled_adapter_are_still_fitted():
    model = randomised(peft.get_peft_model(Two(), peft.LoraConfig(r=4, target_modules="all-linear")))
    wanted = approximate(model, "gaws", splits=4, tolerance=1.0).state_dict
    model.merge_adapter()
    merged = approximate(model, "gaws", splits=4, tolerance=1.0).state_dict
    with model.disable_adapter():
        disabled = approximate(model, "gaws", splits=4, tolerance=1.0).state_dict
    for key, value in wanted.items():
        torch.testing.assert_close(merged[key], value)
        torch.testing.assert_close(disabled[key], value)
