"""Functional collectives in a graph: ``wait_tensor(all_reduce(x, "sum", group))``."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from gawscompile.analysis.reading import args, is_call

ADDING = ("sum", "avg")
"""Reductions that are linear."""


def is_collective(node: Any) -> bool:
    target = node.target if isinstance(node, Node) else None
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional"


def all_reduces() -> Any:
    """The operation. Raises `AttributeError` where torch was built without torch.distributed."""
    return torch.ops._c10d_functional.all_reduce.default


def waits() -> Any:
    """What gives a collective's result."""
    return torch.ops._c10d_functional.wait_tensor.default


def reduction(node: Any) -> Node | None:
    """The all-reduce whose result `node` is."""
    if not is_collective(node) or not is_call(node, waits()):
        return None
    made: Node = args(node)[0]
    return made if is_call(made, all_reduces()) else None
