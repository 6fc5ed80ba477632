"""Tiny models with GAWS or GAWS-D adapters, always with random numbers in them: zeros would hide a lost adapter."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from gawscompile.adapters import GAWSConfig, GAWSDConfig
from tests.architectures import ARCHITECTURES

KINDS = {"gaws": GAWSConfig, "gawsd": GAWSDConfig}
SPLITS: dict[str, dict[str, Any]] = {"gaws": {"input_splits": 4}, "gawsd": {"input_split_dim": 4}}
"""Splits that fit every projection of the models here."""
NAMES = ("Llama", "GPT-2", "RoBERTa", "T5")


def config(kind: str, **settings: Any) -> Any:
    return KINDS[kind](**{"target_modules": "all-linear", **SPLITS[kind], **settings})


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.1, only: str = "") -> Any:
    """Every adapter parameter (of the adapter `only`) random, diag around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{leaf}.{only}" in name for leaf in ("GAWS", "GAWSD", "diag")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (".diag." in name))
    return model


def base(name: str = "Llama") -> Any:
    torch.manual_seed(0)
    return ARCHITECTURES[name].make().eval()


def adapted(kind: str, name: str = "Llama", seed: int = 0, **settings: Any) -> Any:
    return randomise(peft.get_peft_model(base(name), config(kind, **settings)).eval(), seed)


@torch.no_grad()
def run(model: Any, name: str = "Llama", **keywords: Any) -> torch.Tensor:
    """The first output of `model` for its architecture's inputs."""
    architecture = ARCHITECTURES[name]
    return model(**architecture.inputs(), **architecture.calls, **keywords)[0]


class Net(nn.Module):
    """One linear ``proj`` and what is done with it, for tests of single layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def single(kind: str, layer: nn.Module, **settings: Any) -> Any:
    """`layer` alone with a random adapter, in the layer's dtype."""
    made = config(kind, **{"target_modules": ["proj"], **settings})
    return randomise(peft.get_peft_model(Net(layer), made, autocast_adapter_dtype=False).eval())
