"""zFLoRA: the adapter that widens the residual stream (Gowda et al., EMNLP 2025, arXiv 2510.25784), by our reading.

The stream is (h, z): h of the model's width d, z of the adapter's rank r, zero at first.

- What writes to the stream (attention's output, the MLP's down projection) is widened on its output: ``[W ; A] a`` is
  (W a, A a), and both are added to (h, z).
- What reads it (q, k, v, gate, up) is widened on its input: ``[W | B] (norm(h), z) = W norm(h) + B z``.
- Before the head z is dropped.

So every projection stays one product, and nothing of the adapter is an operation of its own but the longer stream.
The family of forward and backward adapters (FLoRA, arXiv 2511.00050) in one `direction` each: forward alone, z is
written and joins the stream once, before the last norm (``h + M z``); backward alone, z is an expansion of the stream's
start (``E h``) and read. ``docs/zflora.md`` says what of this rests on the papers.

The stream really is one tensor ``[..., d + r]`` that flows through the model's own code: a hook widens what enters the
first block, norms pass z by, and the last norm drops it. With several active adapters it is (h, z₁, z₂, …).
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters.layer import features
from gawscompile.adapters.streams import ZFLoRAConfig, ends_with
from gawscompile.adapters.tuner import Tuner, base_layer_of, check_supported


class StreamLayer(nn.Module, BaseTunerLayer):
    """A module on the stream. Takes and gives the stream ``[..., d + Σr]`` while adapters are in effect."""

    other_param_names = ("ranks",)
    base_layer: Any
    fused: torch.Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ranks: dict[str, int] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = []
        self.register_buffer("fused", None, persistent=False)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def update_layer(self, adapter: str, config: ZFLoRAConfig, path: str) -> None:
        """Adds an adapter, in the device and dtype of the base."""
        self.ranks[adapter] = config.r
        self.make_factors(adapter, config, path)
        self._move_adapter_to_device_of_base_layer(adapter)

    def make_factors(self, adapter: str, config: ZFLoRAConfig, path: str) -> None:
        """Nothing, where z only passes by."""

    def in_effect(self) -> list[str]:
        """The adapters whose z are part of the stream, in its order."""
        if self.disable_adapters:
            return []
        return [name for name in (self.merged_adapters or self.active_adapters) if name in self.ranks]

    def width(self) -> int:
        """Of all z together."""
        return sum(self.ranks[name] for name in self.in_effect())

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """h, and z by adapter."""
        names = self.in_effect()
        h, *zs = x.split([x.shape[-1] - self.width(), *(self.ranks[name] for name in names)], -1)
        return h, dict(zip(names, zs, strict=True))

    def factor(self, leaf: str, adapter: str) -> nn.Linear | None:
        """A factor of the module's own: "A", "B", "E" or "M"."""
        held: Any = getattr(self, f"zflora_{leaf}")
        return held[adapter] if adapter in held else None  # noqa: SIM401 (a ModuleDict has no get)

    def applied(self, factor: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """`factor` times as much of `x` as it reads, in the factor's dtype."""
        x = x if factor.in_features == x.shape[-1] else x[..., : factor.in_features]
        product: torch.Tensor = factor(self._cast_input_dtype(x, factor.weight.dtype))
        return product

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuses the factors with the base into one weight. The base's own is left as it is, and kept."""
        if self.merged:
            raise ValueError("adapters are merged already: call unmerge_adapter first")
        self.merged_adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ranks]
        self.fused = self.fuse()
        if safe_merge and self.fused is not None and not self.fused.isfinite().all():
            self.unmerge()
            raise ValueError("an adapter holds numbers that are not finite")

    def fuse(self) -> torch.Tensor | None:
        """The widened weight ``[outputs, inputs]``; None where there is none."""
        return None

    def unmerge(self) -> None:
        """Drops the fused weight."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        self.merged_adapters, self.fused = [], None

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """The base's weight as ``[outputs, inputs]``."""
        weight: torch.Tensor = self.get_base_weight()
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight


class Norm(StreamLayer):
    """(norm(h), z)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.in_effect():
            return self.base_layer(x)
        h, zs = self.split(x)
        return torch.cat([self.base_layer(h), *zs.values()], -1)


class Ends(StreamLayer):
    """The last norm, which drops z, and the stream's beginning: E and M of the adapters of one direction."""

    adapter_layer_names = ("zflora_E", "zflora_M")
    zflora_E: nn.ModuleDict
    zflora_M: nn.ModuleDict

    def make_factors(self, adapter: str, config: ZFLoRAConfig, path: str) -> None:
        d = self.get_base_weight().shape[0]
        if config.direction == "backward":
            self.zflora_E[adapter] = _made(d, config.r)
        if config.direction == "forward":
            self.zflora_M[adapter] = _made(config.r, d, zero=config.init_weights)

    def widen(self, h: torch.Tensor) -> torch.Tensor:
        """(h, z) at the beginning."""
        zs = []
        for name in self.in_effect():
            e = self.factor("E", name)
            zs.append(h.new_zeros(*h.shape[:-1], self.ranks[name]) if e is None else self.applied(e, h).to(h.dtype))
        return torch.cat([h, *zs], -1) if zs else h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, zs = self.split(x)
        dtype = h.dtype
        for name, z in zs.items():
            if m := self.factor("M", name):
                h = h + self.applied(m, z)
        normed: torch.Tensor = self.base_layer(h.to(dtype))
        return normed


class Reader(StreamLayer):
    """[W | B]: W norm(h) + B z."""

    adapter_layer_names = ("zflora_B",)
    zflora_B: nn.ModuleDict

    def make_factors(self, adapter: str, config: ZFLoRAConfig, path: str) -> None:
        if config.has_factors(path):
            outputs = features(self.get_base_layer())[1]
            self.zflora_B[adapter] = _made(config.rank_of(path), outputs, zero=config.init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.in_effect():
            return self.base_layer(x)
        if self.fused is not None:
            return F.linear(x, self.fused, self.bias)
        h, zs = self.split(x)
        result = self.base_layer(h)
        dtype = result.dtype
        for name, z in zs.items():
            if b := self.factor("B", name):
                result = result + self.applied(b, z)
        return result.to(dtype)

    @torch.no_grad()
    def fuse(self) -> torch.Tensor:
        weight = self.dense()
        parts = [weight]
        for name in self.in_effect():
            part = weight.new_zeros(weight.shape[0], self.ranks[name])
            if b := self.factor("B", name):
                part[:, : b.in_features] = b.weight
            parts.append(part)
        return torch.cat(parts, 1)


class Writer(StreamLayer):
    """[W ; A]: (W a, A a)."""

    adapter_layer_names = ("zflora_A",)
    zflora_A: nn.ModuleDict

    def make_factors(self, adapter: str, config: ZFLoRAConfig, path: str) -> None:
        if config.has_factors(path):
            self.zflora_A[adapter] = _made(features(self.get_base_layer())[0], config.rank_of(path))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        if self.in_effect() and self.fused is not None:
            bias = None if self.bias is None else F.pad(self.bias, (0, self.width()))
            return F.linear(a, self.fused, bias)
        y = self.base_layer(a)
        parts = [y]
        for name in self.in_effect():
            if factor := self.factor("A", name):
                z = self.applied(factor, a).to(y.dtype)
                rest = self.ranks[name] - factor.out_features
                parts.append(F.pad(z, (0, rest)) if rest else z)
            else:
                parts.append(y.new_zeros(*y.shape[:-1], self.ranks[name]))
        return torch.cat(parts, -1) if len(parts) > 1 else y

    @torch.no_grad()
    def fuse(self) -> torch.Tensor:
        weight = self.dense()
        parts = [weight]
        for name in self.in_effect():
            part = weight.new_zeros(self.ranks[name], weight.shape[1])
            if factor := self.factor("A", name):
                part[: factor.out_features] = factor.weight
            parts.append(part)
        return torch.cat(parts)


LAYERS: dict[str, type[StreamLayer]] = {"norm": Norm, "last": Ends, "reader": Reader, "writer": Writer}


def _made(inputs: int, outputs: int, zero: bool = False) -> nn.Linear:
    factor = nn.Linear(inputs, outputs, bias=False)
    if zero:
        nn.init.zeros_(factor.weight)
    else:
        nn.init.kaiming_uniform_(factor.weight, a=math.sqrt(5))
    return factor


class ZFLoRAModel(Tuner):
    """Tuner of `ZFLoRAConfig`. Every module on the stream is wrapped, for z has to get past it."""

    prefix = "zflora_"
    layer_type = StreamLayer
    tuner_layer_cls = StreamLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        found = model_config.get("model_type")
        if peft_config.model_type not in (None, found):
            raise ValueError(f"this adapter was made for {peft_config.model_type!r}, and the model is a {found!r}")
        peft_config.model_type = found
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every check that can fail: PEFT calls this before it replaces the first module."""
        stream = peft_config.stream()
        paths: dict[str, list[str]] = {}
        for path, module in model.named_modules():
            if ends_with(path, stream.refused):
                raise ValueError(f"{path}: zFLoRA does not know how this reads the stream")
            if role := stream.role(path):
                paths.setdefault(role, []).append(path)
                if role in ("reader", "writer"):
                    check_supported(path, base_layer_of(module))
        if lacking := [role for role in ("first", *LAYERS) if role not in paths]:
            raise ValueError(f"no {' and no '.join(lacking)} of a {peft_config.model_type} stream was found")
        projections = [*paths["reader"], *paths["writer"]]
        if peft_config.target_modules is not None and not any(map(peft_config.has_factors, projections)):
            raise ValueError(f"target_modules={peft_config.target_modules!r} matches no reader or writer of the stream")
        if unused := [key for key in peft_config.rank_pattern if not any(
            get_pattern_key([key], path) == key for path in projections
        )]:
            warnings.warn(f"these rank patterns match no reader or writer: {', '.join(sorted(unused))}", stacklevel=2)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return peft_config.stream().role(key) in LAYERS

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
        if isinstance(target, StreamLayer):
            layer = target
        else:
            layer = LAYERS[peft_config.stream().role(current_key)](target)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config, current_key)
        active = [name for name in self.active_adapters if name in layer.ranks]
        layer.set_adapter(active, inference_mode=peft_config.inference_mode)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Lets the stream begin at each stack's first block. A hook does nothing without an adapter in effect."""
        stream = config.stream()
        for path, module in model.named_modules():
            if stream.role(path) == "first" and not any(map(_is_widen, module._forward_pre_hooks.values())):
                stack = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
                hook = functools.partial(_widen, stack=stack, last=stream.last)
                module.register_forward_pre_hook(hook, with_kwargs=True)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`: z changes from block to block, so that no weights of the base's shapes stand for it."""
        raise ValueError(
            "a widened stream has no weights of the base's shapes to merge into; merge_adapter() fuses the factors with"
            " their base weights, and save_pretrained() keeps the adapter"
        )

    def unload(self) -> nn.Module:
        root: nn.Module = self.model
        for module in root.modules():
            hooks: Any = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if _is_widen(hook)]:
                del hooks[key], module._forward_pre_hooks_with_kwargs[key]
        bare: nn.Module = super().unload()
        return bare


def _is_widen(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and hook.func is _widen


def _widen(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stack: nn.Module, last: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What enters the first block, the stream's beginning, with z."""
    ends = getattr(stack, last)
    if args:
        return (ends.widen(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": ends.widen(kwargs["hidden_states"])}
