"""The gradient of a tall, narrow factor is computed as that of a wide, flat one.

before, of a LoRA's B ``[n, r]``, whose layer has the gradient dy ``[m, n]``::

    dB = aten.mm(aten.permute(dy, [1, 0]), u)

after::

    dB = aten.clone(aten.permute(aten.mm(aten.permute(u, [1, 0]), dy), [1, 0]), contiguous)

The vendor library for CPUs then reads dy by rows, in place of columns. What is copied has as few columns as the adapter
has ranks. Products on other devices stay as they are.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, aten, dtype, empty_like, shape, transposed
from gawscompile.passes.context import Context, backward
from gawscompile.planning.devices import on_cpu

NARROW = 64
"""Columns of a product that is turned, at most; it has four times as many rows at least."""


def run(graph: Graph, context: Context) -> None:
    if not context.training:
        return
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        if not backward(node) or not context.looks_at(node):
            continue
        wide, narrow = args(node)
        dy = transposed(wide)
        if dy is None or not _tall(node) or not context.allows(node):
            continue
        with graph.inserting_before(node):
            product = (context.transpose(narrow, node), dy)
            flat = context.insert(aten.mm.default, product, node, empty_like(node, shape(node)[::-1], dtype(node)))
            new = context.contiguous(context.transpose(flat, node), node)
        context.replace(node, new)
        context.erase(node)
        context.matched()


def _tall(node: Node) -> bool:
    n, r = shape(node)
    numbers = isinstance(n, int) and isinstance(r, int)
    return numbers and r <= NARROW and n >= 4 * r and on_cpu(node)
