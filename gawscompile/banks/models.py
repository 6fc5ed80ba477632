"""Putting a bank into a model: which linears it is for, the modules in their place, and PEFT's own calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn

from gawscompile.banks.checkpoints import Adapter, read
from gawscompile.banks.layer import BankedLinear, Shared, with_snapshots
from gawscompile.banks.opening import BankError
from gawscompile.banks.reading import is_linear, sizes_of
from gawscompile.banks.sharding import ShardedLinear, Split


def linears(model: nn.Module, modules: str | Sequence[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The linears that a bank is to hold adapters for, by their paths (those inside of PEFT's layers by the layers'),
    and why the others are left out.

    Raises `BankError` for a model that can have no bank, naming the module.
    """
    if "forward" in vars(model):
        raise BankError(f"the forward of {type(model).__name__} was replaced on this object: undo that first")
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    output = embeddings() if embeddings else None
    ends = [modules] if isinstance(modules, str) else list(modules)
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BankedLinear):
            raise BankError("the model has a bank already: model.adapter_bank")
        base = getattr(layer, "base_layer", layer)
        if path.endswith(".base_layer") or any(path.startswith(f"{outer}.") for outer in found):
            continue
        expert, linear = ".experts." in f".{path}.", is_linear(base)
        if modules == "all-linear":
            if linear and not expert and base is not output:
                found[path] = base
            elif linear:
                left[path] = "its tokens do not say which row they are of" if expert else "it is the output layer"
        elif any(path == end or path.endswith(f".{end}") for end in ends):
            if not linear:
                raise BankError(f"{path} is a {type(base).__name__}: a bank holds adapters of nn.Linear and Conv1D")
            if expert:
                raise BankError(f"{path}: tokens of an expert do not say which row they are of; leave it out")
            found[path] = base
        elif linear:
            left[path] = "modules= does not name it"
    if not found:
        raise BankError(f"modules={modules!r}: the model has no linear of that name")
    places = {cast(Any, base).weight.device: path for path, base in found.items()}
    if len(places) > 1 or next(iter(places)).type not in ("cpu", "cuda"):
        where = " and ".join(f"{path} on {device}" for device, path in places.items())
        raise BankError(f"{where}: a bank is for linears on one CPU or one GPU")
    return found, left


def adapters_of(peft: Any) -> dict[str, Adapter]:
    """All adapters of a PeftModel, scaled as they are now. Raises `BankError` for one that no bank takes."""
    inner = dict(peft.get_base_model().named_modules())
    layers = {path: layer for path, layer in inner.items() if hasattr(layer, "base_layer")}
    if merged := [path for path, layer in layers.items() if getattr(layer, "merged", False)]:
        raise BankError(f"{merged[0]}: its adapter is merged into the weight; call unmerge_adapter() first")
    bases = {path: layer.base_layer for path, layer in layers.items()}
    found = {}
    for name in peft.peft_config:
        now = {path: getattr(layer, "scaling", {}).get(name) for path, layer in layers.items()}
        scales = {path: float(scale) for path, scale in now.items() if scale is not None}
        adapter = read(peft, bases, known=tuple(inner), adapter_name=name, scales=scales)
        for path, f in adapter.factors.items():
            of: Any = layers[path]
            alpha = getattr(of, "lora_alpha", None) or getattr(of, "alpha", {})  # of LoRA, of LoKr
            rank = math.sqrt(of.r[name]) if adapter.config.get("use_rslora") else getattr(of, "r", {}).get(name, 1)
            if name in alpha and f.scale != alpha[name] / rank:  # by set_scale: what a saved config has to say
                alphas = {**(adapter.config.get("alpha_pattern") or {}), path: f.scale * rank}
                adapter = dataclasses.replace(adapter, config={**adapter.config, "alpha_pattern": alphas})
        found[name] = adapter
    return found


def active_of(peft: Any) -> list[str]:
    """Names of the active adapters of a PeftModel, none where they are disabled."""
    if any(getattr(layer, "disable_adapters", False) is True for layer in peft.modules()):
        return []
    active = peft.active_adapters if hasattr(peft, "active_adapters") else peft.active_adapter
    return [active] if isinstance(active, str) else list(active)


def attach(
    bank: Any,
    model: nn.Module,
    inner: nn.Module,
    bases: Mapping[str, nn.Module],
    shared: Shared,
    split: Mapping[str, Split],
) -> None:
    """Put `bank` into `model`, of which `inner` is the base model."""
    if inner is not model:
        model.base_model.unload()  # type: ignore[operator, union-attr]
    for index, (path, base) in enumerate(bases.items()):
        parent, _, name = path.rpartition(".")
        part = split.get(path)
        banked = ShardedLinear(base, shared, index, part) if part else BankedLinear(base, shared, index, sizes_of(base))
        setattr(inner.get_submodule(parent), name, banked)
    with_snapshots(inner, shared)
    calls: dict[str, Callable[..., Any]] = {"generate": _generate} if callable(getattr(model, "generate", None)) else {}
    if inner is not model:
        calls |= {"set_adapter": _set_adapter, "load_adapter": _load_adapter}
        calls |= {"delete_adapter": _delete_adapter, "disable_adapter": _disable_adapter}
        calls |= {name: _refused(name, instead) for name, instead in REFUSED.items()}
    for one in {inner, model}:
        vars(one)["adapter_bank"] = bank  # not as a submodule, and the model keeps its bank
    vars(model).update({name: types.MethodType(call, model) for name, call in calls.items()})


def _generate(model: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
    """The model's ``generate``. `adapter_names`: one for each row of this call; "__base__" is none."""
    names = None if adapter_names is None else [None if name == "__base__" else name for name in adapter_names]
    with contextlib.nullcontext() if names is None else model.adapter_bank.activated(names):
        if hasattr(model, "get_base_model"):
            return model.get_base_model().generate(*args, **kwargs)
        return type(model).generate(model, *args, **kwargs)


REFUSED = {
    "save_pretrained": "adapter_bank.save(name, folder)",
    "merge_adapter": "a model without a bank",
    "merge_and_unload": "a model without a bank",
    "unload": "adapter_bank.activate(None)",
    "add_adapter": "adapter_bank.load(name, source)",
    "add_weighted_adapter": "adapter_bank.activate({name: weight, …})",
}
"""Calls of PEFT that would find no adapter in the model's layers, and what stands for them."""


def _refused(name: str, instead: str) -> Callable[..., Any]:
    def refuse(model: Any, *args: Any, **kwargs: Any) -> Any:
        raise BankError(f"{name}: an AdapterBank has this model's adapters; use {instead}")

    return refuse


def _set_adapter(model: Any, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    model.adapter_bank.activate(dict.fromkeys(names, 1.0))


def _load_adapter(model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    model.adapter_bank.load(adapter_name, model_id)


def _delete_adapter(model: Any, adapter_name: str) -> None:
    model.adapter_bank.unload(adapter_name)


@contextlib.contextmanager
def _disable_adapter(model: Any) -> Iterator[None]:
    with model.adapter_bank.activated(None):
        yield
