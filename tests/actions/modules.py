"""Actions on parameters' dtypes, shapes and memory, and on modules."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from tests.actions.table import VOCABULARY, WIDTH, Small, base, factors, row

METADATA = "Dtypes, shapes, memory"


@row(METADATA, "the embedding to bf16")
def _(model: Any) -> None:
    base(model).embedding.to(torch.bfloat16)


@row(METADATA, "the head to fp64")
def _(model: Any) -> None:
    base(model).head.to(torch.float64)


@row(METADATA, "adapters alone to bf16")
def _(model: Any) -> None:
    for p in factors(model):
        p.data = p.data.to(torch.bfloat16)


@row(METADATA, "the model to bf16")
def _(model: Any) -> None:
    model.to(torch.bfloat16)


@row(METADATA, "the model to bf16 and back")
def _(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)
    for p in factors(model):
        p.data.mul_(1.5)


@row(METADATA, "the vocabulary resized")
def _(model: Any) -> None:
    small = base(model)
    small.embedding.weight = nn.Parameter(torch.cat([small.embedding.weight, small.embedding.weight[:8]]).detach())
    small.head.weight = nn.Parameter(torch.cat([small.head.weight, small.head.weight[:8]]).detach())


@row(METADATA, "a weight laid out by columns")
def _(model: Any) -> None:
    for layer in (base(model).q.base_layer, base(model).head):
        layer.weight.data = layer.weight.data.t().contiguous().t()


@row(METADATA, "a weight that is a part of a larger tensor")
def _(model: Any) -> None:
    for layer in (base(model).q.base_layer, base(model).head):
        layer.weight.data = torch.cat([torch.zeros(3, WIDTH), layer.weight.data * 2.0])[3:]


@row(METADATA, "a weight of another width")
def _(model: Any) -> None:
    base(model).head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH + 1))


MODULES = "Modules"


@row(MODULES, "a linear replaced by one like it")
def _(model: Any) -> None:
    base(model).head = nn.Linear(WIDTH, VOCABULARY, bias=False)


@row(MODULES, "a linear replaced by one with a bias")
def _(model: Any) -> None:
    base(model).head = nn.Linear(WIDTH, VOCABULARY)


@row(MODULES, "a linear replaced by another kind of module")
def _(model: Any) -> None:
    base(model).head = nn.Sequential(nn.Linear(WIDTH, VOCABULARY), nn.Tanh())
    base(model).head.weight = base(model).head[0].weight


@row(MODULES, "an adapted linear's base replaced")
def _(model: Any) -> None:
    base(model).q.base_layer = nn.Linear(WIDTH, WIDTH)


@row(MODULES, "a bias taken away")
def _(model: Any) -> None:
    base(model).o.base_layer.bias = None


@row(MODULES, "a bias added")
def _(model: Any) -> None:
    base(model).k.base_layer.bias = nn.Parameter(torch.ones(WIDTH))


@row(MODULES, "a forward hook on a linear")
def _(model: Any) -> None:
    base(model).head.register_forward_hook(lambda module, given, made: made * 2.0)


@row(MODULES, "a forward hook on an adapted linear's base")
def _(model: Any) -> None:
    base(model).q.base_layer.register_forward_hook(lambda module, given, made: made * 2.0)


@row(MODULES, "a pre-hook on a norm")
def _(model: Any) -> None:
    base(model).norm.register_forward_pre_hook(lambda module, given: (given[0].tanh(),))


@row(MODULES, "a hook that was there taken away")
def _(model: Any) -> None:
    base(model).hook.remove()


@row(MODULES, "a norm's eps")
def _(model: Any) -> None:
    base(model).norm.eps = 3.0


@row(MODULES, "one linear's `forward` overridden")
def _(model: Any) -> None:
    base(model).head.forward = lambda x: x @ base(model).head.weight.T * 3.0


@row(MODULES, "a parametrization registered")
def _(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(base(model).head)
    with torch.no_grad():
        base(model).head.parametrizations.weight.original0.mul_(2.0)


@row(MODULES, "`train()` with a dropout of 0")
def _(model: Any) -> None:
    model.train()
    base(model).drop.p = 0.0


@row(MODULES, "`torch.func.functional_call` with other parameters")
def _(model: Any) -> Any:
    return _functional(base(model))


@contextlib.contextmanager
def _functional(small: Small) -> Any:
    """What `functional_call` does to a model for the time of a call."""
    before = small.head._parameters["weight"]
    small.head._parameters["weight"] = before * 2.0
    try:
        yield
    finally:
        small.head._parameters["weight"] = before
