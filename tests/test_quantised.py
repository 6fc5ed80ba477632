"""Quantised bases of torchao and bitsandbytes: read as they are packed, in one kernel with their adapters."""

from __future__ import annotations

import math
import zlib

import peft
import pytest
import torch
from torch import nn

from gawscompile import explain
from gawscompile.calibration.measure import graphs_compiled
from tests.graphs import randomise, small_llama, tokens

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
LAYERS = 2


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def bitsandbytes(model, make):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new = make(module.in_features, module.out_features)
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))


def bitsandbytes_int8(model):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model.is_loaded_in_8bit = True
    bitsandbytes(model, lambda k, n: bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False))


def bitsandbytes_nf4(model):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model.is_loaded_in_4bit = True
    bitsandbytes(
        model, lambda k, n: bnb.nn.Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    )


KINDS = {"torchao int8": torchao_int8, "bitsandbytes int8": bitsandbytes_int8, "bitsandbytes nf4": bitsandbytes_nf4}
TOLERANCE = {"bitsandbytes nf4": 1e-2, "bitsandbytes int8": 2e-2}
"""Their operators round an fp32 activation, to bf16 and to int8; ours do not. Others: 1e-4."""


def quantised(kind, dtype=torch.float32):
    """A small Llama with a LoRA on every quantised linear, B random."""
    base = small_llama(dtype, LAYERS, lora=None, intermediate_size=128)
    KINDS[kind](base)
    model = randomise(peft.get_peft_model(base, LORA).eval())
    logits(model)  # bitsandbytes lays its weights out anew for the CPU in the first call
    return model


@torch.no_grad()
def logits(model, count=3):
    return model(tokens(1, count), use_cache=False).logits


def swapped(model, by):
    """New numbers in the adapters' factors, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(by)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_fused_and_live(kind):
    model = quantised(kind)
    report = explain(model, tokens(1, 1), use_cache=False)
    adapted = [entry for entry in report.linears if "lm_head" not in entry.path]
    assert len(adapted) == 7 * LAYERS and {entry.status for entry in adapted} == {"fused"}
    assert all(entry.operators.startswith("Packed[") and "LowRank(r=4)" in entry.operators for entry in adapted)
    groups = {entry.group for entry in adapted}
    assert len(groups) == 4 * LAYERS  # q/k/v, o, gate/up, down
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gaws", options={"strict": True})

    def check():
        close = TOLERANCE.get(kind, 1e-4)
        got = logits(compiled)
        torch.testing.assert_close(got, logits(model), rtol=close, atol=close)
        return got

    before, graphs = check(), graphs_compiled()
    swapped(model, -1.7)
    assert (check() - before).abs().max() > 1e-2
    assert graphs_compiled() == graphs
    with model.disable_adapter():
        check()
    model.add_adapter("other", LORA)
    randomise(model, seed=1).set_adapter("other")
    check()


@pytest.mark.slow
def test_in_bf16_no_further_from_fp64_than_eager():
    """The reference computes with the numbers that are stored: dequantised bases and factors, in fp64."""
    model = quantised("torchao int8", torch.bfloat16)
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    wide = quantised("torchao int8", torch.bfloat16)
    for module in wide.modules():
        if type(module) is nn.Linear and type(module.weight).__name__ == "Int8Tensor":
            exact = module.weight.qdata.double() * module.weight.scale.double()
            module.weight = nn.Parameter(exact, requires_grad=False)
    wide = wide.double()
    logs = []
    for seed in range(8):
        with torch.no_grad():
            for (name, p), (_, q) in zip(model.named_parameters(), wide.named_parameters(), strict=True):
                if "lora_" in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                    p.copy_(torch.randn(p.shape, generator=generator) / 5)
                    q.copy_(p)
        reference = logits(wide)
        ours, eager = ((logits(run).double() - reference).norm() for run in (compiled, model))
        logs.append(math.log(ours / eager))
    assert sum(logs) / len(logs) < math.log(1.05)


@pytest.mark.slow
def test_of_any_length():
    model = quantised("torchao int8")
    compiled = torch.compile(model, backend="gaws", dynamic=True, options={"strict": True})
    for count in (5, 40):
        torch.testing.assert_close(logits(compiled, count), logits(model, count), rtol=1e-4, atol=1e-4)


def test_without_adapters_a_quantised_base_is_fused_too():
    base = small_llama(layers=1, lora=None)
    torchao_int8(base)
    report = explain(base, tokens(1, 1), use_cache=False)
    assert {entry.operators for entry in report.linears if "q_proj" in entry.path} == {"Packed[int8 64x64]"}
    assert {entry.reason for entry in report.linears if "lm_head" not in entry.path} == {None}
