"""Broken checkpoints, each with an error that names file, key or setting, and what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gawscompile.banks.checkpoints import CONFIG, WEIGHTS, BankError, read
from tests.banks.checkpoints import PREFIX, adapted, base, saved
from tests.banks.damage import (
    HELD,
    KNOWN,
    QB,
    UP,
    UP_BIAS,
    Damage,
    Q,
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

# By kind: the damage, the file that the message names, and what else it says: the key, module or setting, and a hint.
BROKEN: dict[str, tuple[Damage, str, list[str]]] = {
    # files
    "no config": (file(CONFIG, None), CONFIG, ["missing", "save_pretrained"]),
    "config cut off": (file(CONFIG, lambda text: text[:40]), CONFIG, ["JSON", "again"]),
    "config empty": (file(CONFIG, lambda text: b""), CONFIG, ["JSON", "again"]),
    "config not text": (file(CONFIG, lambda text: b"\xff\x00\xfe" * 9), CONFIG, ["JSON", "again"]),
    "config nested without end": (file(CONFIG, lambda text: b"[" * 10**5), CONFIG, ["JSON", "again"]),
    "config a list": (file(CONFIG, lambda text: b"[1]"), CONFIG, ["no JSON object", "save_pretrained"]),
    "no weights": (file(WEIGHTS, None), WEIGHTS, ["missing", "save_pretrained"]),
    "only a pickle": (torch_saved(name="adapter_model.bin"), WEIGHTS, ["adapter_model.bin", "convert", "save_file"]),
    "a pickle by another name": (torch_saved(), WEIGHTS, ["pickle", "convert"]),
    "an old pickle by another name": (torch_saved(old=True), WEIGHTS, ["pickle", "convert"]),
    "a bare pickle": (file(WEIGHTS, lambda data: pickle.dumps({"a": 1})), WEIGHTS, ["safetensors", "again"]),
    "weights cut off": (file(WEIGHTS, lambda data: data[:-9]), WEIGHTS, ["no whole safetensors", "again"]),
    "header cut off": (file(WEIGHTS, lambda data: data[:20]), WEIGHTS, ["no whole safetensors", "again"]),
    "header broken": (file(WEIGHTS, lambda data: data[:8] + b"[" + data[9:]), WEIGHTS, ["no whole safetensors"]),
    "weights empty": (file(WEIGHTS, lambda data: b""), WEIGHTS, ["no whole safetensors", "again"]),
    "weights longer": (file(WEIGHTS, lambda data: data + b"\0" * 64), WEIGHTS, ["no whole safetensors", "again"]),
    # settings that a bank does not follow
    "IA3": (says(peft_type="IA3"), CONFIG, ["'IA3'", "LORA", "PEFT"]),
    "another type without rank": (
        all_of(says(peft_type="LOHA"), without("r", "lora_alpha")), CONFIG, ["'LOHA'", "LORA", "PEFT"]
    ),
    "no type": (without("peft_type"), CONFIG, ["no peft_type", "add it"]),
    "no rank": (without("r"), CONFIG, ["no r:", "add it"]),
    "no alpha": (without("lora_alpha"), CONFIG, ["no lora_alpha", "add it"]),
    "modules to save": (says(modules_to_save=["head"]), CONFIG, ["modules_to_save=['head']", "without it"]),
    "trained tokens": (says(trainable_token_indices=[3]), CONFIG, ["trainable_token_indices", "without it"]),
    "parameters": (says(target_parameters=["layers.0.q.weight"]), CONFIG, ["target_parameters", "without it"]),
    "aLoRA": (says(alora_invocation_tokens=[5]), CONFIG, ["alora_invocation_tokens", "without it"]),
    "QALoRA": (says(use_qalora=True), CONFIG, ["use_qalora", "without it"]),
    "BD-LoRA": (says(use_bdlora={"nblocks": 2}), CONFIG, ["use_bdlora", "without it"]),
    "Arrow": (says(arrow_config={"top_k": 3}), CONFIG, ["arrow_config", "without it"]),
    "KaSA": (says(kasa_config={"beta": 1e-4}), CONFIG, ["kasa_config", "without it"]),
    "VeLoRA": (says(velora_config={"num_groups": 4}), CONFIG, ["velora_config", "without it"]),
    "MonteCLoRA": (says(monteclora_config={"num_samples": 8}), CONFIG, ["monteclora_config", "without it"]),
    "Megatron": (says(megatron_config={"heads": 2}), CONFIG, ["megatron_config", "without it"]),
    "layers twice": (says(layer_replication=[[0, 2], [0, 2]]), CONFIG, ["layer_replication", "without it"]),
    "tied weights": (says(ensure_weight_tying=True), CONFIG, ["ensure_weight_tying", "without it"]),
    "a setting of tomorrow": (says(use_quantum=True), CONFIG, ["use_quantum=True", "does not know", "without it"]),
    "PiSSA": (says(init_lora_weights="pissa_niter_4"), CONFIG, ["pissa_niter_4", "path_initial_model_for_weight"]),
    "OLoRA": (says(init_lora_weights="olora"), CONFIG, ["init_lora_weights='olora'", "path_initial_model_for_weight"]),
    # settings with a value that is none
    "rank 0": (says(r=0), CONFIG, ["r=0", "above 0"]),
    "rank below 0": (says(r=-4), CONFIG, ["r=-4", "above 0"]),
    "rank 4.0": (says(r=4.0), CONFIG, ["r=4.0", "whole number"]),
    "rank true": (says(r=True), CONFIG, ["r=True", "whole number"]),
    "rank null": (says(r=None), CONFIG, ["r=None", "whole number"]),
    "alpha NaN": (says(lora_alpha=float("nan")), CONFIG, ["lora_alpha=nan", "finite"]),
    "alpha inf": (says(lora_alpha=float("inf")), CONFIG, ["lora_alpha=inf", "finite"]),
    "alpha of 400 digits": (says(lora_alpha=10**400), CONFIG, ["lora_alpha=1000", "finite"]),
    "alpha a string": (says(lora_alpha="8"), CONFIG, ["lora_alpha='8'", "finite number"]),
    "rank of a pattern 0": (says(rank_pattern={"q": 0}), CONFIG, ["rank_pattern={'q': 0}", "above 0"]),
    "ranks a list": (says(rank_pattern=[4]), CONFIG, ["rank_pattern=[4]", "pattern"]),
    "alpha of a pattern NaN": (says(alpha_pattern={"q": float("nan")}), CONFIG, ["alpha_pattern", "finite"]),
    "rsLoRA a string": (says(use_rslora="false"), CONFIG, ["use_rslora='false'", "true or false"]),
    "lora_bias null": (says(lora_bias=None), CONFIG, ["lora_bias=None", "true or false"]),
    "biases unknown": (says(bias="some"), CONFIG, ["bias='some'", "lora_only"]),
    "targets a number": (says(target_modules=7), CONFIG, ["target_modules=7", "list"]),
    "targets no pattern": (says(target_modules="(q|up"), CONFIG, ["pattern", "correct"]),
    "ranks by no pattern": (says(rank_pattern={"q(": 4}), CONFIG, ["pattern", "correct"]),
    "a pattern too large": (says(alpha_pattern={"q{99999999999}": 4}), CONFIG, ["pattern", "correct"]),
    "layers by name": (says(layers_to_transform=["0"]), CONFIG, ["layers_to_transform=['0']", "whole number"]),
    # keys
    "no keys": (lambda good: good.tensors.clear(), WEIGHTS, ["no LoRA factors", "save_pretrained"]),
    "A without B": (lacks(QB), WEIGHTS, [QB, "missing", "again"]),
    "B without A": (lacks(Q), WEIGHTS, [Q, "missing", "again"]),
    "a module without keys": (lacks(Q, QB), WEIGHTS, [Q, "missing", "target_modules"]),
    "a layer that the config leaves out": (
        says(layers_to_transform=[0], layers_pattern="layers"), WEIGHTS,
        ["layers.1.", "leaves out", "correct target_modules"],
    ),
    "a module that the config excludes": (
        says(exclude_modules=["layers.0.q"]), WEIGHTS, [Q, "leaves out", "correct target_modules"]
    ),
    "a module that the config does not target": (
        says(target_modules=["q", "down"]), WEIGHTS, [".up.lora_A", "leaves out", "correct target_modules"]
    ),
    "a bias of A": (holds(key("layers.0.q", "lora_A.bias"), ones(4)), WEIGHTS, ["layers.0.q.lora_A.bias", "not taken"]),
    "a key without sense": (holds("something", ones(4)), WEIGHTS, ["something", "not taken", "modules_to_save"]),
    "a whole module": (holds(key("head", "weight"), ones(11, 16)), WEIGHTS, ["head.weight", "modules_to_save"]),
    "a base weight": (
        holds(key("layers.0.q", "base_layer.weight"), ones(12, 16)), WEIGHTS, ["q.base_layer.weight", "not taken"]
    ),
    "DoRA's magnitude that was not asked for": (
        holds(key("layers.0.q", "lora_magnitude_vector"), ones(12)), WEIGHTS,
        ["layers.0.q.lora_magnitude_vector", "correct its bias, lora_bias or use_dora"],
    ),
    "no magnitude": (says(use_dora=True), WEIGHTS, ["lora_magnitude_vector", "missing", "correct its config"]),
    "DoRA with a bias of B": (
        says(use_dora=True, lora_bias=True), CONFIG, ["use_dora=True and lora_bias=True", "to false"]
    ),
    "use_dora a string": (says(use_dora="yes"), CONFIG, ["use_dora='yes'", "true or false"]),
    "LoRA of an embedding": (
        holds(key("embed", "lora_embedding_A"), ones(4, 11)), WEIGHTS, ["embed.lora_embedding_A", "linears only"]
    ),
    "trained tokens' key": (
        holds(key("embed", "token_adapter.trainable_tokens_delta"), ones(1, 16)), WEIGHTS,
        ["token_adapter", "without trainable_token_indices"],
    ),
    "LoRA of a convolution": (
        all_of(holds(key("conv"), ones(4, 16, 1)), holds(key("conv", "lora_B.weight"), ones(16, 4, 1))), WEIGHTS,
        [key("conv"), "not asked to hold", "if that is a linear"],
    ),
    "no such module": (holds(key("layers.7.q"), ones(4, 16)), WEIGHTS, [key("layers.7.q"), "does not have", "model"]),
    "a module that the bank does not hold": (
        holds(key("head"), ones(4, 16)), WEIGHTS, [key("head"), "not asked to hold", "ask it to"]
    ),
    # shapes and numbers
    "A too wide": (turned(UP, lambda a: ones(4, 13)), WEIGHTS, [UP, "[4, 13]", "[4, 12]", "this base model"]),
    "B too tall": (turned(QB, lambda b: ones(13, 4)), WEIGHTS, [QB, "[13, 4]", "[12, 4]", "this base model"]),
    "A transposed": (turned(Q, lambda a: a.T), WEIGHTS, [Q, "[16, 4]", "[4, 16]", "this base model"]),
    "Conv1D taken for a linear": (
        turned(key("layers.0.down"), lambda a: ones(4, 16)), WEIGHTS, ["down.lora_A", "[4, 16]", "[4, 20]", "config"]
    ),
    "B of another rank than A": (turned(QB, lambda b: ones(12, 5)), WEIGHTS, [QB, "[12, 5]", "[12, 4]", "config"]),
    "A of another rank than B": (turned(Q, lambda a: ones(3, 16)), WEIGHTS, [Q, "[3, 16]", "[4, 16]", "config"]),
    "rank of another config": (says(r=8), WEIGHTS, ["[4, 20]", "[8, 20]", "rank 8 in the config", "its own config"]),
    "rank of another pattern": (
        says(rank_pattern={"layers.1.up": 9}), WEIGHTS, [UP, "[4, 12]", "[9, 12]", "its own config"]
    ),
    "another base model's": (
        all_of(says(base_model_name_or_path="big"), turned(Q, lambda a: ones(4, 99))), WEIGHTS,
        [Q, "[4, 99]", "trained on 'big'", "serves 'toy'"],
    ),
    "A a vector": (turned(Q, lambda a: ones(64)), WEIGHTS, [Q, "[64]", "[4, 16]"]),
    "A of three axes": (turned(Q, lambda a: ones(4, 16, 1)), WEIGHTS, [Q, "[4, 16, 1]", "[4, 16]"]),
    "A empty": (turned(Q, lambda a: ones(0, 16)), WEIGHTS, [Q, "[0, 16]", "[4, 16]"]),
    "NaN in A": (turned(Q, put(63, float("nan"))), WEIGHTS, [Q, "NaN", "diverged"]),
    "inf in B": (turned(QB, put(0, float("-inf"))), WEIGHTS, [QB, "infinity", "diverged"]),
    "whole numbers": (turned(Q, lambda a: a.long()), WEIGHTS, [Q, "torch.int64", "bfloat16"]),
    "fp64": (turned(QB, lambda b: b.double()), WEIGHTS, [QB, "torch.float64", "float32"]),
    "fp8": (turned(Q, lambda a: a.to(torch.float8_e4m3fn)), WEIGHTS, [Q, "torch.float8_e4m3fn", "float16"]),
    # biases
    "a bias of B that was not asked for": (
        holds(key("layers.0.q", "lora_B.bias"), ones(12)), WEIGHTS,
        ["q.lora_B.bias", "correct its bias, lora_bias or use_dora"],
    ),
    "no bias of B": (says(lora_bias=True), WEIGHTS, ["lora_B.bias", "missing", "correct its config"]),
    "a base bias that was not asked for": (
        holds(UP_BIAS, ones(20)), WEIGHTS, [UP_BIAS, "correct its bias, lora_bias or use_dora"]
    ),
    "no base bias": (says(bias="lora_only"), WEIGHTS, ["base_layer.bias", "missing", "correct its config"]),
}

WITH_BIASES: dict[str, tuple[Damage, str, list[str]]] = {
    "a bias of B alone": (lacks(Q, QB), WEIGHTS, [Q, "missing", "again"]),
    "a base bias alone": (lacks(UP, UP.replace("_A", "_B"), UP.replace("A.weight", "B.bias")), WEIGHTS,
                          [UP, "missing", "again"]),
    "a bias of B too long": (
        holds(key("layers.0.q", "lora_B.bias"), ones(13)), WEIGHTS, ["q.lora_B.bias", "[13]", "[12]"]
    ),
    "a base bias too long": (holds(UP_BIAS, ones(21)), WEIGHTS, [UP_BIAS, "[21]", "[20]"]),
    "NaN in a base bias": (turned(UP_BIAS, put(0, float("nan"))), WEIGHTS, [UP_BIAS, "NaN", "diverged"]),
    "a base bias of whole numbers": (turned(UP_BIAS, lambda b: b.int()), WEIGHTS, [UP_BIAS, "int32", "float32"]),
    "a base bias where the base has none": (
        holds(key("layers.0.q", "base_layer.bias"), ones(12)), WEIGHTS,
        ["q.base_layer.bias", "the base layer has none", "this base model"],
    ),
    "a base bias in two spellings": (
        holds(key("layers.1.up", "bias"), ones(20)), WEIGHTS, [UP_BIAS, key("layers.1.up", "bias"), "keep one"]
    ),
    "a bias of a norm": (
        all_of(says(bias="all"), holds(key("norm", "bias"), ones(16))), WEIGHTS, [key("norm", "bias"), "lora_only"]
    ),
    "a trained bias without LoRA": (
        all_of(says(bias="all"), holds(key("gate", "bias"), ones(16))), WEIGHTS, [key("gate", "bias"), "lora_only"]
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return saved(adapted(), tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def good_with_biases(tmp_path_factory) -> Path:
    return saved(adapted(bias="lora_only", lora_bias=True), tmp_path_factory.mktemp("biases"))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused(kind, good, tmp_path):
    damage, name, parts = BROKEN[kind]
    refused(damaged(good, damage, tmp_path / "damaged"), name, parts)


@pytest.mark.parametrize("kind", WITH_BIASES)
def test_a_broken_folder_with_biases_is_refused(kind, good_with_biases, tmp_path):
    damage, name, parts = WITH_BIASES[kind]
    refused(damaged(good_with_biases, damage, tmp_path / "damaged"), name, parts)


def test_no_folder(good, tmp_path):
    for place, what in ((tmp_path / "nowhere", "not there"), (good / WEIGHTS, "a file")):
        with pytest.raises(BankError, match=what) as error:
            read(place, HELD)
        assert str(place) in str(error.value) and "save_pretrained" in str(error.value)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "two spellings of one key": (
        lambda state: state.update({Q.removeprefix(PREFIX): state[Q]}), [Q, "another spelling", "keep one"]
    ),
    "one key with and without a name": (
        lambda state: state.update({Q.replace("lora_A", "lora_A.default"): ones(4, 16)}),
        [Q, "lora_A.default", "another spelling", "keep one"],
    ),
    "two adapters": (
        lambda state: state.update(
            {one.replace("lora_A", "lora_A.b").replace("lora_B", "lora_B.b"): state.pop(one) for one in [Q, QB]}
        ),
        ["lora_A.b", "not of one adapter", "keep the keys of one"],
    ),
    "no tensor": (lambda state: state.update({Q: [[1.0]]}), [Q, "no dense tensor", "give one"]),
    "a tensor without values": (lambda state: state.update({Q: ones(4, 16, device="meta")}), [Q, "no dense tensor"]),
    "a sparse tensor": (lambda state: state.update({Q: ones(4, 16).to_sparse()}), [Q, "no dense tensor"]),
    "a key that is no string": (lambda state: state.update({5: ones(4, 16)}), ["state dict: 5 is", "not taken"]),
    "a key of two lines": (lambda state: state.update({"a\nb": ones(4)}), ["a\\nb", "not taken"]),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_broken_state_dict_is_refused(kind, good):
    state, config = dict(load_file(good / WEIGHTS)), json.loads((good / CONFIG).read_text())
    assert len(read(state, HELD, config=config).factors) == 6
    damage, parts = STATES[kind]
    damage(state)
    with pytest.raises(BankError) as error:
        read(state, HELD, config=config)
    for part in ("the state dict", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "needs config=: pass its LoraConfig"),
        (4, "needs config=: pass its LoraConfig"),
        ({}, "config= has no r: add it"),
        ({"r": 4}, "config= has no lora_alpha: add it"),
        ({"r": 4, "lora_alpha": 6, "task_type": object()}, "config= is not plain data .*object.*: give"),
        (peft.IA3Config(), "config= says peft_type='IA3': it must be LORA"),
        (peft.LoraConfig(r=4, use_bdlora=peft.tuners.lora.config.BdLoraConfig(nblocks=2)), "config= says use_bdlora="),
    ],
)
def test_a_broken_config_of_a_state_dict_is_refused(config, message, good):
    with pytest.raises(BankError, match=message):
        read(load_file(good / WEIGHTS), HELD, config=config)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: adapted(modules_to_save=["head"]), r"says modules_to_save=\['head'\]: .*train without it"),
        (lambda: adapted(target_modules=["q", "embed"]), "adapter 'default' .*embed.lora_embedding_A is not taken"),
        (lambda: adapted(target_modules=["conv"]), "conv.lora_A.weight is of a module that the bank was not asked"),
        (lambda: peft.get_peft_model(base(), peft.VeraConfig(r=4, target_modules=["gate"])), "peft_type='VERA': "),
        (base, "a Model is no adapter: give a folder, a state dict or a peft.PeftModel"),
        (lambda: 7, "a int is no adapter: give"),
    ],
)
def test_a_model_that_no_bank_can_take_is_refused(made, message):
    with pytest.raises(BankError, match=message):
        read(made(), HELD, known=KNOWN)


def test_only_another_base_model_is_named(good):
    state = {**load_file(good / WEIGHTS), Q: ones(4, 99)}
    for name, ours, told in (("big", "toy", True), ("toy", "toy", False), ("", "toy", False), ("big", None, False)):
        config = {"r": 4, "lora_alpha": 6, "base_model_name_or_path": name}
        with pytest.raises(BankError, match=r"\[4, 99\]") as error:
            read(state, HELD, config=config, base=ours)
        assert ("trained on" in str(error.value)) == told


def test_a_config_beside_a_folder_is_refused(good):
    with pytest.raises(BankError, match=r"config= is for a state dict: .* leave config= out"):
        read(good, HELD, config={"r": 4, "lora_alpha": 6})


def test_a_module_of_another_kind_is_refused(good):
    with pytest.raises(BankError, match=r"layers\.0\.q\.lora_A\.weight is of a module .* if that is a linear"):
        read(good, {**HELD, "layers.0.q": nn.Embedding(16, 12)})


def test_every_setting_of_peft_is_followed_or_refused_or_without_effect(good, tmp_path):
    """PEFT's settings that are here today. A new one is refused where it is not its default, until this list has it."""
    from gawscompile.banks.checkpoints import HONOURED, INERT

    settings = set(peft.LoraConfig().to_dict()) - {"peft_type"}
    assert settings - HONOURED.keys() - set(INERT) == {
        *("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
        *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
        *("megatron_config", "layer_replication", "ensure_weight_tying"),
    }
