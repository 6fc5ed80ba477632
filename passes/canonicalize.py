"""One spelling for a linear.

before::

    permute = aten.permute(arg4_1, [1, 0])
    view_1  = aten.view(mul_4, [5, 64])
    mm      = aten.mm(view_1, permute)
    view_2  = aten.view(mm, [1, 5, 64])

after::

    linear  = operators.linear(mul_4, arg4_1)

``addmm`` gives a linear with its bias. The activation is named before any view that only merges its leading
dimensions, so that projections of one activation are seen to be so.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from gawscompile.debug.records import Reason
from gawscompile.operators import linear
from gawscompile.passes.context import (
    VIEWS,
    Context,
    args,
    aten,
    base_activation,
    dtype,
    empty_like,
    is_call,
    is_parameter,
    prims,
    same_sizes,
    shape,
    through_casts,
    transposed,
    value,
)


def run(graph: Graph, context: Context) -> None:
    targets = (aten.mm.default, aten.addmm.default)
    products = [node for target in targets for node in graph.find_nodes(op="call_function", target=target)]
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    for node in sorted(products):
        _canonicalize(graph, context, node, casts)


def _canonicalize(graph: Graph, context: Context, node: Node, casts: dict[tuple[Node, torch.dtype], Node]) -> None:
    bias, x, right = (None, *args(node)) if node.target is aten.mm.default else args(node)[:3]
    weight = transposed(right)
    if weight is None:
        if is_parameter(through_casts(right)) and value(right) is not None:
            # [in, out] as GPT-2's Conv1D keeps it: a linear, but not one we have kernels for
            entry = context.found(node, right)
            entry.shape = (shape(right)[1], shape(right)[0])
            context.reject(entry, Reason.WEIGHT_LAYOUT)
        return
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return
    if bias is not None and (value(bias) is None or not same_sizes(shape(bias), shape(node)[1:])):
        return
    activation = base_activation(x)
    if is_call(activation, prims.convert_element_type.default):
        # autocast casts anew for every reader; siblings should be seen to read one activation
        activation = casts.setdefault((args(activation)[0], dtype(activation)), activation)
    with graph.inserting_before(node):
        sizes = (*shape(activation)[:-1], shape(weight)[0])
        reads = (activation, weight) if bias is None else (activation, weight, bias)
        new = context.insert(linear, reads, node, empty_like(x, sizes, dtype(node)))
        for user in list(node.users):
            if is_call(user, *VIEWS) and same_sizes(shape(user), sizes):
                context.replace(user, new)
                context.erase(user)
        if node.users:
            flat = new
            if not same_sizes(sizes, shape(node)):
                rows = args(x)[1][:-1]
                flat = context.insert(
                    aten.view.default, (new, [*rows, shape(weight)[0]]), node, empty_like(x, shape(node), dtype(node))
                )
            context.replace(node, flat)
    context.erase(node)
    context.matched()
