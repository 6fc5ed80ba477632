"""Broken checkpoints of Kronecker adapters, each with an error that names file, key or setting, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gawscompile.adapters import GAWSConfig, GAWSDConfig
from gawscompile.banks.checkpoints import CONFIG, WEIGHTS, BankError, read
from gawscompile.banks.kronecker import KINDS, PARTS
from tests.banks.checkpoints import TARGETS, base, linears, saved
from tests.banks.damage import (
    Damage,
    all_of,
    damaged,
    file,
    holds,
    key,
    lacks,
    ones,
    put,
    refused,
    says,
    torch_saved,
    turned,
    without,
)

MADE: dict[str, Any] = {
    "gaws": lambda: GAWSConfig(target_modules=TARGETS, input_splits=4, diag=True),
    "gawsd": lambda: GAWSDConfig(target_modules=TARGETS, input_split_dim=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q", "up", "gate"], r=1, alpha=3, decompose_both=True),
}
MODULES = {"gaws": 6, "gawsd": 6, "lokr": 5}
G, D, DIAG = key("layers.0.q", "GAWS.weight"), key("layers.0.q", "GAWSD"), key("layers.0.q", "diag")
W1, W2 = key("layers.0.q", "lokr_w1_a"), key("layers.0.q", "lokr_w2_b")
WHOLE = key("layers.0.q", "lokr_w2")
ALL = [key(f"layers.{i}.{module}", end) for i in (0, 1) for module in TARGETS for end in ("GAWS.weight", "diag")]
LOST = key("layers.7.q", "GAWS.weight")

# By kind: which folder, the damage, the file that the message names, and what else it says: what is wrong, and a hint.
BROKEN: dict[str, tuple[str, Damage, str, list[str]]] = {
    "weights cut off": ("gaws", file(WEIGHTS, lambda data: data[:-9]), WEIGHTS, ["no whole safetensors", "again"]),
    "a pickle": ("lokr", torch_saved(), WEIGHTS, ["pickle", "convert"]),
    "config cut off": ("gawsd", file(CONFIG, lambda text: text[:40]), CONFIG, ["JSON", "again"]),
    # settings
    "modules to save": ("gaws", says(modules_to_save=["head"]), CONFIG, ["modules_to_save=['head']", "without it"]),
    "of tomorrow": ("lokr", says(use_quantum=True), CONFIG, ["use_quantum=True", "does not know", "plain LoKr"]),
    "a setting of LoRA": ("gaws", says(lora_alpha=3), CONFIG, ["lora_alpha=3", "does not know", "plain GAWS"]),
    "zFLoRA": ("gaws", says(peft_type="ZFLORA"), CONFIG, ["'ZFLORA'", "LORA or GAWS or GAWSD or LOKR", "PEFT"]),
    "LoHa": ("lokr", says(peft_type="LOHA"), CONFIG, ["'LOHA'", "PEFT"]),
    "a type that is a list": ("lokr", says(peft_type=["LOKR"]), CONFIG, ["['LOKR']", "PEFT"]),
    "no rank": ("lokr", without("r"), CONFIG, ["no r:", "add it"]),
    "no alpha": ("lokr", without("alpha"), CONFIG, ["no alpha", "add it"]),
    "rank 0": ("lokr", says(r=0), CONFIG, ["r=0", "above 0"]),
    "an infinite alpha": ("lokr", says(alpha=float("inf")), CONFIG, ["alpha=inf", "finite"]),
    "a factor of 0": ("lokr", says(decompose_factor=0), CONFIG, ["decompose_factor=0", "above 0"]),
    "splits of a half": ("gaws", says(input_splits=0.5), CONFIG, ["input_splits=0.5", "whole number"]),
    "a pattern of words": ("gawsd", says(input_splits_pattern={"q": "x"}), CONFIG, ["input_splits_pattern", "whole"]),
    "a diag of words": ("gaws", says(diag="yes"), CONFIG, ["diag='yes'", "true or false"]),
    "a broken pattern": ("lokr", says(rank_pattern={"(": 2}), CONFIG, ["no regular expression", "correct"]),
    # splits and ranks that are not those of the tensors
    "no splits": ("gaws", without("input_splits"), WEIGHTS, ["layers.0.", "names no splits", "this base model"]),
    "splits that fit nothing": ("gaws", says(input_splits=7), WEIGHTS, ["7", "does not divide", "this base model"]),
    "other splits": ("gaws", says(input_splits=2), WEIGHTS, ["GAWS.weight", "[4, 5]", "[8, 10]", "2 and 2 slices"]),
    "other splits of GAWS-D": ("gawsd", says(input_split_dim=2), WEIGHTS, ["GAWSD", "[4, 5]", "[8, 10]", "10 and 8"]),
    "GAWS as GAWS-D": ("gaws", says(peft_type="GAWSD"), WEIGHTS, ["GAWS.weight", "not taken"]),
    "LoKr as LoRA": ("lokr", says(peft_type="LORA", lora_alpha=1, target_modules=["q"]), CONFIG, ["alpha=3", "LoRA"]),
    "another rank": ("lokr", says(r=2), WEIGHTS, ["gate.lokr_w1 is missing beside", "correct its"]),
    "another factor": ("lokr", says(decompose_factor=2), WEIGHTS, ["gate.lokr_w1 is missing beside", "correct its"]),
    "factors of w1 where it is whole": (
        "lokr", says(decompose_both=False), WEIGHTS, ["gate.lokr_w1 is missing beside", "correct its"]
    ),
    # keys
    "no factors": ("gaws", lacks(*ALL), WEIGHTS, ["holds no factors", "again"]),
    "a module missing": ("gaws", lacks(G, DIAG), WEIGHTS, [G, "is missing", "target_modules"]),
    "a module too many": ("gawsd", says(target_modules=["q", "up"]), WEIGHTS, ["down.GAWSD", "leaves out"]),
    "G missing": ("gaws", lacks(G), WEIGHTS, [G, f"missing beside {DIAG}", "again"]),
    "diag missing": ("gaws", lacks(DIAG), WEIGHTS, [DIAG, f"missing beside {G}", "again"]),
    "a diag too many": ("gaws", says(diag=False), WEIGHTS, ["diag is not what the config asks for", "correct"]),
    "a factor missing": ("lokr", lacks(W2), WEIGHTS, [W2, "missing beside", "again"]),
    "w2 whole and in factors": ("lokr", holds(WHOLE, ones(4, 4)), WEIGHTS, [WHOLE, "not what the config asks for"]),
    "a core": ("lokr", holds(key("layers.0.q", "lokr_t2"), ones(1, 1, 3, 3)), WEIGHTS, ["lokr_t2", "of a convolution"]),
    "a head": ("gaws", holds(key("head", "weight"), ones(11, 16)), WEIGHTS, ["head.weight", "modules_to_save"]),
    "no module before it": ("gaws", holds("GAWS.weight", ones(3, 4)), WEIGHTS, ["GAWS.weight", "not taken"]),
    "a module that is not there": ("gaws", holds(LOST, ones(3, 4)), WEIGHTS, [LOST, "does not have"]),
    "of a convolution": ("gaws", holds(key("conv", "GAWS.weight"), ones(4, 4)), WEIGHTS, ["conv", "is a linear"]),
    "two spellings": ("gaws", holds(key("layers.0.q", "GAWS.b.weight"), ones(3, 4)), WEIGHTS, [G, "another spelling"]),
    "two adapters": (
        "gaws",
        all_of(lacks(DIAG), holds(f"{DIAG}.b", ones(4))), WEIGHTS, [f"{DIAG}.b", "not of one adapter", "keep"]
    ),
    "of a Conv1D": (
        "lokr", holds(key("layers.0.down", "lokr_w1"), ones(4, 4)), WEIGHTS, ["layers.0.down", "Conv1D", "nn.Linear"]
    ),
    # numbers
    "NaN": ("gaws", turned(G, put(3, float("nan"))), WEIGHTS, [G, "NaN", "diverged"]),
    "NaN in a diag": ("gaws", turned(DIAG, put(3, float("nan"))), WEIGHTS, [DIAG, "NaN", "diverged"]),
    "infinity": ("lokr", turned(W1, put(1, float("inf"))), WEIGHTS, [W1, "infinity", "diverged"]),
    "whole numbers": ("gawsd", turned(D, lambda g: g.int()), WEIGHTS, [D, "int32", "float32"]),
    "G turned": ("gaws", turned(G, lambda g: g.T), WEIGHTS, [G, "[4, 3]", "[3, 4]", "own config"]),
    "a diag too long": ("gaws", turned(DIAG, lambda d: ones(5)), WEIGHTS, [DIAG, "[5]", "[4]"]),
    "w2 too long": ("lokr", turned(W2, lambda w: ones(1, 5)), WEIGHTS, [W2, "[1, 5]", "[1, 4]", "rank 1"]),
    "w2 of a convolution": ("lokr", turned(W2, lambda w: w[..., None, None]), WEIGHTS, [W2, "[1, 4, 1, 1]", "[1, 4]"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, config in MADE.items():
        model = peft.get_peft_model(base(), config())
        for key_, parameter in model.named_parameters():
            if "base_layer" not in key_ and parameter.requires_grad:
                nn.init.normal_(parameter)
        found[name] = saved(model, tmp_path_factory.mktemp(name))
    return found


def test_the_good_ones_are_read(good):
    for name, folder in good.items():
        assert len(read(folder, linears(base())).factors) == MODULES[name]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused(kind, good, tmp_path):
    which, damage, name, parts = BROKEN[kind]
    refused(damaged(good[which], damage, tmp_path / "damaged", MODULES[which]), name, parts)


def test_a_state_dict_without_values_is_refused(good):
    state = {**load_file(good["gaws"] / WEIGHTS), G: ones(3, 4, device="meta")}
    with pytest.raises(BankError, match=f"the state dict: {G} is no dense tensor"):
        read(state, linears(base()), config=MADE["gaws"]())


def test_names_of_adapters_are_no_part_of_a_key():
    """As the modules of a PeftModel have them."""
    state = {"layers.0.q.GAWS.mine.weight": ones(3, 4), "layers.0.q.diag.mine": torch.full((4,), 2.0)}
    config = {"peft_type": "GAWS", "input_splits": 4, "diag": True}
    (chain,) = read(state, linears(base()), config=config).factors.values()
    assert torch.equal(chain.modes[0].matrix, torch.full((3, 4), 2.0)) and chain.modes[0].before == 4


def test_every_setting_is_followed_or_refused_or_without_effect():
    """Settings that are here today. A new one is refused where it is not its default, until this list has it."""
    for kind in KINDS.values():
        settings = set(kind.defaults()) - {"peft_type"}
        assert settings - kind.honoured.keys() - set(kind.inert) == {"modules_to_save"}
        assert {*kind.honoured, *kind.inert} <= settings
    assert KINDS.keys() == PARTS.keys()
