"""Ways to damage a checkpoint, and the error that is due."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gawscompile.banks.checkpoints import CONFIG, WEIGHTS, BankError, read
from tests.banks.checkpoints import PREFIX, base, linears


@dataclass
class Checkpoint:
    """A good folder's content. A damage changes it before it is written, or gives back what to do to the files."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


Damage = Callable[[Checkpoint], Callable[[Path], Any] | None]


def key(path: str, end: str = "lora_A.weight") -> str:
    return f"{PREFIX}{path}.{end}"


Q, UP = key("layers.0.q"), key("layers.1.up")
QB = key("layers.0.q", "lora_B.weight")
UP_BIAS = key("layers.1.up", "base_layer.bias")


def says(**settings: Any) -> Damage:
    return lambda good: good.config.update(settings)


def without(*names: str) -> Damage:
    return lambda good: [good.config.pop(name) for name in names] and None


def holds(at: str, tensor: Any) -> Damage:
    return lambda good: good.tensors.update({at: tensor})


def lacks(*keys: str) -> Damage:
    return lambda good: [good.tensors.pop(one) for one in keys] and None


def turned(at: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda good: good.tensors.update({at: change(good.tensors[at]).contiguous()})


def file(name: str, change: Callable[[bytes], bytes] | None) -> Damage:
    def apply(folder: Path) -> None:
        at = folder / name
        content = at.read_bytes()
        at.unlink()
        if change is not None:
            at.write_bytes(change(content))

    return lambda good: apply


def all_of(*damages: Damage) -> Damage:
    def apply(good: Checkpoint) -> None:
        for damage in damages:
            damage(good)

    return apply


def torch_saved(old: bool = False, name: str = WEIGHTS) -> Damage:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=not old)

    return lambda good: apply


def put(at: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[at] = value
        return tensor

    return change


ones = torch.ones


HELD = linears(base())
del HELD["head"]
KNOWN = [path for path, _ in base().named_modules()]


def damaged(whole: Path, damage: Damage, folder: Path, modules: int = 6) -> Path:
    assert len(read(whole, HELD, known=KNOWN, base="toy").factors) == modules  # it is the damage that is refused
    shutil.copytree(whole, folder)
    checkpoint = Checkpoint(json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS))
    after = damage(checkpoint)
    (folder / CONFIG).write_text(json.dumps(checkpoint.config))
    save_file(checkpoint.tensors, folder / WEIGHTS)
    if after is not None:
        after(folder)
    return folder


def refused(folder: Path, name: str, parts: list[str]) -> None:
    with pytest.raises(BankError) as error:
        read(folder, HELD, known=KNOWN, base="toy")
    for part in (str(folder / name), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
