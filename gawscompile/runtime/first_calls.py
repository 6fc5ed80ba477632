"""What a layer does in its first call alone, and Dynamo cannot trace.

Where a CPU multiplies bf16 (avx512_bf16), bitsandbytes' linear on 4 bits lays its codes out anew in its first call that
wants no gradient, and puts them in the place of the old ones. Traced, that is a `set_` on an input, which AOTAutograd
refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

log = logging.getLogger("gawscompile")

CAN = "support_avx512bf16_for_cpu"
"""What bitsandbytes' linear says of the CPU, from version 0.49 on."""


def lay_out(model: torch.nn.Module) -> None:
    """Do what first calls without gradients would do to `model`, on a CPU and outside of training. Nothing else of a
    layer changes. Not for a model that may be trained next: bitsandbytes gives no gradient through this layout."""
    for layer in _waiting(model):
        if layer.training or layer.weight.device.type != "cpu":
            continue
        compute = layer.compute_dtype, layer.compute_type_is_set  # an input's dtype decides them, if nobody has
        try:
            with torch.no_grad():
                layer.forward(torch.zeros(1, layer.in_features))
        except Exception as error:  # its own call raises it, if there is one
            log.warning("gaws: bitsandbytes cannot lay a weight out for the CPU: %s", error)
        layer.compute_dtype, layer.compute_type_is_set = compute


@contextmanager
def put_off(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile no layer is laid out for this CPU: calls are traced for another device."""
    waiting = list(_waiting(model))
    for layer in waiting:
        setattr(layer, CAN, False)
    try:
        yield
    finally:
        for layer in waiting:
            setattr(layer, CAN, True)


def say(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Warn where Dynamo's graph lays a weight of bitsandbytes out: no compiler takes such a graph, and torch's error
    does not say why."""
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False))
    for node in gm.graph.find_nodes(op="call_function", target=torch.Tensor.set_):
        if hasattr(given.get(node.args[0]), "quant_state"):
            log.warning(
                "gaws: this is the first call of a model on bitsandbytes' 4 bits, which lays its weights out for the "
                "CPU (%s). That cannot be compiled: call the model once, without gradients, before you compile it.",
                node.args[0],
            )
            return


def _waiting(model: torch.nn.Module) -> Iterator[Any]:
    """Its layers that are not laid out yet."""
    for layer in model.modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and getattr(layer, CAN, False) and not getattr(state, "packing_format_for_cpu", False):
            yield layer
