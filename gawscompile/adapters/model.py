"""The PEFT tuners of GAWS and GAWS-D: which modules get an adapter, and mixed batches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn

from gawscompile.adapters.config import KroneckerConfig
from gawscompile.adapters.layer import BASE, GAWSDLinear, GAWSLinear, KroneckerLinear, features
from gawscompile.adapters.tuner import Tuner, base_layer_of, check_supported


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


class KroneckerModel(Tuner):
    """What the two tuners share."""

    layer_type = KroneckerLinear
    tuner_layer_cls: type[KroneckerLinear]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every check that can fail, over every target: PEFT calls this before it replaces the first module."""
        found = targets(peft_config, model)
        for name, layer in found.items():
            check_supported(name, layer, packed=True)
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
        check_supported(current_key, layer, packed=True)
        splits = peft_config.splits_of(current_key, *features(layer))
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, splits)
            return
        adapted = self.tuner_layer_cls(target, adapter_name, peft_config, splits)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

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


def _give_names(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
