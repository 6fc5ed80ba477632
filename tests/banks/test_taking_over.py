"""A bank in a model: what it takes over from PEFT, what it refuses, and what others are told of it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.nn import functional as F

from gawscompile import ahead
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import BankError
from gawscompile.debug.explain import assemble
from tests.banks.common import adapted, close, llama, logits, with_bank

MODELS = {
    "no memory": (lambda: AdapterBank(llama(), memory=10), "holds no adapter"),
    "memory of no unit": (lambda: AdapterBank(llama(), memory="many"), "'64MB'"),
    "no such module": (lambda: AdapterBank(llama(), modules=["nothing"]), "no linear"),
    "no linear": (lambda: AdapterBank(llama(), modules=["embed_tokens"]), "Embedding"),
    "another dtype": (lambda: AdapterBank(llama(), dtype=torch.float64), "float64"),
    "too few modules": (lambda: AdapterBank(adapted("a"), modules=["q_proj"]), "leaves out"),
    "too little memory": (lambda: AdapterBank(adapted("b"), memory=4096), "AdapterBank"),
    "no LoRA": (
        lambda: AdapterBank(peft.get_peft_model(llama(), peft.VeraConfig(target_modules=["q_proj"]))),
        "VERA",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_no_bank_can_take(name):
    make, message = MODELS[name]
    with pytest.raises(BankError, match=message):
        make()


def test_a_model_with_a_bank_is_not_copied(judge):
    model, _ = with_bank(judge)
    with pytest.raises(TypeError, match="copy the model first"):
        copy.deepcopy(model)


def test_scales_as_they_are_now(judge, ids):
    source = copy.deepcopy(judge)
    for layer in source.modules():
        if hasattr(layer, "set_scale") and "c" in layer.scaling:
            layer.set_scale("c", 3.0)
    model, _ = with_bank(source)
    model.adapter_bank.activate("c")
    close(model(ids).logits, logits(source, ids, "c"))


def test_a_merged_adapter_is_refused():
    model = adapted("a")
    model.merge_adapter()
    with pytest.raises(BankError, match="unmerge_adapter"):
        AdapterBank(model)


def test_a_failed_bank_leaves_the_model(ids):
    model = adapted("ac")
    model.base_model.set_adapter(["a", "c"])
    want = model(ids).logits
    with pytest.raises(BankError, match="no room"):
        AdapterBank(model, max_adapters=1)
    assert torch.equal(model(ids).logits, want)


def test_what_is_not_a_bank_s_any_more(judge, tmp_path):
    model, _ = with_bank(judge)
    for call in (model.merge_and_unload, model.merge_adapter, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(BankError, match="AdapterBank has this model's adapters"):
            call()
    with pytest.raises(BankError, match="no PeftModel"):
        AdapterBank(copy.deepcopy(judge).get_base_model())


def test_disabled_adapters_stay_so(judge, ids):
    source = copy.deepcopy(judge)
    source.base_model.disable_adapter_layers()
    model, _ = with_bank(source)
    close(model(ids).logits, logits(judge, ids, None))


def test_no_package_of_a_bank(judge, ids, tmp_path):
    model, _ = with_bank(judge)
    with pytest.raises(ValueError, match="adapter bank"):
        ahead.package(model, tmp_path / "x.pt2", ids)


def test_what_explain_says_of_a_bank(judge):
    model, bank = with_bank(judge)
    bank.activate(["a", {"d": 2.0}])
    bank.pin("c")
    notes = assemble([], model).notes
    assert notes[0].startswith("adapter bank: 14 modules, 3 adapters, 3 of them resident in 0.1 of 8 MB of float32")
    assert any("a: rank 8 on 6 modules, scale 1, 0.02 MB, active" in note for note in notes)
    assert any("c: rank 33 on 6 modules" in note and note.endswith("pinned") for note in notes)
    assert "adapter bank: lm_head is not in it: it is the output layer" in notes


def test_modules_alone(judge):
    """A module that is called outside of its model's forward takes a snapshot of its own."""
    model, bank = with_bank(judge)
    bank.activate(["a", "c"])
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    mine, theirs = model.get_submodule(name), judge.get_submodule(name)
    x = torch.randn(2, 3, 64)
    for row, adapter in enumerate("ac"):
        judge.set_adapter(adapter)
        close(mine(x)[row], theirs(x)[row])
    assert mine.weight is mine.base_layer.weight and mine.bias is None
    close(F.linear(x, mine.weight), mine.base_layer(x))
