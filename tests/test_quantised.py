"""Quantised bases of torchao, bitsandbytes, HQQ, gptqmodel: read as they are packed, in one kernel with adapters."""

from __future__ import annotations

import math
import zlib
from collections import Counter

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

from benchmarks import quantized
from benchmarks.common import linear_sizes
from gawscompile import ahead, cli, explain
from gawscompile.adapters import GAWSConfig
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.observe.store import RECORDS
from tests.architectures import ARCHITECTURES
from tests.graphs import capture, randomise, small_llama, tokens

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""PEFT's "all-linear" takes no linear of HQQ's."""

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=NAMES)
GAWS = GAWSConfig(input_splits=4, output_splits=4, target_modules=["q_proj", "v_proj"])
LAYERS = 2
PACKED = {"int8": "int8", "int4": "int4_tiles", "bnb-int8": "int8", "nf4": "4", "hqq8": "uint8", "hqq4": "uint4_halves"}
PACKED |= {"gptq": "int4_tiles", "awq": "int4_tiles"}
"""The codings that kernels read; nf4's layout depends on the CPU."""

CLOSE = {"nf4": 1e-2, "bnb-int8": 2e-2, "gptq": 1e-2, "awq": 1e-2}
"""bitsandbytes' operators round an fp32 activation, to bf16 and to int8, gptqmodel's to bf16; ours do not. Others:
1e-4."""


def quantised(kind, dtype=torch.float32, config=LORA, exact=False, layers=LAYERS):
    """A small Llama with an adapter on every quantised linear, B random. `exact`: its linears plain, with the numbers
    that the format holds, all in fp64."""
    tiles = {"num_key_value_heads": 4} if PACKED[kind] == "int4_tiles" else {}  # of 64 rows with AVX-512
    base = small_llama(dtype, layers, lora=None, intermediate_size=128, **tiles)
    try:
        quantized.quantize(base, kind, set(linear_sizes(base)))
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    if exact:
        quantized.dequantize(base)
    model = randomise(peft.get_peft_model(base, config).eval())
    if exact:
        return model.double()
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
@pytest.mark.parametrize("kind", PACKED)
def test_adapters_are_fused_and_live(kind):
    model = quantised(kind)
    report = explain(model, tokens(1, 1), use_cache=False)
    adapted = [entry for entry in report.linears if "lm_head" not in entry.path]
    assert len(adapted) == 7 * LAYERS and {entry.status for entry in adapted} == {"fused"}
    assert all(entry.operators.startswith("Packed[") and PACKED[kind] in entry.operators for entry in adapted)
    assert all("LowRank(r=4)" in entry.operators for entry in adapted)
    groups = {entry.group for entry in adapted}
    assert len(groups) == 4 * LAYERS  # q/k/v, o, gate/up, down
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})

    def check():
        close = CLOSE.get(kind, 1e-4)
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


ADAPTERS = {"lora": (LORA, "LowRank", 7), "two": (LORA, "LowRank", 7), "gaws": (GAWS, "Kronecker", 2)}
"""Configuration, the operator, and linears of a layer that have it. No format here runs with PEFT's DoRA, compiled."""

CASES = [(kind, adapters) for kind in PACKED for adapters in ADAPTERS]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("kind", "adapters"), CASES)
def test_no_further_from_fp64_than_eager(kind, adapters, dtype):
    """The reference computes with the numbers that are stored: dequantised bases and factors, in fp64."""
    config, operator, adapted = ADAPTERS[adapters]
    model = quantised(kind, dtype, config)
    wide = quantised(kind, dtype, config, exact=True)
    if adapters == "two":
        for one in (model, wide):
            one.add_adapter("other", LORA)
            one.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    logs = []
    for seed in range(16):
        with torch.no_grad():
            exact = dict(wide.named_parameters())
            for name, p in model.named_parameters():
                if "lora_" in name or "GAWS" in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                    p.copy_(torch.randn(p.shape, generator=generator) / 5)
                    exact[name].copy_(p)
        reference = logits(wide)
        ours, eager = ((logits(run).double() - reference).norm() for run in (compiled, model))
        logs.append(math.log(ours / eager))
    assert sum(logs) / len(logs) < math.log(1.25 if dtype is torch.float32 else 1.1), logs
    (record,) = RECORDS.since(len(RECORDS) - 1)
    fused = [entry.operators for entry in record.linears if entry.status == "fused" and "Packed[" in entry.operators]
    assert len(fused) == 7 * LAYERS and sum(operator in operators for operators in fused) == adapted * LAYERS


def test_gaws_comes_off_linears_that_have_no_weight_of_that_name(tmp_path):
    """HQQ's, as gptqmodel's. What cannot be is told by name."""
    model = quantised("hqq8", config=GAWS)
    with pytest.raises(TypeError, match=r"a quantised weight \(HQQLinear\) takes no adapter into itself"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[f"{name}.other"] = tensors.pop(name)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing was loaded, the weights do not fit"):
        model.load_adapter(tmp_path, "other")
    linear = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    assert model.unload().model.layers[0].self_attn.q_proj is linear


def test_its_wrapper_runs_in_cpp_from_a_warm_cache_too():
    """AOTAutograd then hands over quantised weights whole, where Inductor's wrapper takes codes and scales."""
    model = quantised("int8", layers=1)
    hits = counters["aot_autograd"]["autograd_cache_hit"]
    wrappers = []
    for _ in range(2):
        torch._dynamo.reset()
        mark = len(RECORDS)
        torch.testing.assert_close(logits(torch.compile(model, backend="gaws")), logits(model), rtol=1e-4, atol=1e-4)
        wrappers += [record.wrapper for record in RECORDS.since(mark)]
    assert counters["aot_autograd"]["autograd_cache_hit"] == hits + 1
    assert wrappers[0] == wrappers[1] and wrappers[0].startswith("Inductor's wrapper runs in C++, as ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_of_any_length(kind):
    model = quantised(kind)
    compiled = torch.compile(model, backend="gaws", dynamic=True, options={"strict": True})
    close = CLOSE.get(kind, 1e-4)
    for count in (5, 40):
        torch.testing.assert_close(logits(compiled, count), logits(model, count), rtol=close, atol=close)


@pytest.mark.slow
def test_ahead_of_time(tmp_path):
    """An AOTInductor package and the kernels for a GPU that is not here read codes as they are."""
    model = quantised("int8")
    record = ahead.package(model, tmp_path / "model.pt2", tokens(1, 3), use_cache=False)
    assert sum("Packed[int8" in entry.operators for entry in record.linears) == 7 * LAYERS
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    torch.testing.assert_close(run(tokens(1, 3), use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-4)
    traced = ahead.trace(quantised("int8", torch.bfloat16), ahead.gpu_for("cuda:90"), tokens(1, 1), use_cache=False)
    table = ahead.emit(traced, "cuda:90", 1, tmp_path / "kernels")
    spills = [line.split("|")[8].strip() for line in table.splitlines() if "project_" in line]
    assert len(spills) == 4 and set(spills) == {"0"}, table


FEW = ("Llama",)
TRANSPOSED = ("GPT-2", "Falcon")
"""Their linears transpose their weights, which torchao's int8 does not take, in eager either."""

ZOO = [name for name in ARCHITECTURES if name not in TRANSPOSED]


def int8(base):
    quantized.quantize(base, "int8", set(linear_sizes(base)))


@pytest.mark.parametrize("name", [one if one in FEW else pytest.param(one, marks=pytest.mark.slow) for one in ZOO])
def test_the_zoo_on_int8(name):
    """What is fused on plain weights is fused on packed ones, each linear that torchao quantised with its codes."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(prepare=int8)
    packed = sum(isinstance(p, Int8Tensor) for n, p in model.named_parameters() if "lm_head" not in n)
    assert packed
    calls = {**architecture.inputs(), **architecture.calls}
    compiled = torch.compile(model, backend="gaws", options={"strict": True, "verify": True})
    mark = len(RECORDS)
    with torch.no_grad():
        wanted, got = (values(run(**calls)) for run in (model, compiled))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    adapted = [entry for record in RECORDS.since(mark) for entry in record.linears if entry.adapters]
    assert len(adapted) == architecture.adapted
    reasons = Counter(entry.reason for entry in adapted if entry.status != "fused")
    assert reasons == architecture.refused, [(e.path, e.detail) for e in adapted if e.status != "fused"]
    assert sum("Packed[int8" in entry.operators for entry in adapted) >= packed


def values(output):
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def test_without_adapters_a_quantised_base_is_fused_too():
    base = small_llama(layers=1, lora=None)
    quantized.quantize(base, "int8", set(linear_sizes(base)))
    linears = capture(base, tokens(1, 1), use_cache=False, kernels=True).until().record.linears
    assert {entry.operators for entry in linears if "q_proj" in entry.path} == {"Packed[int8 64x64]"}
    assert {entry.reason for entry in linears if "lm_head" not in entry.path} == {None}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "coding"), [("nf4", "packed(nf4 g=64"), ("int8", "packed(int8 ")])
def test_kernels_of_a_quantised_checkpoint_are_written_for_a_gpu(kind, coding, tmp_path, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    how = {
        "nf4": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "int8": transformers.TorchAoConfig(Int8WeightOnlyConfig()),
    }[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    command = ["emit", "--model", str(tmp_path / "packed"), "--adapter", "lora", "--dtype", "bfloat16"]
    assert cli.main([*command, "--tokens", "1", "--out", str(tmp_path / "out")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "layers.0." in line]
    assert len(rows) == 4, "q, k and v; o; gate and up; down"
    kernels = [(folder / "kernel.py").read_text() for folder in (tmp_path / "out").iterdir() if folder.is_dir()]
    assert all(coding in text and "lora(r=16" in text for text in kernels)
