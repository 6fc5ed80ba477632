"""The model that actions are done to, and how an action notes its row of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from tests.graphs import randomise

VOCABULARY, WIDTH = 48, 32


class Small(nn.Module):
    """What the actions touch, in a model that compiles in a moment: an embedding, norms, projections, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop, self.o = nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.hook = self.norm.register_forward_hook(lambda module, given, made: made * 1.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids) + self.shift
        x = self.norm(h)
        mixed = torch.tanh(self.q(x).to(h.dtype)) * self.k(x).to(h.dtype)
        return self.head((h + self.drop(self.o(mixed))).to(self.head.weight.dtype))


def lora(rank: int = 4, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q", "k", "o"], **settings})


def small(dora: bool = False, seed: int = 0) -> peft.PeftModel:
    """`Small` with two adapters, "default" and "other", of which the first is active; one where it is DoRA's."""
    model = peft.get_peft_model(Small(seed), lora(use_dora=dora))
    if not dora:
        model.add_adapter("other", lora(3))
    return randomise(model.eval(), seed, scale=0.3)


def ids(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % VOCABULARY


@dataclass
class Call:
    """How the next call is made, where an action is of the call and not of the model."""

    ids: torch.Tensor
    under: Callable[[], Any] = torch.no_grad


Action = Callable[[Any], Any]
"""Changes a model in place; may return a `Call`, or a context manager in which the next call is made."""

GROUPS: dict[str, dict[str, Action]] = {}


def row(group: str, words: str, dora: bool = False) -> Callable[[Action], Action]:
    def note(action: Action) -> Action:
        GROUPS.setdefault(group, {})[words] = action
        action.dora = dora  # type: ignore[attr-defined]
        return action

    return note


def base(model: Any) -> Small:
    found: Any = model
    while not isinstance(found, Small):
        found = found.base_model.model if isinstance(found, peft.PeftModel) else found.model
    return found


def factors(model: Any, adapter: str = "default") -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f".{adapter}." in name]


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
