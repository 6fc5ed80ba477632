"""Saving and loading: our own files bit for bit, published ones by their names, and what is refused before loading."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gawscompile.adapters import SplitError
from tests.adapters.common import KINDS, NAMES, Net, adapted, base, config, randomise, run
from tests.architectures import ARCHITECTURES

BOTH = pytest.mark.parametrize("kind", KINDS)
G_LEAF = {"gaws": "GAWS.weight", "gawsd": "GAWSD"}


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_gives_the_same_bits(kind, name, tmp_path):
    model = adapted(kind, name, diag=True)
    wanted = run(model, name)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == kind.upper() and saved["diag"] is True
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in keys)
    assert all(key.endswith((f".{G_LEAF[kind]}", ".diag")) for key in keys)
    loaded = peft.PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.equal(run(loaded, name), wanted)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # under another name beside another adapter, and trainable
    second = adapted(kind, name, seed=5)
    second.load_adapter(tmp_path, "again", is_trainable=True)
    second.set_adapter("again")
    assert torch.equal(run(second, name), wanted)
    meta = peft.PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(run(meta, name), wanted)


@BOTH
def test_a_half_precision_base_keeps_adapters_in_fp32_and_frozen(kind, tmp_path):
    model = randomise(peft.get_peft_model(base().bfloat16(), config(kind, diag=True)).eval())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base().bfloat16(), tmp_path)
    layer = loaded.base_model.model.model.layers[0].mlp.up_proj
    assert layer.g("default").dtype == layer.diag["default"].dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(run(loaded), run(model))


PUBLISHED = {
    "gaws": {"input_splits": 3, "output_splits": 3, "input_split_dim": 8, "output_split_dim": 4},
    "gawsd": {"input_splits": 6, "output_splits": 3, "input_split_dim": 4, "output_split_dim": 4},
}


def publish(kind, folder, weights=None, **changes):
    """A checkpoint as others publish it, written by hand; (G, diag)."""
    settings = {
        "auto_mapping": None,
        "base_model_name_or_path": "someone/some-model",
        "bias": "none",
        "diag": True,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": "zero",
        "input_splits_pattern": {},
        "output_splits_pattern": {},
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": kind.upper(),
        "revision": None,
        "target_modules": ["proj"],
        "task_type": None,
        **PUBLISHED[kind],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    g = torch.randn((4, 8) if kind == "gaws" else (3, 6))
    diag = torch.randn(g.shape[1])
    named = {f"base_model.model.proj.{G_LEAF[kind]}": g, "base_model.model.proj.diag": diag}
    save_file(named if weights is None else weights(named), folder / "adapter_model.safetensors")
    return g, diag


@BOTH
def test_a_published_checkpoint_loads_by_its_names(kind, tmp_path):
    g, diag = publish(kind, tmp_path)
    torch.manual_seed(0)
    linear = nn.Linear(24, 12)
    scaled = g @ torch.diag(diag)
    delta = torch.kron(torch.eye(3), scaled) if kind == "gaws" else torch.kron(scaled, torch.eye(4))
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    model = peft.PeftModel.from_pretrained(Net(linear), tmp_path)
    x = torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(x), F.linear(x, weight + delta, bias))


def rename(old, new):
    return lambda named: {key.replace(old, new): value for key, value in named.items()}


def reshaped(named):
    return {key: torch.cat([value, value]) if value.ndim == 2 else value for key, value in named.items()}


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": reshaped}, r"shape \((8, 8|6, 6)\), the configuration makes it \((4, 8|3, 6)\)"),
        ({"weights": rename("proj.diag", "proj.diagonal")}, r"fit nowhere: .*proj\.diagonal; missing: .*proj\.diag"),
        ({"weights": rename("proj.GAWS", "proj.base.GAWS")}, r"fit nowhere: .*proj\.base\.GAWS.*missing"),
        ({"weights": rename("base_model.model.", "")}, r"fit nowhere: proj\."),  # as PEFT does for LoRA
        ({"diag": False}, r"fit nowhere: .*proj\.diag"),
        ({"alpha": 32}, r"does not know: alpha=32"),
        ({"init_weights": "ones"}, r"init_weights='ones'"),
        ({"input_splits": 5}, r"proj \(24 inputs, 12 outputs\): input_splits=5 does not divide"),
        ({"input_split_dim": 6}, r"disagree"),
        ({"target_modules": ["nothing"]}, r"not found"),
    ],
)
def test_a_wrong_checkpoint_is_refused_and_changes_no_output(kind, changes, message, tmp_path):
    publish(kind, tmp_path, **changes)
    torch.manual_seed(0)
    net, x = Net(nn.Linear(24, 12)), torch.randn(5, 24)
    with torch.no_grad():
        before = net(x)
        with pytest.raises(ValueError, match=message):
            peft.PeftModel.from_pretrained(net, tmp_path)
        assert torch.equal(net(x), before)
        # and beside an adapter that is in use
        publish(kind, tmp_path / "good")
        model = peft.PeftModel.from_pretrained(Net(nn.Linear(24, 12)), tmp_path / "good")
        before = model(x)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path, "bad")
        assert torch.equal(model(x), before)


@BOTH
@pytest.mark.parametrize("trainable", [False, True])
def test_a_refused_load_leaves_no_memory_unwritten(kind, trainable, tmp_path):
    publish(kind, tmp_path, weights=rename("proj.diag", "proj.diagonal"))
    torch.manual_seed(0)
    net, x = Net(nn.Linear(24, 12)), torch.randn(5, 24)
    with torch.no_grad():
        before = net(x)
        with pytest.raises(ValueError, match=r"fit nowhere.*delete_adapter\('default'\)"):
            peft.PeftModel.from_pretrained(net, tmp_path, low_cpu_mem_usage=True, is_trainable=trainable)
        assert not any(parameter.is_meta for parameter in net.parameters())
        assert torch.equal(net(x), before)
        publish(kind, tmp_path / "good")
        model = peft.PeftModel.from_pretrained(Net(nn.Linear(24, 12)), tmp_path / "good")
        with pytest.raises(ValueError, match=r"delete_adapter\('bad'\)"):
            model.load_adapter(tmp_path, "bad", low_cpu_mem_usage=True)
        model.delete_adapter("bad")
        model.load_adapter(tmp_path / "good", "bad")


@BOTH
def test_a_saved_module_of_another_shape_is_refused_too(kind, tmp_path):
    def wider():
        torch.manual_seed(0)
        net = Net(nn.Linear(16, 16))
        net.head = nn.Linear(16, 4)
        return net

    peft.get_peft_model(wider(), config(kind, target_modules=["proj"], modules_to_save=["head"])).save_pretrained(
        tmp_path
    )
    file = tmp_path / "adapter_model.safetensors"
    named = load_file(file)
    (key,) = [key for key in named if key.endswith("head.weight")]
    save_file({**named, key: torch.randn(5, 16)}, file)
    net, x = wider(), torch.randn(3, 16)
    with torch.no_grad():
        before = net(x)
        with pytest.raises(ValueError, match=r"head.* has shape \(5, 16\), the configuration makes it \(4, 16\)"):
            peft.PeftModel.from_pretrained(net, tmp_path)
        assert torch.equal(net(x), before)


@BOTH
def test_an_empty_unknown_key_means_nothing(kind, tmp_path):
    publish(kind, tmp_path, something_else=None, another=False)
    peft.PeftModel.from_pretrained(Net(nn.Linear(24, 12)), tmp_path)


@BOTH
def test_injection_without_a_peft_model_takes_keys_with_and_without_pefts_prefix(kind, tmp_path):
    """As transformers' own ``load_adapter`` does it."""
    model = adapted(kind)
    wanted, weights = run(model), peft.get_peft_model_state_dict(model)
    for removed in ("", "base_model.model."):
        injected = peft.inject_adapter_in_model(config(kind, inference_mode=True), base())
        given = {key.removeprefix(removed): value for key, value in weights.items()}
        peft.set_peft_model_state_dict(injected, given)
        assert torch.equal(run(injected), wanted)


@BOTH
@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "names no splits"),
        (
            {"input_splits": 5},
            r"layers\.0\.self_attn\.q_proj \(64 inputs, 64 outputs\).*5 does not divide its 64 inputs",
        ),
        ({"input_split_dim": 5}, "5 does not divide"),
        ({"output_splits": 4, "output_split_dim": 8}, "disagree"),
        ({"input_splits": 4, "output_splits": 2}, "as many input slices|not all of one length"),
        ({"input_splits_pattern": {"down_proj": 64}, "input_split_dim": 4}, "64 does not divide its 96 inputs"),
    ],
)
def test_wrong_splits_are_refused_before_anything_changes(kind, splits, message):
    model = base()
    before = list(model.named_modules())
    with pytest.raises(SplitError, match=message) as error:
        peft.get_peft_model(model, config(kind, **{"input_splits": None, "input_split_dim": None, **splits}))
    assert "Valid are" in str(error.value)
    assert list(model.named_modules()) == before and not hasattr(model, "peft_config")


@BOTH
@pytest.mark.parametrize("value", [0, -2, 2.0, True])
def test_counts_are_whole_numbers(kind, value):
    with pytest.raises(ValueError, match=r"input_splits=.*whole number"):
        config(kind, input_splits=value)


@BOTH
def test_no_adapter_is_called_as_none_is(kind):
    model = base()
    with pytest.raises(ValueError, match="'__base__', which stands for no adapter"):
        peft.get_peft_model(model, config(kind), adapter_name="__base__")


@BOTH
def test_only_patterns_that_match_nothing_are_warned_of(kind, recwarn):
    patterns = {"q_proj": 4, "self_attn.q_proj": 8, "absent": 2}
    peft.get_peft_model(base(), config(kind, input_splits_pattern=patterns))
    (told,) = [str(w.message) for w in recwarn if "split patterns" in str(w.message)]
    assert told.endswith(": absent")


class Params4bit(nn.Parameter):
    """As bitsandbytes names its own."""


def quantised():
    layer = nn.Linear(24, 24)
    layer.weight = nn.Parameter(torch.zeros(24, 24, dtype=torch.int8), requires_grad=False)
    return layer


def eight_bit_float():
    layer = nn.Linear(24, 24)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def four_bit():
    layer = nn.Linear(24, 24)
    layer.weight = Params4bit(layer.weight.data)
    return layer


@BOTH
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(24, 24), r"proj is a Embedding: .*torch\.nn\.Linear and transformers' Conv1D"),
        (lambda: nn.Conv2d(4, 4, 1), "Conv2d"),
        (quantised, "quantised .*torch.int8"),
        (four_bit, "quantised .*Params4bit"),
        (eight_bit_float, "quantised .*float8_e4m3fn"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)), "computes its weight"),
        (lambda: nn.MultiheadAttention(24, 2).out_proj, "out_proj of nn.MultiheadAttention"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(kind, make, message):
    net = Net(make())
    net.first = nn.Linear(24, 24)
    with pytest.raises(TypeError, match=message):
        peft.get_peft_model(net, config(kind, target_modules=["first", "proj"]))
    assert type(net.first) is nn.Linear


def test_default_targets_are_loras():
    for name in ("Llama", "GPT-2"):
        gaws = peft.get_peft_model(base(name), config("gaws", target_modules=None)).targeted_module_names
        model = ARCHITECTURES[name].make()
        assert gaws == peft.get_peft_model(model, peft.LoraConfig()).targeted_module_names
