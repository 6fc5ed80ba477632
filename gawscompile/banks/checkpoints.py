"""One LoRA or DoRA adapter from a folder, a state dict or a `peft.PeftModel`, as tensors that are known to be sound.

A bank loads adapters while it serves, so `read` looks at everything before it returns anything: each setting, each key,
each shape and each number. It changes nothing and writes nothing. What it cannot take ends in a `BankError`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from gawscompile.banks.dora import Scaled, norms
from gawscompile.ir.records import plain
from gawscompile.ir.types import DTYPE_NAMES

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a")
"""How files of torch.save begin, today's and old ones. A safetensors file begins with the length of its header."""

PREFIX = "base_model.model."
KEY = re.compile(
    r"(?P<path>.+?)\.((?P<factor>lora_[AB])(\.(?P<name>[^.]+))?\.(?P<end>weight|bias)|"
    r"(?P<magnitude>lora_magnitude_vector)(\.(?!weight$)(?P<owner>[^.]+))?(\.weight)?|(base_layer\.)?bias)",
    re.DOTALL,
)
A, B, B_BIAS, BASE_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias", "base_layer.bias"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's files have no ".weight" behind it, its modules have
FOREIGN = {
    "lora_embedding_": "it is of an embedding: train LoRA on linears only",
    "token_adapter": "it holds trained tokens: train without trainable_token_indices",
    "": "it is no part of LoRA on a linear: train without modules_to_save and without resized embeddings",
}
"""Why a bank does not take a key, by what is in it."""

DEFAULTS = {"use_rslora": False, "lora_bias": False, "use_dora": False, "bias": "none"}

LARGEST = torch.finfo(torch.float32).max

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is right in words."""


def _several(kind: type, what: str) -> Rule:
    def right(value: Any) -> bool:
        return value is None or all(type(one) is kind for one in (value if isinstance(value, list) else [value]))

    return right, f"{what} or a list of them"


def _by_pattern(rule: Rule) -> Rule:
    def right(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(rule[0], value.values())))

    return right, f"{rule[1]} for each pattern"


RANK: Rule = (lambda value: type(value) is int and value > 0, "a whole number above 0")
FINITE: Rule = (lambda value: type(value) in (int, float) and abs(value) <= LARGEST, "a finite number")
FLAG: Rule = (lambda value: type(value) is bool, "true or false")
NAMES = _several(str, "a pattern")
HONOURED: dict[str, Rule] = {
    "peft_type": (lambda value: value == "LORA", "LORA, the one type that a bank takes; run others with PEFT"),
    "r": RANK,
    "lora_alpha": FINITE,
    "rank_pattern": _by_pattern(RANK),
    "alpha_pattern": _by_pattern(FINITE),
    "use_rslora": FLAG,
    "lora_bias": FLAG,
    "use_dora": FLAG,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "layers_to_transform": _several(int, "a whole number"),
    # Other starts move the base weights, and PEFT moves them again when it loads such an adapter.
    "init_lora_weights": (
        lambda value: value in (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
        "a start that leaves base weights alone: path_initial_model_for_weight_conversion= of save_pretrained makes "
        "plain LoRA of this one. Write true where the bank's base model is the one with the moved weights",
    ),
}
"""Settings that `read` follows."""

INERT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
)
"""Settings that change no result in evaluation, or none without another one that is refused. All others must have
their defaults. So what PEFT adds one day is refused, and not overlooked."""


class BankError(ValueError):
    """What a bank cannot take; the message names the file, key or module, and the remedy."""


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


@dataclass(frozen=True)
class Adapter:
    """`factors` by the module's path in the base model, and the adapter's PEFT config as data that JSON can hold."""

    factors: dict[str, Factors]
    config: dict[str, Any]


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear that a bank can be beside: `nn.Linear` itself, as kinds of it may be called otherwise, or
    ``Conv1D`` of transformers, which need not be installed."""
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of such a linear. A ``Conv1D`` keeps its weight as [inputs, outputs]."""
    weight: Any = layer.weight
    first, second = map(int, weight.shape)
    return (first, second) if type(layer) is nn.Linear else (second, first)


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

    `source` is a folder that PEFT saved; or a state dict in PEFT's spelling, with its `peft.LoraConfig` as `config`, or
    a dict with at least ``r`` and ``lora_alpha``; or a `peft.PeftModel`, of which the only adapter is taken, or else
    `adapter_name`. `modules` has the base layers by path: `nn.Linear`, or ``Conv1D`` of transformers. `known` has the
    paths of all modules of the model, and `base` is its name. Both make messages clearer. `scales`: by module, where
    they are not what the config says.
    """
    at, config_at, raw, tensors = _opened(source, config, adapter_name)
    settings = _settings(config_at, raw)
    name = settings.get("base_model_name_or_path")
    other = f" (it was trained on {plain(str(name))!r}, the bank serves {base!r})" if base and name else ""
    reader = _Reader(at, tensors(), settings, modules, known, other if name != base else "", scales or {})
    try:
        return Adapter(reader.factors(), settings)
    except (re.error, OverflowError, RecursionError) as error:  # of a pattern: no other comes from outside
        raise BankError(f"{config_at}: a pattern is no regular expression ({error}): correct it") from error


Opened = tuple[str, str, Any, Callable[[], Mapping[str, torch.Tensor]]]
"""What messages call the tensors and the config, the config, and what reads the tensors once that is found sound."""


def _opened(source: Any, config: Any, adapter_name: str) -> Opened:
    import peft

    if isinstance(source, Mapping):
        if isinstance(config, Mapping):
            config = {"peft_type": "LORA", **config}
        elif isinstance(config, peft.PeftConfig):
            config = config.to_dict()
        else:
            raise BankError("a state dict needs config=: pass its LoraConfig, or a dict with r and lora_alpha")
        return "the state dict", "config=", config, lambda: source
    if config is not None:
        raise BankError(f"config= is for a state dict: a {type(source).__name__} has its own, so leave config= out")
    if isinstance(source, (str, Path)):
        return _folder(Path(source))
    if not isinstance(source, peft.PeftModel):
        raise BankError(f"a {type(source).__name__} is no adapter: give a folder, a state dict or a peft.PeftModel")
    names = sorted(source.peft_config)
    name = names[0] if len(names) == 1 else adapter_name
    if name not in names:
        raise BankError(f"the PeftModel has no adapter {name!r}: pass one of these as adapter_name=: {names}")

    def tensors() -> dict[str, torch.Tensor]:
        # Left to itself, PEFT asks the Hub for the size of the vocabulary.
        own: dict[str, torch.Tensor]
        own = peft.get_peft_model_state_dict(source, adapter_name=name, save_embedding_layers=False)
        return own

    at = f"adapter {name!r} of the PeftModel"
    return at, f"the config of {at}", source.peft_config[name].to_dict(), tensors


def _folder(folder: Path) -> Opened:
    at, config_at = folder / WEIGHTS, folder / CONFIG
    again = "give a folder as PEFT's save_pretrained writes it"
    if not folder.is_dir():
        raise BankError(f"{folder} is {'a file' if folder.exists() else 'not there'}: {again} (no hub is asked)")
    if not config_at.is_file():
        raise BankError(f"{config_at} is missing: {again}")
    try:
        config = json.loads(config_at.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = plain(str(error))
        raise BankError(f"{config_at} cannot be read as JSON ({why}): copy or save the adapter again") from error
    if not at.is_file() and (folder / PICKLE).is_file():
        again = f"{PICKLE} is a pickle and is not read; convert it: safetensors.torch.save_file(torch.load(...), ...)"
    if not at.is_file():
        raise BankError(f"{at} is missing: {again}")

    def tensors() -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with at.open("rb") as raw:
                pickled = raw.read(4).startswith(PICKLES)
            if not pickled:
                with safe_open(at, "pt") as file:
                    return {key: file.get_tensor(key) for key in list(file.keys())}
        except (OSError, ValueError, SafetensorError) as error:
            why = plain(str(error))
            raise BankError(f"{at} is no whole safetensors file ({why}): copy or save the adapter again") from error
        raise BankError(f"{at} is a pickle of torch.save: convert it with safetensors.torch.save_file")

    return str(at), str(config_at), config, tensors


def _settings(at: str, config: Any) -> dict[str, Any]:
    """A config as plain data, of which every setting is understood."""
    import peft

    try:
        settings = json.loads(json.dumps(config, default=_listed))
    except (TypeError, ValueError, RecursionError) as error:
        why = plain(str(error))
        raise BankError(f"{at} is not plain data ({why}): give strings, numbers, lists and dicts only") from error
    if not isinstance(settings, dict):
        raise BankError(f"{at} is no JSON object: save the adapter again with save_pretrained")
    needed = ["peft_type", "r", "lora_alpha"]
    plain_lora: Any = peft.LoraConfig()
    defaults = json.loads(json.dumps(plain_lora.to_dict(), default=_listed))
    for name in [*needed, *sorted(settings.keys() - needed)]:  # the type first, as other types have other settings
        if name not in settings:
            raise BankError(f"{at} has no {name}: add it, or save the adapter again with save_pretrained")
        value = settings[name]
        says = f"{at} says {plain(name)}={plain(repr(value))}"
        if name in HONOURED:
            right, what = HONOURED[name]
            if not right(value):
                raise BankError(f"{says}: it must be {what}")
        elif name not in INERT and (value or None) != (defaults.get(name) or None):
            unknown = "" if name in defaults else f", which PEFT {peft.__version__} does not know"
            raise BankError(f"{says}{unknown}: a bank takes plain LoRA; train without it, or run it with PEFT")
    if settings.get("use_dora") and settings.get("lora_bias"):
        raise BankError(f"{at} says use_dora=True and lora_bias=True: PEFT has no such DoRA; set one of them to false")
    return settings


def _listed(value: Any) -> list[Any]:
    """A set, which a `peft.LoraConfig` holds and JSON has no word for."""
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"it holds a {type(value).__name__}")


@dataclass(frozen=True)
class _Reader:
    """Tensors by key, and what they must agree with."""

    at: str
    tensors: Mapping[str, torch.Tensor]
    settings: dict[str, Any]
    modules: Mapping[str, nn.Module]
    known: Collection[str]
    other: str
    scales: Mapping[str, float]

    def factors(self) -> dict[str, Factors]:
        keys = self._keys()
        read = {path: self._module(path, parts) for path, parts in keys.items()}
        found = {path: factors for path, factors in read.items() if factors is not None}
        if not found:
            raise BankError(f"{self.at} holds no LoRA factors: save the adapter again with save_pretrained")
        for path, targeted in self._targeted().items():
            if targeted and path not in found:
                what = "is missing: save the adapter again, or correct target_modules in its config"
                raise self._error(f"{PREFIX}{path}.{A}", what)
            if path in found and not targeted:
                what = "is of a module that the config leaves out: correct target_modules and what restricts them"
                raise self._error(keys[path][A], what)
        return found

    def _error(self, key: str, what: str) -> BankError:
        return BankError(f"{self.at}: {plain(key)} {what}")

    def _targeted(self) -> dict[str, bool]:
        """Whether the config names a module of the bank, by path; empty where it leaves that to PEFT."""
        from peft.tuners.tuners_utils import check_target_module_exists

        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        rule: Any = SimpleNamespace(target_parameters=None, **{name: self.settings.get(name) for name in names})
        if rule.target_modules is None or str(rule.target_modules).lower() == "all-linear":
            return {}
        return {path: bool(check_target_module_exists(rule, path)) for path in self.modules}

    def _keys(self) -> dict[str, dict[str, str]]:
        """Keys by module and part."""
        found: dict[str, dict[str, str]] = {}
        names: dict[str | None, str] = {}
        for key in self.tensors:
            match = KEY.fullmatch(str(key).removeprefix(PREFIX))
            part = f"{match['factor']}.{match['end']}" if match and match["factor"] else BASE_BIAS
            part = (match and match["magnitude"]) or part
            if not match or part not in (A, B, B_BIAS, BASE_BIAS, MAGNITUDE):
                why = next(why for piece, why in FOREIGN.items() if piece in str(key))
                raise self._error(str(key), f"is not taken, as {why}")
            parts = found.setdefault(match["path"], {})
            if part in parts:
                raise self._error(key, f"is {plain(parts[part])} in another spelling: keep one of the two")
            parts[part] = key
            if part != BASE_BIAS:
                names.setdefault(match["name"] or match["owner"], key)
        if len(names) > 1:
            one, two, *_ = names.values()
            raise self._error(one, f"and {plain(two)} are not of one adapter: keep the keys of one")
        return found

    def _module(self, path: str, keys: dict[str, str]) -> Factors | None:
        """What the checkpoint holds for a module, or None where that is a bias that was not trained."""
        from peft.utils.other import get_pattern_key

        some = next(iter(keys.values()))
        n, k, own = self._layer(path, some)
        setting: dict[str, Any] = {**DEFAULTS, **self.settings}
        ranks: Any = setting.get("rank_pattern") or {}
        alphas: Any = setting.get("alpha_pattern") or {}
        rank: int = ranks.get(get_pattern_key(ranks, path), setting["r"])
        alpha: float = alphas.get(get_pattern_key(alphas, path), setting["lora_alpha"])

        if BASE_BIAS in keys and own is None:
            what = f"is a bias, and the base layer has none{self.other}: give an adapter of this base model"
            raise self._error(keys[BASE_BIAS], what)
        only_bias = setting["bias"] == "all" and keys.keys() == {BASE_BIAS}
        due = set() if only_bias else {A, B, B_BIAS} if setting["lora_bias"] else {A, B}
        due |= {MAGNITUDE} if setting["use_dora"] and not only_bias else set()
        due |= {BASE_BIAS} if setting["bias"] != "none" and own is not None else set()
        for part in sorted(due ^ keys.keys()):
            if part in due:
                what = f"is missing beside {plain(some)}: save the adapter again, or correct its config"
                raise self._error(f"{PREFIX}{path}.{part}", what)
            raise self._error(keys[part], "is not what the config asks for: correct its bias, lora_bias or use_dora")

        shapes = {A: (rank, k), B: (n, rank), B_BIAS: (n,), BASE_BIAS: (n,), MAGNITUDE: (n,)}
        why = f"{plain(path)} has {k} inputs and {n} outputs, and rank {rank} in the config{self.other}"
        of = {part: self._sound(key, shapes[part], why) for part, key in keys.items()}
        trained = of.get(BASE_BIAS)
        bias = None if trained is None or own is None else trained.float() - own.detach().to(trained.device).float()
        if only_bias:
            if bias is not None and bias.any():
                what = "was trained without LoRA beside it: train with bias='lora_only', or LoRA on this module, too"
                raise self._error(some, what)
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
            raise self._error(keys[MAGNITUDE], f"{what}{self.other}")
        rows = Scaled(c, m)
        return Factors(of[A], rows.folded(of[B]), scale, bias, rows)

    def _layer(self, path: str, key: str) -> tuple[int, int, torch.Tensor | None]:
        """The outputs and inputs of a base layer, and its own bias."""
        layer: Any = self.modules.get(path)
        if layer is not None and is_linear(layer):
            return *sizes_of(layer), layer.bias
        if layer is None and self.known and path not in self.known:
            what = f"is of a module that the model does not have{self.other}: give an adapter of this base model"
            raise self._error(key, what)
        train = "train with bias='lora_only'" if self.settings.get("bias") == "all" else "train LoRA without it"
        what = f"is of a module that the bank was not asked to hold: ask it to, if that is a linear, or {train}"
        raise self._error(key, what)

    def _sound(self, key: str, shape: tuple[int, ...], why: str) -> torch.Tensor:
        tensor = self.tensors[key]
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise self._error(key, "is no dense tensor with values: give one")
        if tensor.dtype not in DTYPE_NAMES:
            raise self._error(key, f"is of {tensor.dtype}: save it as float32, bfloat16 or float16")
        if tensor.shape != shape:
            what = f"has the shape {list(tensor.shape)} and needs {list(shape)}, as {why}"
            raise self._error(key, f"{what}: give an adapter of this base model, with its own config")
        if not tensor.isfinite().all():
            raise self._error(key, "holds NaN or infinity: save the adapter from a step that had not diverged")
        return tensor.detach()
