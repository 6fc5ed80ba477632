"""Functional collectives in a graph: ``wait_tensor(all_reduce(x, "sum", group))``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, aten, is_call, shape

ADDING = ("sum", "avg")
"""Reductions that are linear."""


def is_collective(node: Any) -> bool:
    """Whether it is one, in a graph of Dynamo's (whose operations have no overload yet) or of AOTAutograd's."""
    target = node.target if isinstance(node, Node) else None
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional"


def all_reduces() -> Any:
    """The operation. Raises `AttributeError` where torch was built without torch.distributed."""
    return torch.ops._c10d_functional.all_reduce.default


def reduce_scatters() -> Any:
    """Of the sum, each rank gets a part: along the first dimension."""
    return torch.ops._c10d_functional.reduce_scatter_tensor.default


def waits() -> Any:
    """What gives a collective's result."""
    return torch.ops._c10d_functional.wait_tensor.default


def listed(graph: Graph) -> list[str]:
    """What each collective of a graph does, in which group: ``all_reduce sum 0``. Sizes may differ by rank."""
    found = []
    for node in graph.nodes:
        if is_collective(node) and not is_call(node, waits()):
            name = str(node.target._schema.name).rpartition("::")[2]
            found.append(" ".join([name, *(one for one in node.args if isinstance(one, str))]))
    return found


def reduction(node: Any) -> Node | None:
    """The all-reduce or reduce-scatter whose result `node` is."""
    if not is_collective(node) or not is_call(node, waits()):
        return None
    made: Node = args(node)[0]
    return made if is_call(made, all_reduces(), reduce_scatters()) else None


def rearranged(node: Node) -> tuple[Node, Node] | None:
    """What a reduce-scatter along another dimension than the first is given: ``cat(split(x, size, dim))`` along the
    first, as (x, split)."""
    if not is_call(node, aten.cat.default) or (len(args(node)) > 1 and args(node)[1] != 0):
        return None
    parts = args(node)[0]
    split: Any = args(parts[0])[0] if parts and is_call(parts[0], operator.getitem) else None
    if not is_call(split, aten.split.Tensor) or len(args(split)) != 3 or len(parts) != len(split.meta["val"]):
        return None
    if any(not is_call(one, operator.getitem) or args(one) != (split, i) for i, one in enumerate(parts)):
        return None
    alone = all(len(one.users) == 1 for one in (node, *parts)) and len(split.users) == len(parts)
    features = len(shape(args(split)[0])) - 1
    return (args(split)[0], split) if alone and args(split)[2] not in (-1, features) else None
