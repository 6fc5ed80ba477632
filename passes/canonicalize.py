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
    of_parameters,
    prims,
    same_sizes,
    shape,
    transposed,
)


def run(graph: Graph, context: Context) -> None:
    for target in (aten.bmm.default, aten.baddbmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _unbatch(graph, context, node)
    targets = (aten.mm.default, aten.addmm.default)
    products = [node for target in targets for node in graph.find_nodes(op="call_function", target=target)]
    casts: dict[tuple[Node, torch.dtype], Node] = {}
    for node in sorted(products):
        _canonicalize(graph, context, node, casts)


def _canonicalize(graph: Graph, context: Context, node: Node, casts: dict[tuple[Node, torch.dtype], Node]) -> None:
    bias, x, right = (None, *args(node)) if node.target is aten.mm.default else args(node)[:3]
    weight = transposed(right)
    if weight is None and not of_parameters(right):
        return  # a product of two activations is no linear
    if weight is None:
        # [in, out], as GPT-2's Conv1D keeps it and many write their factors, or a sum of such
        with graph.inserting_before(node):
            weight = context.insert(aten.permute.default, (right, [1, 0]), node, right.meta["val"].permute(1, 0))
    if bias is not None and not _plain(node, bias):
        node = _take_apart(graph, context, node)
        bias = None
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


def _plain(node: Node, bias: Node) -> bool:
    """Whether an addmm is a linear with a bias, and nothing more."""
    return same_sizes(shape(bias), shape(node)[1:]) and not {"alpha", "beta"} & node.kwargs.keys()


def _take_apart(graph: Graph, context: Context, node: Node) -> Node:
    """``beta c + alpha x W'`` as the sum that it is; its product."""
    c, x, right = args(node)
    with graph.inserting_before(node):
        product = context.insert(aten.mm.default, (x, right), node, node.meta["val"])
        total = _affine(context, c, product, node)
    context.replace(node, total)
    context.erase(node)
    return product


def _unbatch(graph: Graph, context: Context, node: Node) -> None:
    """A batched product with one matrix for all of the batch is a linear."""
    x, right = args(node)[-2:]
    source = args(right)[0] if is_call(right, aten.expand.default) else None
    if source is None or len(shape(source)) != 2 or not of_parameters(source):
        return
    with graph.inserting_before(node):
        weight = transposed(source)
        if weight is None:
            weight = context.insert(aten.permute.default, (source, [1, 0]), node, source.meta["val"].permute(1, 0))
        new = context.insert(linear, (x, weight), node, node.meta["val"])
        if node.target is aten.baddbmm.default:
            new = _affine(context, args(node)[0], new, node)
    context.replace(node, new)
    context.erase(node)
    context.matched()


def _affine(context: Context, c: Node, product: Node, node: Node) -> Node:
    """``beta c + alpha product``."""
    if node.kwargs.get("alpha", 1) != 1:
        product = context.insert(aten.mul.Tensor, (product, node.kwargs["alpha"]), node, node.meta["val"])
    if node.kwargs.get("beta", 1) != 1:
        c = context.insert(aten.mul.Tensor, (c, node.kwargs["beta"]), node, c.meta["val"])
    return context.insert(aten.add.Tensor, (c, product), node, node.meta["val"])
