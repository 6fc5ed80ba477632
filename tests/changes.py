"""What a user may do to parameters between two calls, for tests of whether the next one shows it."""

from __future__ import annotations

import torch


def factors(model):
    """The parameters of LoRA (DoRA's magnitudes too) and LoHa."""
    return [p for name, p in model.named_parameters() if "lora_" in name or "hada_" in name]


def in_place(model):
    with torch.no_grad():
        for p in factors(model):
            p.mul_(1.2)


def through_data(model):
    for p in factors(model):
        p.data.mul_(-0.85)


def assigned_data(model):
    for p in factors(model):
        p.data = p.data.clone() * 1.05


def assigned_data_of_all(model):
    for p in model.parameters():
        p.data = p.data.clone() * 1.04


def fused_adamw(model):
    step(model, torch.optim.AdamW(factors(model), lr=0.03, fused=True))


def foreach_sgd(model):
    step(model, torch.optim.SGD(factors(model), lr=0.02, foreach=True))


def step(model, optimizer):
    for p in factors(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in factors(model):
        p.grad = None


def loaded(model):
    model.load_state_dict({name: value * 0.96 for name, value in model.state_dict().items()})


def moved(model):
    model.to(torch.bfloat16)
    model.to(torch.float32)  # other storage, rounded numbers
    with torch.no_grad():
        for p in factors(model):
            p.add_(0.02)


def from_inference_mode(model):
    with torch.inference_mode():
        fresh = [p.detach().clone() * 0.9 for p in factors(model)]
    for p, new in zip(factors(model), fresh, strict=True):
        p.data.copy_(new)
