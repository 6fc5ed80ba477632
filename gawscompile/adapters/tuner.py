"""What all our PEFT tuners share: which base layers they take, and checkpoints that are checked before loading."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = ("Tensor", "Parameter", "DTensor", "FakeTensor")
PREFIX = "base_model.model."
"""What PEFT puts before every key on disk."""


def base_layer_of(module: nn.Module) -> nn.Module:
    """`module`, or what it wraps if it is adapted already."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_packed(layer: nn.Module) -> bool:
    """Whether `layer` multiplies by a weight that it keeps as codes: torchao's tensors, bitsandbytes' linears, and the
    modules that HQQ and gptqmodel put in a linear's place."""
    kept = type(getattr(layer, "weight", None)).__module__.partition(".")[0]
    own = isinstance(layer, nn.Linear) and type(layer).__module__.startswith("bitsandbytes.")
    return kept == "torchao" or own or replaces_linear(layer)


def replaces_linear(layer: nn.Module) -> bool:
    """Whether `layer` is one of HQQ's or gptqmodel's, which are no `nn.Linear` and have no weight of that name."""
    return type(layer).__module__.partition(".")[0] in ("hqq", "gptqmodel") and hasattr(layer, "in_features")


def check_supported(name: str, layer: nn.Module, packed: bool = False) -> None:
    """Raises `TypeError` where the module `layer` at `name` cannot carry an adapter. `packed`: one that only adds to
    what the layer makes, and so may stand beside a quantised weight."""
    if packed and replaces_linear(layer):
        return
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise TypeError(
            f"{name} is a {type(layer).__name__}: adapters go on torch.nn.Linear and transformers' Conv1D"
        )
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        raise TypeError(f"{name} is the out_proj of nn.MultiheadAttention, which never calls it: leave it out")
    if "weight" not in layer._parameters:
        raise TypeError(f"{name} computes its weight (a parametrization): adapters need a plain parameter")
    if packed and is_packed(layer):
        return
    weight = layer.weight
    kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
    if weight.dtype not in PLAIN_DTYPES or kind.__name__ not in PLAIN_TENSORS:
        raise TypeError(f"{name} is quantised ({kind.__name__}, {weight.dtype}): adapters need plain base weights")


class Tuner(BaseTuner):
    """A tuner whose adapted modules are `layer_type`."""

    layer_type: ClassVar[type[BaseTunerLayer]]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts a base layer back as it is: PEFT would read its ``weight``, which HQQ's and gptqmodel's linears lack."""
        if base_layer_of(child) is new_module:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's cast makes new parameters, and those of a ParameterDict forget that they were frozen."""
        frozen = {key for key, value in self.adapter_parameters(self, adapter_name).items() if not value.requires_grad}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for key, parameter in self.adapter_parameters(self, adapter_name).items():
            parameter.requires_grad_(key not in frozen)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """PEFT's mapping of keys on disk to the model's, checked. Raises `ValueError` before anything is loaded.

        PEFT itself ignores keys that it cannot place, and warns of missing ones by a prefix that ``diag`` lacks.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = cls.adapter_parameters(model, adapter_name)
        present = model.state_dict()
        bare = {key if key in present else key.removeprefix(PREFIX): value for key, value in mapped.items()}
        faults = []
        if unknown := sorted(set(bare) - set(present)):
            faults.append(f"keys that fit nowhere: {_some(unknown)}")
        if missing := sorted(set(expected) - set(bare)):
            faults.append(f"missing: {_some(missing)}")
        faults += [
            f"{key} has shape {tuple(value.shape)}, the configuration makes it {tuple(present[key].shape)}"
            for key, value in bare.items()
            if key in present and value.shape != present[key].shape
        ]
        if faults:
            cls._materialise(model, adapter_name)
            raise ValueError(
                f"nothing was loaded, the weights do not fit adapter {adapter_name!r}: {'; '.join(faults)}."
                f" The adapter stays as it was made: delete_adapter({adapter_name!r}) before another try"
            )
        return mapped

    @classmethod
    def adapter_parameters(cls, model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
        """State-dict key → parameter, of everything of `adapter` in `model`."""
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, cls.layer_type):
                for leaf in module.adapter_layer_names:
                    for key, parameter in getattr(module, leaf).named_parameters():
                        if key.removesuffix(".weight") == adapter:
                            found[f"{name}.{leaf}.{key}"] = parameter
        return found

    @classmethod
    def _materialise(cls, model: nn.Module, adapter: str) -> None:
        """Zeros for what waits on the meta device (``low_cpu_mem_usage``): its memory could hold anything."""
        for module in model.modules():
            if isinstance(module, cls.layer_type):
                base = module.get_base_layer()
                device = next(itertools.chain(base.parameters(), base.buffers())).device
                for held in (getattr(module, leaf) for leaf in module.adapter_layer_names):
                    if adapter not in held:
                        continue
                    if isinstance(held, nn.ModuleDict) and next(held[adapter].parameters()).is_meta:
                        held[adapter].to_empty(device=device)
                        for parameter in held[adapter].parameters():
                            nn.init.zeros_(parameter)
                    elif isinstance(held, nn.ParameterDict) and held[adapter].is_meta:
                        held[adapter] = nn.Parameter(torch.zeros_like(held[adapter], device=device))


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
