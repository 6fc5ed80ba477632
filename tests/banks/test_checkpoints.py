"""Adapters that a bank reads: what comes out adds what PEFT adds."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gawscompile.banks.checkpoints import CONFIG, WEIGHTS, BankError, read
from tests.banks.checkpoints import IDS, PREFIX, TARGETS, adapted, base, linears, saved, served

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"up": 7, r"layers\.1\.q": 2}},
    "alpha pattern": {"alpha_pattern": {"q": 1.5}},
    "patterns": {"use_rslora": True, "rank_pattern": {"down": 3}, "alpha_pattern": {"^layers.0.down": 5, "up": 9}},
    "lora_bias": {"lora_bias": True, "use_rslora": True},
    "lora_only": {"bias": "lora_only"},
    "both biases": {"bias": "lora_only", "lora_bias": True},
    "all": {"bias": "all", "norm": False},
    "Conv1D": {"target_modules": ["down"], "fan_in_fan_out": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"exclude_modules": ["layers.0.q"]},
    "pattern": {"target_modules": r".*\.0\.(q|down)"},
    "all-linear": {"target_modules": "all-linear"},
    "DoRA": {"use_dora": True, "bias": "lora_only"},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q": 1.5}},
    "orthogonal": {"init_lora_weights": "orthogonal", "lora_dropout": 0.5},
}

SOURCES: dict[str, Callable[[peft.PeftModel, Path], tuple[Any, Any]]] = {
    "folder": lambda model, at: (saved(model, at), None),
    "folder as str": lambda model, at: (str(saved(model, at)), None),
    "state dict": lambda model, at: (peft.get_peft_model_state_dict(model), model.peft_config["default"]),
    "named": lambda model, at: (
        {
            re.sub("(lora_[AB])", r"\1.mine", key).replace("vector", "vector.mine.weight"): tensor
            for key, tensor in peft.get_peft_model_state_dict(model).items()
        },
        json.loads((saved(model, at) / CONFIG).read_text()),
    ),
    "bare": lambda model, at: (
        {
            key.removeprefix(PREFIX).replace(".base_layer.bias", ".bias"): tensor
            for key, tensor in peft.get_peft_model_state_dict(model).items()
        },
        model.peft_config["default"].to_dict(),
    ),
    "PeftModel": lambda model, at: (model, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_adds_what_peft_adds(kind, tmp_path):
    model = adapted(**KINDS[kind])
    with torch.no_grad():
        wanted = model(IDS)
    places = {name.partition(".lora_A")[0] for name in peft.get_peft_model_state_dict(model) if "lora_A" in name}
    plain = base(KINDS[kind].get("norm", True))
    assert (plain(IDS) - wanted).abs().max() > 0.1
    for name, way in SOURCES.items():
        source, config = way(model, tmp_path / name)
        adapter = read(source, linears(plain), config=config)
        assert {PREFIX + path for path in adapter.factors} == places, name
        assert (served(adapter, plain) - wanted).abs().max() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype_and_need_no_gradient(dtype, tmp_path):
    model = adapted(bias="lora_only").to(dtype)
    adapter = read(saved(model, tmp_path / "one"), linears(base()))
    live = read(model, linears(base())).factors
    for path, factors in adapter.factors.items():
        assert factors.a.dtype == factors.b.dtype == dtype
        assert factors.bias is None or factors.bias.dtype == torch.float32
        assert not live[path].a.requires_grad
        assert torch.equal(live[path].a, factors.a) and torch.equal(live[path].b, factors.b)


def test_what_is_read_can_be_saved_again(tmp_path):
    model = adapted(rank_pattern={"up": 2}, use_rslora=True, task_type="FEATURE_EXTRACTION")
    for source in (saved(model, tmp_path / "first"), model):
        adapter = read(source, linears(base()))
        again = tmp_path / "again"
        again.mkdir(exist_ok=True)
        (again / CONFIG).write_text(json.dumps(adapter.config))
        tensors = {}
        for path, factors in adapter.factors.items():
            tensors |= {f"{PREFIX}{path}.lora_A.weight": factors.a, f"{PREFIX}{path}.lora_B.weight": factors.b}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, again / WEIGHTS)
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(base(), again).eval()
            assert torch.equal(loaded.get_base_model()(IDS), model.get_base_model()(IDS))


def test_a_state_dict_needs_only_rank_and_alpha():
    model = adapted(r=2, lora_alpha=3)
    tensors = peft.get_peft_model_state_dict(model)
    adapter = read(tensors, linears(base()), config={"r": 2, "lora_alpha": 3})
    assert {factors.scale for factors in adapter.factors.values()} == {1.5}
    assert adapter.config["peft_type"] == "LORA"
    kept = {key: tensor for key, tensor in tensors.items() if "layers.0.q" in key}  # any modules will do
    assert list(read(kept, linears(base()), config={"r": 2, "lora_alpha": 3}).factors) == ["layers.0.q"]


def test_a_state_dict_of_parameters():
    model = adapted()
    tensors = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert any(parameter.requires_grad for parameter in tensors.values())
    factors = read(tensors, linears(base()), config=model.peft_config["default"]).factors
    assert not any(f.a.requires_grad or f.b.requires_grad for f in factors.values())


def test_all_linears_may_be_fewer():
    """PEFT knows which linears "all-linear" leaves out of a model, a bank does not."""
    model = adapted()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    assert len(read(peft.get_peft_model_state_dict(model), linears(base()), config=config).factors) == 6


def test_one_adapter_of_several():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q"]))
    with torch.no_grad():
        model.base_model.model.layers[0].q.lora_B["second"].weight.fill_(2.0)
    second = read(model, linears(base()), adapter_name="second")
    assert list(second.factors) == ["layers.0.q", "layers.1.q"]
    assert second.factors["layers.0.q"].b.shape == (12, 3) and (second.factors["layers.0.q"].b == 2).all()
    assert len(read(model, linears(base())).factors) == 6
    model.delete_adapter("default")
    assert len(read(model, linears(base())).factors) == 2  # the only one, whatever its name
    with pytest.raises(BankError, match=r"no adapter 'third': .*adapter_name=.*'default', 'second'"):
        model.add_adapter("default", peft.LoraConfig(target_modules=["q"]))
        read(model, linears(base()), adapter_name="third")


def test_biases_of_other_linears_may_be_there_untrained(tmp_path):
    """``bias="all"`` saves every bias of the model, that of `gate` among them, which no LoRA is on."""
    folder = saved(adapted(bias="all", norm=False), tmp_path / "all")
    assert f"{PREFIX}gate.bias" in load_file(folder / WEIGHTS)
    assert "gate" not in read(folder, linears(base(norm=False))).factors


def test_another_name_of_the_base_model_is_no_error(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "/their/disk/toy"
    assert len(read(saved(model, tmp_path), linears(base()), base="toy").factors) == 6


def test_reading_changes_nothing_and_asks_nobody(tmp_path, monkeypatch):
    from peft.utils import save_and_load

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub is asked")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", asked)
    model = adapted(bias="lora_only")
    model.peft_config["default"].base_model_name_or_path = "someone/toy"
    plain = base()
    save_file(peft.get_peft_model_state_dict(model, save_embedding_layers=False), tmp_path / WEIGHTS)
    config = {**model.peft_config["default"].to_dict(), "target_modules": TARGETS}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    weights, own = (copy.deepcopy(one.state_dict()) for one in (model, plain))
    for source in (tmp_path, model):
        read(source, linears(plain))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for one, was in ((model, weights), (plain, own)):
        assert all(torch.equal(tensor, was[key]) for key, tensor in one.state_dict().items())
