"""Gradients of factors that read one activation become one product.

before, of the LoRAs of k and q, whose x ``[m, k]`` is one, with ``v_i = s B_i' dy_i`` ``[m, r_i]``::

    dA_k = aten.mm(aten.permute(v_k, [1, 0]), x)
    dA_q = aten.mm(aten.permute(v_q, [1, 0]), x)

after::

    both = aten.mm(aten.permute(aten.cat([v_k, v_q], 1), [1, 0]), x)
    dA_k = aten.slice(both, 0, 0, r_k)
    dA_q = aten.slice(both, 0, r_k, r_k + r_q)

x is read once. The gradients are rows of one matrix and lie in its memory, as Inductor drops a copy of rows. Two
adapters of one layer share its gradient dy likewise, once `turn_products` has written dB as a product with dy. The
product stands where its last member stood, and what is returned of the others comes after it; a member that the
backward itself reads before that stays alone. So does one whose x is its own, as with dropout.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.identity import base_activation, unwidened
from gawscompile.analysis.reading import args, aten, dtype, empty_like, shape, transposed
from gawscompile.passes.context import Context, backward
from gawscompile.passes.group_siblings import TAGS

NARROW = 64
"""Rows of a member, at most: beside wider products, x is a small part of what is read."""


def run(graph: Graph, context: Context) -> None:
    if not context.training:
        return
    readers: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        if backward(node) and _narrow(node) and context.looks_at(node):
            left, x = args(node)
            readers[(_activation(x), dtype(left), *(str(node.meta.get(tag)) for tag in TAGS))].append(node)
    for members in readers.values():
        tails = {node: _tail(node, members[-1]) for node in members}
        members = [node for node in members if tails[node] is not None]
        if len(members) > 1 and context.allows(*members):
            _join(graph, context, members, sorted({node for member in members for node in tails[member] or ()}))


def _activation(x: Node) -> Node:
    """What `x` is, under views and exact casts: each sibling casts x for itself where factors are fp32 beside bf16."""
    while (found := unwidened(base_activation(x))) is not x:
        x = found
    return x


def _tail(node: Node, last: Node) -> list[Node] | None:
    """What is made of `node` before `last`, in order, where the graph's outputs alone come of it."""
    found, pending = dict[Node, None](), [node]
    while pending:
        early = [user for user in pending.pop().users if user < last and user not in found]
        if any(user.is_impure() for user in early):
            return None
        found |= dict.fromkeys(early)
        pending += early
    ends = all(user in found or user.op == "output" for made in found for user in made.users)
    return list(found) if ends else None


def _narrow(node: Node) -> bool:
    """Whether it is the product of a narrow matrix's transpose."""
    rows, _ = shape(node)
    return isinstance(rows, int) and rows <= NARROW and transposed(args(node)[0]) is not None


def _join(graph: Graph, context: Context, members: list[Node], tails: list[Node]) -> None:
    last, x = members[-1], args(members[-1])[1]
    parts = [part for node in members if (part := transposed(args(node)[0]))]
    ends = [0, *itertools.accumulate(shape(node)[0] for node in members)]
    with graph.inserting_before(last):
        sizes = (shape(x)[0], ends[-1])
        wide = context.insert(aten.cat.default, (parts, 1), last, empty_like(last, sizes, dtype(parts[0])))
        product = (context.transpose(wide, last), x)
        sizes = (ends[-1], shape(x)[1])
        both = context.insert(aten.mm.default, product, last, empty_like(last, sizes, dtype(last)))
        for node, (start, end) in zip(members, itertools.pairwise(ends), strict=True):
            rows = context.insert(aten.slice.Tensor, (both, 0, start, end), node, both.meta["val"][start:end])
            context.replace(node, rows)
    for node in tails:
        graph.output_node().prepend(node)
        context.touch(node)
    for node in members:
        context.erase(node)
    context.matched()
