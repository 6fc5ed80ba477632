"""What the readers of all types of adapters share: tensors by key, the modules that they are for, and what is sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gawscompile.banks.opening import PREFIX, BankError
from gawscompile.ir.records import plain
from gawscompile.ir.types import DTYPE_NAMES


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear that a bank can be beside: `nn.Linear` itself, as kinds of it may be called otherwise, or
    ``Conv1D`` of transformers, which need not be installed."""
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of such a linear. A ``Conv1D`` keeps its weight as [inputs, outputs]."""
    weight: Any = layer.weight
    first, second = map(int, weight.shape)
    return (first, second) if type(layer) is nn.Linear else (second, first)


@dataclass(frozen=True)
class Key:
    """What a key of a checkpoint is: a part of a module, and the name of the adapter where it has one; `named` is
    whether it could."""

    path: str
    part: str
    name: str | None = None
    named: bool = True


@dataclass(frozen=True)
class Reader(ABC):
    """Tensors by key, and what they must agree with. `at`: what messages call the tensors. `other`: words on another
    base model, if it is that. `scales`: by module, where they are not what the settings say."""

    at: str
    tensors: Mapping[str, torch.Tensor]
    settings: dict[str, Any]
    modules: Mapping[str, nn.Module]
    known: Collection[str]
    other: str
    scales: Mapping[str, float]

    @abstractmethod
    def key(self, key: str) -> Key:
        """Raises `BankError` for one that is no part of such an adapter."""

    @abstractmethod
    def factors(self) -> Mapping[str, Any]:
        """What the adapter adds to each module, by path. Raises `BankError`."""

    def error(self, key: str, what: str) -> BankError:
        return BankError(f"{self.at}: {plain(key)} {what}")

    def targeted(self) -> dict[str, bool]:
        """Whether the config names a module of the bank, by path; empty where it leaves that to PEFT."""
        from peft.tuners.tuners_utils import check_target_module_exists

        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        rule: Any = SimpleNamespace(target_parameters=None, **{name: self.settings.get(name) for name in names})
        if rule.target_modules is None or str(rule.target_modules).lower() == "all-linear":
            return {}
        return {path: bool(check_target_module_exists(rule, path)) for path in self.modules}

    def keys(self) -> dict[str, dict[str, str]]:
        """Keys by module and part."""
        found: dict[str, dict[str, str]] = {}
        names: dict[str | None, str] = {}
        for key in self.tensors:
            own = self.key(str(key))
            parts = found.setdefault(own.path, {})
            if own.part in parts:
                raise self.error(key, f"is {plain(parts[own.part])} in another spelling: keep one of the two")
            parts[own.part] = key
            if own.named:
                names.setdefault(own.name, key)
        if len(names) > 1:
            one, two, *_ = names.values()
            raise self.error(one, f"and {plain(two)} are not of one adapter: keep the keys of one")
        return found

    def said_of(self, path: str, pattern: str, name: str) -> Any:
        """What the settings say of a module: by their `pattern`, else `name`, for all."""
        from peft.utils.other import get_pattern_key

        patterns: Any = self.settings.get(pattern) or {}
        return patterns.get(get_pattern_key(patterns, path), self.settings[name])

    def complete(self, path: str, keys: Mapping[str, str], due: Collection[str], correct: str) -> None:
        """Raises `BankError` unless a module has the parts that are `due`. `correct`: the settings that say so."""
        for part in sorted(set(due) ^ keys.keys()):
            if part in due:
                some = next(iter(keys.values()))
                what = f"is missing beside {plain(some)}: save the adapter again, or correct its config"
                raise self.error(f"{PREFIX}{path}.{part}", what)
            raise self.error(keys[part], f"is not what the config asks for: correct its {correct}")

    def as_targeted(self, found: Collection[str], keys: Mapping[str, Mapping[str, str]], part: str) -> None:
        """Raises `BankError` unless the modules in `found` are those that the config names."""
        for path, targeted in self.targeted().items():
            if targeted and path not in found:
                what = "is missing: save the adapter again, or correct target_modules in its config"
                raise self.error(f"{PREFIX}{path}.{part}", what)
            if path in found and not targeted:
                what = "is of a module that the config leaves out: correct target_modules and what restricts them"
                raise self.error(keys[path].get(part) or next(iter(keys[path].values())), what)

    def layer(self, path: str, key: str) -> tuple[int, int, torch.Tensor | None]:
        """The outputs and inputs of a base layer, and its own bias."""
        layer: Any = self.modules.get(path)
        if layer is not None and is_linear(layer):
            return *sizes_of(layer), layer.bias
        if layer is None and self.known and path not in self.known:
            what = f"is of a module that the model does not have{self.other}: give an adapter of this base model"
            raise self.error(key, what)
        train = "train with bias='lora_only'" if self.settings.get("bias") == "all" else "train without it"
        what = f"is of a module that the bank was not asked to hold: ask it to, if that is a linear, or {train}"
        raise self.error(key, what)

    def sound(self, key: str, shape: tuple[int, ...], why: str) -> torch.Tensor:
        tensor = self.tensors[key]
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise self.error(key, "is no dense tensor with values: give one")
        if tensor.dtype not in DTYPE_NAMES:
            raise self.error(key, f"is of {tensor.dtype}: save it as float32, bfloat16 or float16")
        if tensor.shape != shape:
            what = f"has the shape {list(tensor.shape)} and needs {list(shape)}, as {why}"
            raise self.error(key, f"{what}: give an adapter of this base model, with its own config")
        if not tensor.isfinite().all():
            raise self.error(key, "holds NaN or infinity: save the adapter from a step that had not diverged")
        return tensor.detach()
