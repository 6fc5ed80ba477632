"""The PEFT tuners: which modules get an adapter, what is refused before anything changes, and what a checkpoint is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters.config import KroneckerConfig
from gawscompile.adapters.layer import BASE, GAWSDLinear, GAWSLinear, KroneckerLinear, features

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TENSORS = ("Tensor", "Parameter", "DTensor", "FakeTensor")
PREFIX = "base_model.model."
"""What PEFT puts before every key on disk."""


def base_layer_of(module: nn.Module) -> nn.Module:
    """`module`, or what it wraps if it is adapted already."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def check_supported(name: str, layer: nn.Module) -> None:
    """Raises `TypeError` where the module `layer` at `name` cannot carry an adapter."""
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise TypeError(
            f"{name} is a {type(layer).__name__}: GAWS adapters go on torch.nn.Linear and transformers' Conv1D"
        )
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        raise TypeError(f"{name} is the out_proj of nn.MultiheadAttention, which never calls it: leave it out")
    if "weight" not in layer._parameters:
        raise TypeError(f"{name} computes its weight (a parametrization): GAWS adapters need a plain parameter")
    weight = layer.weight
    kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
    if weight.dtype not in PLAIN_DTYPES or kind.__name__ not in PLAIN_TENSORS:
        raise TypeError(f"{name} is quantised ({kind.__name__}, {weight.dtype}): GAWS adapters need plain base weights")


def targets(config: KroneckerConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Path → base layer of every module that `config` targets; spells out ``all-linear`` in `config`, as PEFT does."""
    _maybe_include_all_linear_layers(config, model)
    inside: tuple[str, ...] = ()
    found = {}
    for name, module in model.named_modules():
        if name and not name.startswith(inside) and BaseTuner._check_target_module_exists(config, name):
            found[name] = base_layer_of(module)
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
    return found


class KroneckerModel(BaseTuner):
    """What the two tuners share."""

    tuner_layer_cls: type[KroneckerLinear]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every check that can fail, over every target: PEFT calls this before it replaces the first module."""
        found = targets(peft_config, model)
        for name, layer in found.items():
            check_supported(name, layer)
            peft_config.splits_of(name, *features(layer))
        for pattern in (peft_config.input_splits_pattern, peft_config.output_splits_pattern):
            used = {key for key in pattern if any(get_pattern_key([key], name) == key for name in found)}
            if unused := sorted(set(pattern) - used):
                warnings.warn(f"these split patterns match no adapted module: {', '.join(unused)}", stacklevel=2)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = base_layer_of(target)
        check_supported(current_key, layer)
        splits = peft_config.splits_of(current_key, *features(layer))
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, splits)
            return
        adapted = self.tuner_layer_cls(target, adapter_name, peft_config, splits)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's cast makes new parameters, and those of a ParameterDict forget that they were frozen."""
        frozen = {key for key, value in adapter_parameters(self, adapter_name).items() if not value.requires_grad}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for key, parameter in adapter_parameters(self, adapter_name).items():
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
        expected = adapter_parameters(model, adapter_name)
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
            _materialise(model, adapter_name)
            raise ValueError(
                f"nothing was loaded, the weights do not fit adapter {adapter_name!r}: {'; '.join(faults)}."
                f" The adapter stays as it was made: delete_adapter({adapter_name!r}) before another try"
            )
        return mapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` to every adapted module for the length of one forward or generate.

        Beam search repeats each row of a batch for a decoder, and so its name, but not for an encoder.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works in eval mode only")
        layers = [module for module in self.modules() if isinstance(module, KroneckerLinear)]
        known = {adapter for layer in layers for adapter in layer.splits} | {BASE}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names has {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        unrepeated = set() if encoder in (None, self.model) else {id(module) for module in encoder.modules()}
        repeated = [name for name in names for _ in range(beams)]
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (KroneckerLinear, AuxiliaryTrainingWrapper)):
                    given = list(names) if id(module) in unrepeated else repeated
                    hook = functools.partial(_give_names, names=given)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


class GAWSModel(KroneckerModel):
    """Tuner of `GAWSConfig`."""

    prefix = "GAWS"
    tuner_layer_cls = GAWSLinear


class GAWSDModel(KroneckerModel):
    """Tuner of `GAWSDConfig`."""

    prefix = "GAWSD"
    tuner_layer_cls = GAWSDLinear


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """State-dict key → parameter of every G and diag of `adapter` in `model`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, KroneckerLinear):
            for leaf in module.adapter_layer_names:
                for key, parameter in getattr(module, leaf).named_parameters():
                    if key.removesuffix(".weight") == adapter:
                        found[f"{name}.{leaf}.{key}"] = parameter
    return found


def _materialise(model: nn.Module, adapter: str) -> None:
    """Zeros for what waits on the meta device (``low_cpu_mem_usage``): products with it are whatever was in memory."""
    for module in model.modules():
        if isinstance(module, KroneckerLinear) and adapter in module.splits and module.g(adapter).is_meta:
            device = module._base_weight().device
            for leaf in module.adapter_layer_names:
                held = getattr(module, leaf)
                if adapter in held and isinstance(held, nn.ModuleDict):
                    held[adapter].to_empty(device=device)
                elif adapter in held:
                    held[adapter] = nn.Parameter(torch.empty_like(held[adapter], device=device))
            module.reset(adapter, "zero")


def _give_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
