"""Actions on numbers of parameters."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from tests.actions.table import base, factors, row

NUMBERS = "Numbers of parameters"


@row(NUMBERS, "an adapter written in place")
def _(model: Any) -> None:
    with torch.no_grad():
        for p in factors(model):
            p.mul_(1.5)


@row(NUMBERS, "an adapter written through `.data`")
def _(model: Any) -> None:
    for p in factors(model):
        p.data.mul_(-0.5)


@row(NUMBERS, "an adapter written through a numpy view")
def _(model: Any) -> None:
    for p in factors(model):
        p.detach().numpy()[...] *= 1.5


@row(NUMBERS, "one number of an adapter written")
def _(model: Any) -> None:
    for p in factors(model):
        p.data.view(-1)[-1] += 5.0


@row(NUMBERS, "an adapter given other memory (`p.data = x`)")
def _(model: Any) -> None:
    for p in factors(model):
        p.data = p.data * 1.5


@row(NUMBERS, "an adapter written by another thread")
def _(model: Any) -> None:
    thread = threading.Thread(target=lambda: [p.data.mul_(1.5) for p in factors(model)])
    thread.start()
    thread.join()


@row(NUMBERS, "an adapter written under `inference_mode`")
def _(model: Any) -> None:
    with torch.inference_mode():
        for p in factors(model):
            p.mul_(1.5)


@row(NUMBERS, "a step of fused AdamW")
def _(model: Any) -> None:
    _step(model, torch.optim.AdamW(factors(model), lr=0.2, fused=True))


@row(NUMBERS, "a step of SGD with `foreach`")
def _(model: Any) -> None:
    _step(model, torch.optim.SGD(factors(model), lr=0.1, foreach=True))


def _step(model: Any, optimizer: Any) -> None:
    for p in factors(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


@row(NUMBERS, "`load_state_dict`")
def _(model: Any) -> None:
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})


@row(NUMBERS, "`load_state_dict(assign=True)`")
def _(model: Any) -> None:
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()}, assign=True)


@row(NUMBERS, "a parameter replaced by a new one")
def _(model: Any) -> None:
    for name in ("q", "o"):
        layer = getattr(base(model), name).base_layer
        layer.weight = nn.Parameter(layer.weight.detach() * -1.0, requires_grad=False)


@row(NUMBERS, "a norm's weight and a buffer written through `.data`")
def _(model: Any) -> None:
    base(model).norm.weight.data.mul_(1.5)
    base(model).shift.data.add_(1.0)


@row(NUMBERS, "a buffer replaced")
def _(model: Any) -> None:
    base(model).shift = base(model).shift + 1.0


@row(NUMBERS, "parameters moved to shared memory and written there")
def _(model: Any) -> None:
    model.share_memory()
    for p in factors(model):
        p.data.mul_(1.5)


@row(NUMBERS, "a base weight written in place")
def _(model: Any) -> None:
    with torch.no_grad():
        base(model).q.base_layer.weight.mul_(2.0)


@row(NUMBERS, "a row of a DoRA's base weight written through `.data`", dora=True)
def _(model: Any) -> None:
    base(model).q.base_layer.weight.data[3] *= 40.0


@row(NUMBERS, "a row of a DoRA's base weight written through numpy", dora=True)
def _(model: Any) -> None:
    base(model).q.base_layer.weight.detach().numpy()[3] *= 40.0


@row(NUMBERS, "one number of a DoRA's base weight written", dora=True)
def _(model: Any) -> None:
    with torch.no_grad():
        base(model).o.base_layer.weight[5, 7] += 30.0


@row(NUMBERS, "a DoRA's magnitude written through `.data`", dora=True)
def _(model: Any) -> None:
    for p in factors(model):
        p.data.mul_(1.5)
