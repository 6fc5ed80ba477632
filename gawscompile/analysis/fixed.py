"""Which nodes parameters alone determine."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import is_parameter


def fixed_nodes(graph: Graph, stored: Container[Node]) -> set[Node]:
    """The nodes that are computed from stored tensors (parameters and buffers) alone, the same in every call."""
    fixed: set[Node] = set()
    constant: set[Node] = set()  # an eye, say
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            constant.add(node)
        if node.op != "call_function" or not all(n in stored or n in fixed or n in constant for n in sources):
            continue
        if not _pure(node.target) or not _static(node.meta.get("val")):
            continue
        (constant if all(n in constant for n in sources) else fixed).add(node)
    return fixed


def _pure(target: Any) -> bool:
    """Whether the same is computed of the same: nothing random, nothing that was never written."""
    tags = getattr(target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and "empty" not in str(target)


def _static(found: Any) -> bool:
    """Whether all its sizes are known."""
    tensors = found if isinstance(found, (list, tuple)) else [found]
    return all(isinstance(t, torch.Tensor) and all(isinstance(n, int) for n in t.shape) for t in tensors)


def cone(leaf: Node) -> list[Node]:
    """The nodes that a fixed one is computed by, itself last."""
    inside: set[Node] = set()
    pending = [leaf]
    while pending:
        node = pending.pop()
        if node not in inside and not is_parameter(node):
            inside.add(node)
            pending += node.all_input_nodes
    return sorted(inside)
