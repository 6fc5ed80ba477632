"""Which splits are valid, and what they cost."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from gawscompile.adapters import Splits, valid_splits
from gawscompile.adapters.splits import Wish, all_splits, resolve
from tests.adapters.common import KINDS, Net, base, config

BOTH = pytest.mark.parametrize("kind", KINDS)


def test_the_papers_example_size():
    """phi-2, q/k/v, 10 splits of 256 (METHODS): 6,291,456 parameters."""
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = PhiForCausalLM(PhiConfig(**sizes, vocab_size=51200))
    found = valid_splits(model, "gaws", ["q_proj", "k_proj", "v_proj"])
    (shape,) = found.shapes
    assert (shape.in_features, shape.out_features, len(shape.modules)) == (2560, 2560, 96)
    assert {choice.splits.inputs: choice.parameters for choice in shape.choices}[10] == 6_291_456
    assert found.common[10] == 6_291_456 and "6,291,456" in str(found)


@BOTH
@pytest.mark.parametrize("diag", [False, True])
def test_counts_are_those_of_a_real_adapter(kind, diag):
    model = base()
    found = valid_splits(model, kind)
    for setting, parameters in found.common.items():
        splits = {"input_splits": setting} if kind == "gaws" else {"input_split_dim": setting}
        made = config(kind, **{"input_splits": None, "input_split_dim": None, **splits}, diag=diag)
        trained, _ = peft.get_peft_model(base(), made).get_nb_trainable_parameters()
        extra = sum(
            len(shape.modules) * (shape.in_features // setting) for shape in found.shapes
        )  # one per column of G, which is K/n for gaws and K/d for gawsd
        assert trained == parameters + diag * extra
    assert list(found.common) == [1, 2, 4, 8, 16, 32]


@BOTH
def test_every_listed_choice_is_accepted_and_no_other(kind):
    for inputs, outputs in ((24, 36), (7, 7), (64, 16), (5, 3)):
        listed = set(all_splits(kind, inputs, outputs))
        assert len(listed) == sum(math.gcd(inputs, outputs) % d == 0 for d in range(1, 37))
        for a in range(1, inputs + 1):
            for b in range(1, outputs + 1):
                try:
                    accepted = resolve(kind, inputs, outputs, Wish(a, b), "m") == Splits(a, b)
                except ValueError:
                    accepted = False
                assert accepted == (Splits(a, b) in listed)


@BOTH
def test_one_statement_is_enough(kind):
    wanted = Splits(6, 6) if kind == "gaws" else Splits(6, 9)
    wishes = [Wish(input_splits=6), Wish(output_splits=wanted.outputs), Wish(input_split_dim=4)]
    for wish in [*wishes, Wish(output_split_dim=36 // wanted.outputs), Wish(6, wanted.outputs, 4)]:
        assert resolve(kind, 24, 36, wish, "m") == wanted


def test_refusals():
    with pytest.raises(ValueError, match="'gaws', 'gawsd'"):
        valid_splits(base(), "lokr")
    with pytest.raises(ValueError, match="matches target_modules"):
        valid_splits(base(), "gaws", ["nothing"])
    with pytest.raises(TypeError, match="Embedding"):
        valid_splits(Net(nn.Embedding(4, 4)), "gaws", ["proj"])


def test_an_adapted_model_is_listed_by_its_base_layers():
    model = peft.get_peft_model(base(), config("gaws"))
    assert valid_splits(model.base_model.model, "gawsd").common == valid_splits(base(), "gawsd").common
