"""Bases in other people's formats: how torchao, bitsandbytes, HQQ and gptqmodel keep a model's linears on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from gawscompile.analysis.packed import int4_weight

GROUP = 64
"""Columns that share a scale, in HQQ's weights and others of 4 bits."""


def _int8(model: nn.Module, wanted: Collection[str]) -> None:
    """torchao's weight-only int8, a scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), lambda _, name: name in wanted)


def _int4(model: nn.Module, wanted: Collection[str]) -> None:
    """torchao's weight-only int4 in aten's packing for CPUs, a scale and an offset for each group."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    quantize_(model, config, lambda _, name: name in wanted)


def _replaced(model: nn.Module, wanted: Collection[str], make: Callable[[nn.Linear], nn.Module]) -> None:
    for name in wanted:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, make(linear))


def _bitsandbytes(linear: nn.Linear, new: Any) -> nn.Module:
    new.load_state_dict(linear.state_dict())
    on_cpu: nn.Module = new.to("cpu")  # which quantises it
    return on_cpu


def _bnb_int8(model: Any, wanted: Collection[str]) -> None:
    """LLM.int8 (Dettmers et al. 2022): its own kernel rounds activations to int8 as well."""
    from bitsandbytes.nn import Linear8bitLt

    def make(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        return _bitsandbytes(linear, Linear8bitLt(*sizes, has_fp16_weights=False))

    _replaced(model, wanted, make)
    model.is_loaded_in_8bit = True  # PEFT asks


def _nf4(model: Any, wanted: Collection[str]) -> None:
    """bitsandbytes' nf4, double quantised (QLoRA: Dettmers et al. 2023)."""
    from bitsandbytes.nn import Linear4bit

    def make(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        return _bitsandbytes(linear, Linear4bit(*sizes, quant_type="nf4", compute_dtype=linear.weight.dtype))

    _replaced(model, wanted, make)
    model.is_loaded_in_4bit = True


def _hqq(bits: int) -> Callable[[Any, Collection[str]], None]:
    """HQQ (Badri and Shaji 2023): groups of columns with a scale and a zero each."""

    def quantize(model: Any, wanted: Collection[str]) -> None:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        _replaced(
            model, wanted, lambda linear: HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
        )

    return quantize


def _in_words(codes: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Codes of 4 bits ``[a, 8 b]`` as int32 ``[a, b]``, of each eight the first in order in the lowest bits."""
    shifts = 4 * torch.tensor(order).argsort()
    words = (codes.long().unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int()


def _gptqmodel(awq: bool) -> Callable[[Any, Collection[str]], None]:
    """GPTQ (Frantar et al. 2023), whose groups are of columns in a random order, as "act-order" leaves them, or AWQ
    (Lin et al. 2024), as gptqmodel keeps either on a CPU. Numbers are rounded to the nearest, without calibration."""

    def make(linear: nn.Linear) -> nn.Module:
        from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
        from gptqmodel.nn_modules.qlinear.torch_aten_kernel_awq import TorchAtenAwqLinear

        (n, k), bias = linear.weight.shape, linear.bias
        kind = TorchAtenAwqLinear if awq else TorchAtenLinear
        module = kind(4, GROUP, False, not awq, k, n, bias=bias is not None)
        order = torch.arange(k) if awq else torch.randperm(k, generator=torch.Generator().manual_seed(k))
        groups = linear.weight[:, order].float().unflatten(1, (-1, GROUP))
        least, most = groups.amin(-1, True), groups.amax(-1, True)
        scales = ((most - least) / 15).clamp(min=1e-6)
        zeros = (-least / scales).round().clamp(0, 15)
        codes = torch.empty(n, k)
        codes[:, order] = (groups / scales + zeros).round().clamp(0, 15).flatten(1)
        lies = [0, 2, 4, 6, 1, 3, 5, 7] if awq else range(8)
        module.qweight = _in_words(codes.T, lies) if awq else _in_words(codes, lies).T.contiguous()
        module.qzeros, module.scales = _in_words(zeros.squeeze(-1).T, lies), scales.squeeze(-1).T.half().contiguous()
        if bias is not None:
            module.bias = bias.data.clone()
        if not awq:
            module.g_idx = torch.empty(k, dtype=torch.int32)
            module.g_idx[order] = torch.arange(k, dtype=torch.int32) // GROUP
            module.qzero_format(format=2)
        module.post_init()
        module.eval()(torch.zeros(1, k, dtype=linear.weight.dtype))  # which lays it out for this CPU
        return module

    return lambda model, wanted: _replaced(model, wanted, make)


KINDS: dict[str, Callable[[Any, Collection[str]], None]] = {
    "int8": _int8,
    "int4": _int4,
    "bnb-int8": _bnb_int8,
    "nf4": _nf4,
    "hqq8": _hqq(8),
    "hqq4": _hqq(4),
    "gptq": _gptqmodel(awq=False),
    "awq": _gptqmodel(awq=True),
}


def installed() -> list[str]:
    """All kinds, without gptqmodel's where that is not installed. ``gawscompile[quant]`` brings the other libraries."""
    missing = ("gptq", "awq") if importlib.util.find_spec("gptqmodel") is None else ()
    return [kind for kind in KINDS if kind not in missing]


@torch.no_grad()
def quantize(model: Any, kind: str, wanted: Collection[str]) -> None:
    """Quantise the linears `wanted` of `model` in place.

    Raises `ImportError` where the library is missing.
    """
    KINDS[kind](model, wanted)


def bits(module: Any) -> int | None:
    """Of a number in a module's weight, if that is quantised."""
    if hasattr(module, "W_q"):
        return int(module.meta["nbits"])
    if hasattr(module, "scales_and_zeros"):  # gptqmodel's
        return 4
    known = {"Int8Tensor": 8, "Int4OpaqueTensor": 4, "Int8Params": 8, "Params4bit": 4}
    return known.get(type(getattr(module, "weight", None)).__name__)


@torch.no_grad()
def dense(module: Any) -> torch.Tensor:
    """The numbers that a quantised weight holds, ``[n, k]``, in fp64 (bitsandbytes' 4 bits: its library's own)."""
    if hasattr(module, "W_q"):
        from hqq.core.quantize import Quantizer

        kept = module.meta
        levels = Quantizer.unpack[kept["packing"]](module.W_q, dtype=torch.float32).double()
        return ((levels - kept["zero"].double()) * kept["scale"].double()).reshape(kept["shape"])
    if hasattr(module, "scales_and_zeros"):
        found = int4_weight(module.qweight, module.group_size, module.scales_and_zeros)
        order = getattr(module, "ret_idx", None)
        return found if order is None else torch.zeros_like(found).index_add(1, order, found)
    weight = module.weight
    if hasattr(weight, "scale_and_zero"):
        return int4_weight(weight.qdata, weight.block_size[-1], weight.scale_and_zero)
    if hasattr(weight, "qdata"):
        return torch.as_tensor(weight.qdata.double() * weight.scale.double())
    if hasattr(weight, "CB"):
        return torch.as_tensor(weight.CB.double() * weight.SCB.double()[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


@torch.no_grad()
def dequantize(model: Any) -> None:
    """Plain linears in the place of quantised ones, with the numbers that those hold, in fp32."""
    for name, module in list(model.named_modules()):
        if not bits(module):
            continue
        numbers, bias = dense(module).float(), getattr(module, "bias", None)
        linear = nn.Linear(numbers.shape[1], numbers.shape[0], bias=bias is not None)
        linear.weight.data, linear.weight.requires_grad = numbers, False
        if bias is not None:
            linear.bias.data = bias.data.float()
        model.set_submodule(name, linear)
