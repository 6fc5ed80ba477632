"""Adapters as they come: a folder that PEFT saved, a state dict or a `peft.PeftModel`, and their settings.

Nothing here is of one type of adapter. What each type's reader takes besides is in `checkpoints` (LoRA, DoRA) and in
`kronecker`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gawscompile.ir.records import plain

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a")
"""How files of torch.save begin, today's and old ones. A safetensors file begins with the length of its header."""

PREFIX = "base_model.model."

LARGEST = torch.finfo(torch.float32).max


class BankError(ValueError):
    """What a bank cannot take; the message names the file, key or module, and the remedy."""


# ---- rules of settings --------------------------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is right in words."""


def several(kind: type, what: str) -> Rule:
    def right(value: Any) -> bool:
        return value is None or all(type(one) is kind for one in (value if isinstance(value, list) else [value]))

    return right, f"{what} or a list of them"


def by_pattern(rule: Rule) -> Rule:
    def right(value: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(rule[0], value.values())))

    return right, f"{rule[1]} for each pattern"


RANK: Rule = (lambda value: type(value) is int and value > 0, "a whole number above 0")
FINITE: Rule = (lambda value: type(value) in (int, float) and abs(value) <= LARGEST, "a finite number")
FLAG: Rule = (lambda value: type(value) is bool, "true or false")
NAMES = several(str, "a pattern")

TARGETS: dict[str, Rule] = {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "layers_to_transform": several(int, "a whole number"),
}
"""Which modules an adapter is for."""

UNHEARD = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
"""Settings of all types that change no result."""


@dataclass(frozen=True)
class Kind:
    """A type of adapter: `needed` settings, those that its reader follows (`honoured`), and those without effect
    (`inert`): in evaluation, or without another one that is refused. All others must have their `defaults`. So what
    PEFT adds one day is refused, and not overlooked."""

    words: str
    needed: tuple[str, ...]
    honoured: Mapping[str, Rule]
    inert: tuple[str, ...]
    defaults: Callable[[], dict[str, Any]]


# ---- sources ------------------------------------------------------------------------------------------------

Opened = tuple[str, str, Any, Callable[[], Mapping[str, torch.Tensor]]]
"""What messages call the tensors and the config, the config, and what reads the tensors once that is found sound."""


def opened(source: Any, config: Any, adapter_name: str) -> Opened:
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


def settings_of(at: str, config: Any, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """A config as plain data, of which every setting is understood. `kinds` by PEFT's name of them."""
    import peft

    try:
        settings = json.loads(json.dumps(config, default=_listed))
    except (TypeError, ValueError, RecursionError) as error:
        why = plain(str(error))
        raise BankError(f"{at} is not plain data ({why}): give strings, numbers, lists and dicts only") from error
    if not isinstance(settings, dict):
        raise BankError(f"{at} is no JSON object: save the adapter again with save_pretrained")
    again = "add it, or save the adapter again with save_pretrained"
    if "peft_type" not in settings:  # the type first, as other types have other settings
        raise BankError(f"{at} has no peft_type: {again}")
    value = settings["peft_type"]
    kind = kinds.get(value) if isinstance(value, str) else None
    if kind is None:
        says = f"{at} says peft_type={plain(repr(value))}"
        raise BankError(f"{says}: it must be {' or '.join(kinds)}, which a bank takes; run others with PEFT")
    defaults = json.loads(json.dumps(kind.defaults(), default=_listed))
    for name in [*kind.needed, *sorted(settings.keys() - {*kind.needed, "peft_type"})]:
        if name not in settings:
            raise BankError(f"{at} has no {name}: {again}")
        value = settings[name]
        says = f"{at} says {plain(name)}={plain(repr(value))}"
        if name in kind.honoured:
            right, what = kind.honoured[name]
            if not right(value):
                raise BankError(f"{says}: it must be {what}")
        elif name not in kind.inert and (value or None) != (defaults.get(name) or None):
            unknown = "" if name in defaults else f", which PEFT {peft.__version__} does not know"
            raise BankError(f"{says}{unknown}: a bank takes plain {kind.words}; train without it, or run it with PEFT")
    return settings


def _listed(value: Any) -> list[Any]:
    """A set, which a `peft.LoraConfig` holds and JSON has no word for."""
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"it holds a {type(value).__name__}")
