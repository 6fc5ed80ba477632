"""DoRA adapters in a bank, beside PEFT: alone, in rows of others, in mixes; read, saved, taken over and refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import gawscompile
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import WEIGHTS, BankError, read
from gawscompile.banks.dora import norms
from gawscompile.banks.layer import BankedLinear
from gawscompile.ir.records import GraphRecord
from gawscompile.verify import proof
from tests.banks import common
from tests.banks.checkpoints import base, linears
from tests.banks.common import KINDS, close, with_bank
from tests.graphs import capture, rewriting

DORA: dict[str, dict[str, Any]] = {
    "m": {"r": 6, "lora_alpha": 9, "target_modules": "all-linear", "use_dora": True},
    "n": {"r": 19, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True},
}
llama = functools.partial(common.llama, layers=1)  # most tests need no second
in_kernels = functools.partial(common.in_kernels, layers=1)
CHOICES = ["m", "a", "n", None, {"m": 0.5, "a": 2.0}, {"m": 1.0, "n": -0.5}, {"a": 1.0, "n": 0.25, "m": 2.0}]
ROWS = [["m", None, "a", "n"], [None, {"m": 0.5, "a": 2.0}, "m", "m"], ["n", "a"], ["a"] * 4]


def randomised(model: Any) -> Any:
    """B is no zeros, and magnitudes are none of the weight's norms."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "lora_magnitude_vector" in name:
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def adapted(names: str = "amn", dtype: torch.dtype = torch.float32, layers: int = 1) -> peft.PeftModel:
    first, *rest = names
    kinds, cast = {**KINDS, **DORA}, {"autocast_adapter_dtype": dtype == torch.float32}
    base_model = llama(dtype=dtype, layers=layers)
    model = peft.get_peft_model(base_model, peft.LoraConfig(**kinds[first]), adapter_name=first, **cast)
    for name in rest:
        model.add_adapter(name, peft.LoraConfig(**kinds[name]), **cast)
    model.set_adapter(first)
    return randomised(model)


@contextmanager
def mixed(model: peft.PeftModel, parts: Mapping[str, float]):
    """Each layer adds what PEFT makes of each adapter alone, with these weights."""
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        y = total = layer.base_layer(x)
        for name, weight in parts.items():
            layer._active_adapter = [name]
            total = total + weight * (type(layer).forward(layer, x) - y)
        return total

    for layer in layers:
        layer.forward = lambda x, layer=layer: forward(layer, x)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def logits(model: peft.PeftModel, ids: torch.Tensor, choice: Any) -> torch.Tensor:
    parts = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
    with mixed(model, parts):
        return model(ids).logits


by_row = functools.partial(common.by_row, answer=logits)


@pytest.fixture(scope="module")
def dora() -> peft.PeftModel:
    with torch.no_grad():
        return adapted()


def test_the_judge_is_peft_s_forward(dora, ids):
    for name in "am":
        dora.base_model.set_adapter(name)
        assert torch.allclose(logits(dora, ids, name), dora(ids).logits, atol=1e-5)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_as_peft(dora, ids, how):
    model, bank = with_bank(dora)
    records: list[GraphRecord] = []
    run = model if how == "eager" else torch.compile(model, backend=rewriting(records))
    bank.activate("a")
    close(run(ids).logits, logits(dora, ids, "a"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        common.agree(run, bank, dora, ids, CHOICES, ROWS, logits)
        bank.activate("m")
        bank.scale("m", 0.5)
        close(run(ids).logits, logits(dora, ids, {"m": 0.5}))
    assert how == "eager" or in_kernels(records)


@pytest.mark.slow  # tests/codegen/test_cpp.py has row scales in banks, by every plan
@pytest.mark.parametrize("tokens", [1, 100])
def test_few_tokens_and_many(dora, tokens):
    """The plan of few tokens, and that of many, which adds to what the library has made."""
    model, bank = with_bank(dora)
    quick, ids = gawscompile.compile(model), torch.randint(0, 128, (4, tokens))
    for rows in (["m", "a", None, {"n": 0.5, "a": 1.0}], ["a", "m", "m", "n"]):
        bank.activate(rows)
        close(quick(ids).logits, by_row(dora, ids, rows))


def test_all_is_fused_and_proven(ids):
    model, bank = with_bank(adapted(layers=2))
    bank.activate(["m", "a", None, "n"])
    context = capture(model, ids, kernels=True).until()
    layers = [linear for linear in context.record.linears if linear.adapters]
    assert len(layers) == 14 and all(linear.status == "fused" and "Banked" in linear.operators for linear in layers)
    context.complain = pytest.fail
    proof.verify_rewrites(context)
    assert context.record.passes["verify"] >= 9


@pytest.mark.slow  # test_bank has LoRA in 16 bits
def test_16_bits(ids, tmp_path):
    judge = adapted("am", torch.bfloat16)
    model, bank = with_bank(judge)
    records: list[GraphRecord] = []
    quick = torch.compile(model, backend=rewriting(records))
    exact = copy.deepcopy(judge).double()
    for rows in (["m", None], ["a", {"a": 0.5, "m": 1.0}]):
        bank.activate(rows)
        got, theirs, want = quick(ids).logits, by_row(judge, ids, rows), by_row(exact, ids, rows)
        assert (got - want).abs().mean() <= 1.25 * (theirs - want).abs().mean()
    assert in_kernels(records, "bank(bf16)")
    bank.save("m", tmp_path)
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        want = peft.get_peft_model_state_dict(judge, adapter_name="m")[key]
        rounded = 2**-7 if "lora_B" in key else 0  # twice: where it was multiplied and where it was divided
        torch.testing.assert_close(tensor, want.to(tensor.dtype), rtol=rounded, atol=0)


def gpt2(**settings: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    inner = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for name, parameter in inner.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # it begins as zeros
    target = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    model = peft.get_peft_model(inner, peft.LoraConfig(r=5, use_dora=True, **target, **settings))
    return randomised(model)


@pytest.mark.slow  # test_cpp's banks have biases beside DoRA's scale; which linears have one, test_checkpoints
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_biases_are_not_scaled(bias, tmp_path):
    """GPT-2's linears have one, and weights kept as [in, out]."""
    judge, ids = gpt2(bias=bias), torch.randint(0, 50, (2, 7))
    for name, parameter in judge.named_parameters():
        if bias != "none" and name.endswith("base_layer.bias"):
            parameter.add_(torch.randn_like(parameter) / 2)
    judge.save_pretrained(tmp_path / "one")
    plain = gpt2().unload()
    want, without = judge(ids).logits, plain(ids).logits
    bank = AdapterBank(plain, memory="1MB")
    bank.load("x", tmp_path / "one")
    records: list[GraphRecord] = []
    quick = torch.compile(plain, backend=rewriting(records))
    for rows in (["x", None], [None, "x"]):
        bank.activate(rows)
        for run in (plain, quick):
            got = run(ids).logits
            for row, name in enumerate(rows):
                close(got[row], (want if name else without)[row])
    assert sum(group.spec.count("bank(f32)") for group in records[0].groups) == 4
    bank.save("x", tmp_path / "two")
    again = peft.PeftModel.from_pretrained(gpt2().unload(), tmp_path / "two").eval()
    close(again(ids).logits, want)


def test_saved_as_peft_reads_it(dora, ids, tmp_path):
    dora.save_pretrained(tmp_path / "theirs", selected_adapters=["m", "n"])
    _, taken = with_bank(dora)
    loaded = AdapterBank(llama(), memory="8MB")
    for name in "mn":
        loaded.load(name, tmp_path / "theirs" / name)
    for bank, folder in ((taken, tmp_path / "taken"), (loaded, tmp_path / "loaded")):
        for name in "mn":
            bank.save(name, folder / name)
            again = peft.PeftModel.from_pretrained(llama(), folder / name).eval()
            close(again(ids).logits, logits(dora, ids, name))
            whole, mine = peft.get_peft_model_state_dict(again), peft.get_peft_model_state_dict(dora, adapter_name=name)
            assert whole.keys() == mine.keys()
            for key, tensor in whole.items():
                torch.testing.assert_close(tensor, mine[key])


def test_what_is_saved_is_what_was_read(dora, tmp_path):
    """Whatever becomes of the file, or of the model, that magnitudes came from."""
    theirs, saved = tmp_path / "theirs" / "m", tmp_path / "saved"
    dora.save_pretrained(tmp_path / "theirs", selected_adapters=["m"])
    before = {key: tensor.clone() for key, tensor in load_file(theirs / WEIGHTS).items()}
    copied = copy.deepcopy(dora)
    taken = AdapterBank(llama(), memory="8MB")
    taken.load("file", theirs)
    taken.load("model", copied, adapter_name="m")
    with (theirs / WEIGHTS).open("r+b") as file:
        file.truncate(0)
    for name, parameter in copied.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data += 5
    for name in ("file", "model"):
        taken.save(name, saved)
        for key, tensor in load_file(saved / WEIGHTS).items():
            torch.testing.assert_close(tensor, before[key])


def test_rows_that_vanish_are_saved_too(ids, tmp_path):
    """A magnitude of zero leaves nothing of a row, and of B nothing that could be read."""
    judge = adapted("m")
    for name, parameter in judge.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter[::3] = 0
    model, bank = with_bank(judge)
    close(model(ids).logits, logits(judge, ids, "m"))
    bank.save("m", tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(again(ids).logits, logits(judge, ids, "m"))


def test_those_that_leave_the_pool_come_back(dora, ids, tmp_path):
    sizes = {info.name: info.bytes for info in with_bank(dora)[1]}
    # whole blocks for two of them, and no room for the third
    model, bank = with_bank(dora, memory=sizes["m"] + sizes["n"] + sizes["a"] * 3 // 4)
    for name in "mnamn":
        bank.activate(name)
        close(model(ids).logits, logits(dora, ids, name))
    bank.activate("a")
    bank.save("m", tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(again(ids).logits, logits(dora, ids, "m"))


def test_scales_as_they_are_now(dora, ids, tmp_path):
    """A scale is within the norm that the rows are divided by."""
    judge = copy.deepcopy(dora)
    for layer in judge.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("m", 3.0)
    model, bank = with_bank(judge)
    bank.activate("m")
    close(model(ids).logits, logits(judge, ids, "m"))
    bank.save("m", tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    close(again(ids).logits, logits(judge, ids, "m"))


def test_gradients(dora):
    """Of what a layer makes, by its input and by the base's weight and bias. The norm is a constant in them."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["0"], use_dora=True)
    judge = randomised(peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config))
    layer = judge.base_model.model[0]
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    c = layer.lora_magnitude_vector["default"].weight / norms(layer.base_layer, a, b, scale)
    model = AdapterBank(copy.deepcopy(judge), memory="1MB").model
    banked = next(module for module in model.modules() if isinstance(module, BankedLinear))
    x, step = torch.randn(4, 8, requires_grad=True), torch.randn(4, 6)
    weight, bias = banked.weight.requires_grad_(), banked.bias.requires_grad_()
    with torch.enable_grad():
        want = (c * (x @ (weight + scale * b @ a).T) + bias) * step
        got = banked(x) * step
        wanted = torch.autograd.grad(want.sum(), (x, weight, bias))
        found = torch.autograd.grad(got.sum(), (x, weight, bias))
    close(got, want)
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_norms_by_blocks(monkeypatch):
    torch.manual_seed(0)
    layer, a, b = nn.Linear(24, 50).bfloat16(), torch.randn(3, 24), torch.randn(50, 3).half()
    want = (layer.weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    for numbers in (1, 24 * 7, 1 << 20):
        monkeypatch.setattr("gawscompile.banks.dora.NUMBERS", numbers)
        torch.testing.assert_close(norms(layer, a, b, 0.5).double(), want, rtol=1e-6, atol=0)


def test_a_row_of_zeros_is_refused():
    """Nothing can be divided by its length, and PEFT's answer is NaN."""
    plain, at = base(), "layers.0.q"
    modules = linears(plain)
    state = {f"{at}.lora_A.weight": torch.zeros(1, 16), f"{at}.lora_B.weight": torch.ones(12, 1)}
    state[f"{at}.lora_magnitude_vector"] = torch.ones(12)
    settings = {"r": 1, "lora_alpha": 1, "use_dora": True}
    assert read(state, modules, config=settings).factors[at].scaled is not None
    modules[at].weight[3] = 0
    with pytest.raises(BankError, match=rf"state dict: {at}.lora_magnitude_vector scales a row of zeros.*without DoRA"):
        read(state, modules, config=settings)
