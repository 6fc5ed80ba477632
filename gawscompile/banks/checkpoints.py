"""One adapter from a folder, a state dict or a `peft.PeftModel`, as tensors that are known to be sound: LoRA and DoRA,
and with `kronecker` the others.

A bank loads adapters while it serves, so `read` looks at everything before it returns anything: each setting, each key,
each shape and each number. It changes nothing and writes nothing. What it cannot take ends in a `BankError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gawscompile.banks.dora import Scaled, norms
from gawscompile.banks.kronecker import KINDS, Chain, KroneckerReader
from gawscompile.banks.opening import (
    CONFIG,
    FINITE,
    FLAG,
    PREFIX,
    RANK,
    TARGETS,
    UNHEARD,
    WEIGHTS,
    BankError,
    Kind,
    Rule,
    by_pattern,
    opened,
    settings_of,
)
from gawscompile.banks.reading import Key, Reader, is_linear, sizes_of
from gawscompile.ir.records import plain

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "Adapter", "BankError", "Factors", "is_linear", "read", "sizes_of"]

KEY = re.compile(
    r"(?P<path>.+?)\.((?P<factor>lora_[AB])(\.(?P<name>[^.]+))?\.(?P<end>weight|bias)|"
    r"(?P<magnitude>lora_magnitude_vector)(\.(?!weight$)(?P<owner>[^.]+))?(\.weight)?|(base_layer\.)?bias)",
    re.DOTALL,
)
SHARDED = "the model is sharded over ranks: a bank shards LoRA alone, without the base's biases"
A, B, B_BIAS, BASE_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias", "base_layer.bias"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's files have no ".weight" behind it, its modules have
FOREIGN = {
    "lora_embedding_": "it is of an embedding: train LoRA on linears only",
    "token_adapter": "it holds trained tokens: train without trainable_token_indices",
    "": "it is no part of LoRA on a linear: train without modules_to_save and without resized embeddings",
}
"""Why a bank does not take a key, by what is in it."""

DEFAULTS = {"use_rslora": False, "lora_bias": False, "use_dora": False, "bias": "none"}

HONOURED: dict[str, Rule] = {
    "r": RANK,
    "lora_alpha": FINITE,
    "rank_pattern": by_pattern(RANK),
    "alpha_pattern": by_pattern(FINITE),
    "use_rslora": FLAG,
    "lora_bias": FLAG,
    "use_dora": FLAG,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    **TARGETS,
    # Other starts move the base weights, and PEFT moves them again when it loads such an adapter.
    "init_lora_weights": (
        lambda value: value in (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
        "a start that leaves base weights alone: path_initial_model_for_weight_conversion= of save_pretrained makes "
        "plain LoRA of this one. Write true where the bank's base model is the one with the moved weights",
    ),
}
"""Settings that `read` follows."""

INERT = (
    *UNHEARD,
    *("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
)
"""Settings without effect, of which `qalora_group_size` and others have one only beside what is refused."""


def _defaults() -> dict[str, Any]:
    import peft

    plain_lora: Any = peft.LoraConfig()
    return dict(plain_lora.to_dict())


LORA = Kind("LoRA", ("r", "lora_alpha"), HONOURED, INERT, _defaults)


@dataclass(frozen=True)
class Factors:
    """What one adapter adds to one linear module: ``y += scale * B (A x) + bias``, and ``(c - 1) * W x`` where it is
    DoRA, `scaled`. B's rows have been multiplied by c then.

    `a` is [r, k] and `b` is [n, r], in the dtypes that they are stored in: float32, bfloat16 or float16. They may be
    views of the source. `bias` is [n] in float32. It is not multiplied by `scale` again.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    scaled: Scaled | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype


@dataclass(frozen=True)
class Adapter:
    """`factors` by the module's path in the base model, and the adapter's PEFT config as data that JSON can hold."""

    factors: dict[str, Factors | Chain]
    config: dict[str, Any]


def read(
    source: str | Path | Mapping[str, torch.Tensor] | nn.Module,
    modules: Mapping[str, nn.Module],
    *,
    config: Any = None,
    base: str | None = None,
    adapter_name: str = "default",
    known: Collection[str] = (),
    scales: Mapping[str, float] | None = None,
) -> Adapter:
    """The adapter in `source`, for the linears in `modules`. Raises `BankError`.

    `source` is a folder that PEFT saved; or a state dict in PEFT's spelling, with its `peft.PeftConfig` as `config`, or
    a dict with at least ``r`` and ``lora_alpha``; or a `peft.PeftModel`, of which the only adapter is taken, or else
    `adapter_name`. `modules` has the base layers by path: `nn.Linear`, or ``Conv1D`` of transformers. `known` has the
    paths of all modules of the model, and `base` is its name. Both make messages clearer. `scales`: by module, where
    they are not what the config says.
    """
    at, config_at, raw, tensors = opened(source, config, adapter_name)
    settings = settings_of(config_at, raw, {"LORA": LORA, **KINDS})
    if settings.get("use_dora") and settings.get("lora_bias"):
        what = "PEFT has no such DoRA; set one of them to false"
        raise BankError(f"{config_at} says use_dora=True and lora_bias=True: {what}")
    name = settings.get("base_model_name_or_path")
    other = f" (it was trained on {plain(str(name))!r}, the bank serves {base!r})" if base and name else ""
    kind = LoraReader if settings["peft_type"] == "LORA" else KroneckerReader
    reader = kind(at, tensors(), settings, modules, known, other if name != base else "", scales or {})
    try:
        return Adapter(dict(reader.factors()), settings)
    except (re.error, OverflowError, RecursionError) as error:  # of a pattern: no other comes from outside
        raise BankError(f"{config_at}: a pattern is no regular expression ({error}): correct it") from error


class LoraReader(Reader):
    """LoRA, rsLoRA and DoRA."""

    def factors(self) -> dict[str, Factors]:
        keys = self.keys()
        read = {path: self._module(path, parts) for path, parts in keys.items()}
        found = {path: factors for path, factors in read.items() if factors is not None}
        if not found:
            raise BankError(f"{self.at} holds no LoRA factors: save the adapter again with save_pretrained")
        self.as_targeted(found, keys, A)
        return found

    def key(self, key: str) -> Key:
        match = KEY.fullmatch(key.removeprefix(PREFIX))
        part = f"{match['factor']}.{match['end']}" if match and match["factor"] else BASE_BIAS
        part = (match and match["magnitude"]) or part
        if not match or part not in (A, B, B_BIAS, BASE_BIAS, MAGNITUDE):
            why = next(why for piece, why in FOREIGN.items() if piece in key)
            raise self.error(key, f"is not taken, as {why}")
        return Key(match["path"], part, match["name"] or match["owner"], part != BASE_BIAS)

    def _module(self, path: str, keys: dict[str, str]) -> Factors | None:
        """What the checkpoint holds for a module, or None where that is a bias that was not trained."""
        some = next(iter(keys.values()))
        n, k, own = self.layer(path, some)
        setting: dict[str, Any] = {**DEFAULTS, **self.settings}
        rank: int = self.said_of(path, "rank_pattern", "r")
        alpha: float = self.said_of(path, "alpha_pattern", "lora_alpha")

        if BASE_BIAS in keys and own is None:
            what = f"is a bias, and the base layer has none{self.other}: give an adapter of this base model"
            raise self.error(keys[BASE_BIAS], what)
        only_bias = setting["bias"] == "all" and keys.keys() == {BASE_BIAS}
        due = set() if only_bias else {A, B, B_BIAS} if setting["lora_bias"] else {A, B}
        due |= {MAGNITUDE} if setting["use_dora"] and not only_bias else set()
        due |= {BASE_BIAS} if setting["bias"] != "none" and own is not None else set()
        self.complete(path, keys, due, "bias, lora_bias or use_dora")

        if keys.keys() & {MAGNITUDE, BASE_BIAS} and hasattr(self.modules[path].weight, "placements"):
            raise self.error(some, f"is beside {plain(' and '.join(keys.keys() - {A, B}))}, and {SHARDED}")

        shapes = {A: (rank, k), B: (n, rank), B_BIAS: (n,), BASE_BIAS: (n,), MAGNITUDE: (n,)}
        why = f"{plain(path)} has {k} inputs and {n} outputs, and rank {rank} in the config{self.other}"
        of = {part: self.sound(key, shapes[part], why) for part, key in keys.items()}
        trained = of.get(BASE_BIAS)
        bias = None if trained is None or own is None else trained.float() - own.detach().to(trained.device).float()
        if only_bias:
            if bias is not None and bias.any():
                what = "was trained without LoRA beside it: train with bias='lora_only', or LoRA on this module, too"
                raise self.error(some, what)
            return None
        scale = self.scales.get(path, alpha / (math.sqrt(rank) if setting["use_rslora"] else rank))
        if B_BIAS in of:
            scaled = scale * of[B_BIAS].float()
            bias = scaled if bias is None else bias + scaled
        if MAGNITUDE not in of:
            return Factors(of[A], of[B], scale, bias)
        m = of[MAGNITUDE].to("cpu", torch.float32, copy=True).contiguous()  # kept: no view of the file or of a model
        c = m / norms(self.modules[path], of[A], of[B], scale)
        if not c.isfinite().all():
            what = "scales a row of zeros: W + s B A has one. Give an adapter of this base model, or one without DoRA"
            raise self.error(keys[MAGNITUDE], f"{what}{self.other}")
        rows = Scaled(c, m)
        return Factors(of[A], rows.folded(of[B]), scale, bias, rows)
