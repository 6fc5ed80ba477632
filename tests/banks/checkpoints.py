"""A small model of Linears and Conv1Ds, with LoRA by PEFT as a judge, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gawscompile.banks.checkpoints import Adapter

PREFIX = "base_model.model."
TARGETS = ["q", "up", "down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 12, bias=False)
        self.up = nn.Linear(12, 20)
        self.down = Conv1D(16, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.q(x))))


class Model(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(16, 16, 1, bias=False)
        self.norm = nn.LayerNorm(16) if norm else nn.Identity()
        self.gate = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.gate(self.norm(x)))


def base(norm: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model(norm).eval()
    with torch.no_grad():
        for block in model.layers:
            block.down.bias.normal_()  # it begins as zeros
    return model


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def adapted(norm: bool = True, seed: int = 1, **settings: Any) -> peft.PeftModel:
    """A model with a random adapter on every `q`, `up` and `down`, if nothing else is asked for."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}
    model = peft.get_peft_model(base(norm), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.add_(torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(std=0.3)
            elif name.endswith("base_layer.bias") and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


IDS = torch.arange(8).view(2, 4)


@torch.no_grad()
def served(adapter: Adapter, model: nn.Module) -> torch.Tensor:
    """What the base model says when each module adds the adapter's part."""
    handles = []
    for path, factors in adapter.factors.items():

        def add(module: Any, args: Any, y: torch.Tensor, f: Any = factors) -> torch.Tensor:
            product = y if module.bias is None else y - module.bias
            y = y + f.scale * (args[0] @ f.a.T @ f.b.T)
            y = y if f.scaled is None else y + (f.scaled.c - 1) * product
            return y if f.bias is None else y + f.bias

        handles.append(model.get_submodule(path).register_forward_hook(add))
    try:
        return model(IDS)
    finally:
        for handle in handles:
            handle.remove()


def saved(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
