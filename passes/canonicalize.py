"""One spelling for a linear.

before::

    permute = aten.permute(arg4_1, [1, 0])
    view_1  = aten.view(mul_4, [5, 64])
    mm      = aten.mm(view_1, permute)
    view_2  = aten.view(mm, [1, 5, 64])

after::

    linear  = operators.linear(mul_4, arg4_1)

``addmm`` gives a linear with its bias, ``W @ x'`` the transpose of one, einsum's ``bmm`` of a batch of one a plain one.
The activation is named before any view that only merges its leading dimensions, so that projections of one activation
are seen to be so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.identity import base_activation, reinterpreted
from gawscompile.analysis.reading import (
    ONES,
    PRODUCTS,
    VIEWS,
    args,
    aten,
    dtype,
    empty_like,
    is_call,
    is_parameter,
    of_parameters,
    prims,
    returned,
    shape,
    transposed,
)
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_size, same_sizes
from gawscompile.ir.sums import linear
from gawscompile.passes.context import Context

Casts = dict[tuple[Node, torch.dtype], Node]
"""(what is cast, to which dtype) → the first such cast: autocast casts anew for every reader."""


def run(graph: Graph, context: Context) -> None:
    casts: Casts = {}
    for node in sorted(node for target in PRODUCTS for node in graph.find_nodes(op="call_function", target=target)):
        if not context.looks_at(node):
            continue
        if node.target in (aten.bmm.default, aten.baddbmm.default):
            _unbatch(graph, context, node, casts)
        else:
            _canonicalize(graph, context, node, casts)


def _canonicalize(graph: Graph, context: Context, node: Node, casts: Casts) -> None:
    bias, x, right = (None, *args(node)) if node.target is aten.mm.default else args(node)[:3]
    if not _weighs(context, right):
        columns = transposed(args(right)[0] if is_call(right, aten.clone.default) else right)
        if columns is None:
            return  # a product of two activations is no linear
        if bias is None and _weighs(context, x) and not _looks_like_a_weight(columns):
            if context.allows(node):
                _turn(graph, context, node, x, columns, casts)
            return
        if context.training and not context.of_stored(right):
            return  # nor is one of activations and gradients
    if _refused(context, node) or not context.allows(node):
        return
    if bias is not None and not _plain(node, bias):
        node = _take_apart(graph, context, node)
        bias = None
    _linear(graph, context, node, x, _transpose(graph, context, right, node), bias, casts)


def _weighs(context: Context, node: Node) -> bool:
    """Whether a matrix is a weight. Where there are gradients, these and activations are graph inputs too."""
    return of_parameters(node) and (not context.training or context.of_stored(node))


def _linear(
    graph: Graph, context: Context, node: Node, x: Node, weight: Node, bias: Node | None, casts: Casts
) -> None:
    """Replace `node`, which is ``x weight' + bias``, and the views around it."""
    activation = base_activation(x)
    if is_call(activation, prims.convert_element_type.default):
        activation = casts.setdefault((args(activation)[0], dtype(activation)), activation)
    rows = _rows(x)
    if rows is not None and -1 in rows and shape(weight)[0] == 0:
        rows = None  # of no numbers no size follows
    if rows is None or not isinstance(shape(weight)[0], int):
        activation = x
    with graph.inserting_before(node):
        sizes = (*shape(activation)[:-1], shape(weight)[0])
        reads = (activation, weight) if bias is None else (activation, weight, bias)
        new = context.insert(linear, reads, node, empty_like(x, sizes, dtype(node)))
        _adopt(context, node, new)
        if node.users:
            flat = new
            if rows is not None and not same_sizes(sizes, shape(node)):
                value = empty_like(x, shape(node), dtype(node))
                flat = context.insert(aten.view.default, (new, [*rows, shape(weight)[0]]), node, value)
            context.replace(node, flat)
    context.erase(node)
    context.matched()


def _rows(x: Node) -> list[Any] | None:
    """x's leading sizes as arguments, where they are known without a computation."""
    if all(isinstance(size, int) for size in shape(x)[:-1]):
        return list(shape(x)[:-1])
    return list(args(x)[1][:-1]) if is_call(x, *VIEWS) else None


def _adopt(context: Context, node: Node, new: Node) -> None:
    """Whoever reads `node` through views as what `new` is by itself reads `new`."""
    for user in list(node.users):
        if reinterpreted(user) is not node or (is_call(user, aten.clone.default) and returned(user)):
            continue  # who returns a copy must get one
        if same_sizes(shape(user), shape(new)):
            context.replace(user, new)
        else:
            _adopt(context, user, new)
        context.erase(user)


def _transpose(graph: Graph, context: Context, matrix: Node, node: Node) -> Node:
    """What `matrix` is the transpose of, or its transpose: GPT-2's Conv1D and many others keep [in, out]."""
    source = transposed(matrix)
    if source is not None:
        return source
    with graph.inserting_before(node):
        return context.transpose(matrix, node)


def _looks_like_a_weight(node: Node) -> bool:
    """Whether a matrix is a short computation on graph inputs, as a quantised weight is: then it is no activation."""
    node = base_activation(node)
    if is_parameter(node) or is_call(node, linear):
        return False
    pending, seen = [node], {node}
    while pending and len(seen) <= 64:
        new = [source for source in pending.pop().all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return not pending


def _turn(graph: Graph, context: Context, node: Node, weight: Node, x: Node, casts: Casts) -> None:
    """``W x'`` is the transpose of ``x W'``."""
    with graph.inserting_before(node):
        rows = _transpose(graph, context, weight, node)
        product = context.insert(aten.mm.default, (x, rows), node, empty_like(x, shape(node)[::-1], dtype(node)))
        turned = context.contiguous(context.transpose(product, node), node)  # laid out as the product was
    context.replace(node, turned)
    _linear(graph, context, product, x, weight, None, casts)
    context.erase(node)  # which alone may have read the weight


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


def _unbatch(graph: Graph, context: Context, node: Node, casts: Casts) -> None:
    """A batched product with one matrix for all of the batch is a linear."""
    x, right = args(node)[-2:]
    weight = _one_matrix(graph, context, node, right)
    if weight is None or _refused(context, node) or not context.allows(node):
        return
    if node.target is aten.baddbmm.default:
        with graph.inserting_before(node):
            product = context.insert(aten.bmm.default, (x, right), node, node.meta["val"])
            total = _affine(context, args(node)[0], product, node)
        context.replace(node, total)
        context.erase(node)
        node = product
    _linear(graph, context, node, x, weight, None, casts)


def _one_matrix(graph: Graph, context: Context, node: Node, right: Node) -> Node | None:
    """W ``[N, K]`` where `right` is ``W'`` for each of a batch: expanded, or a batch of one however it came about."""
    if is_call(right, *VIEWS) and same_sizes(shape(args(right)[0])[-2:], shape(right)[-2:]):
        right = args(right)[0]  # several batch dimensions made one
    if is_call(right, aten.expand.default):
        source = args(right)[0]
        fits = same_sizes(shape(source), shape(right)[-2:]) and _weighs(context, source)
        return _transpose(graph, context, source, node) if fits else None
    ones = shape(right)[:-2]
    return _through_ones(graph, context, node, right) if same_sizes(ones, (1,) * len(ones)) else None


def _through_ones(graph: Graph, context: Context, node: Node, right: Node) -> Node | None:
    """W for ``W'`` as ``[1, …, K, N]``, where all between the two is dimensions of size one that come, go and move."""
    *_, k, n = shape(right)
    kept = [d for d in (-2, -1) if not same_size(shape(right)[d], 1)]  # of right's, in the order in which they stand
    source = right
    while is_call(source, *VIEWS, *ONES, aten.permute.default):
        below = args(source)[0]
        if source.target is aten.permute.default:
            places = [d % len(shape(below)) for d in args(source)[1]]
            moved = [p for p in places if not same_size(shape(below)[p], 1)]
            kept = [d for _, d in sorted(zip(moved, kept, strict=True))]
        elif not same_sizes(_wide(source), _wide(below)):
            return None
        source = below
    if not _weighs(context, source):
        return None
    if kept == sorted(kept) and same_sizes(shape(source), (k, n)):
        return _transpose(graph, context, source, node)
    if kept == sorted(kept, reverse=True) and same_sizes(shape(source), (n, k)):
        return source
    return None


def _wide(node: Node) -> tuple[Any, ...]:
    return tuple(size for size in shape(node) if not same_size(size, 1))


def _refused(context: Context, node: Node) -> bool:
    """Whether a linear must stay as torch spells it; then it is recorded, with the reason."""
    x, right = args(node)[-2:]
    if node.kwargs.get("alpha", 1) == 0:  # NaN and inf in a product that is taken zero times are nothing
        reason, detail = Reason.SCALE, "its product is taken zero times"
    elif dtype(x) != dtype(right):  # of no tokens torch multiplies even these
        reason, detail = Reason.MIXED_DTYPES, f"{dtype(x)} activation, {dtype(right)} weight"
    else:
        return False
    context.reject(context.found(node, (shape(node)[-1], shape(x)[-1]), dtype(right)), reason, detail)
    return True


def _affine(context: Context, c: Node, product: Node, node: Node) -> Node:
    """``beta c + alpha product``; where beta is zero, c is not read, NaN or not."""
    if node.kwargs.get("alpha", 1) != 1:
        product = context.insert(aten.mul.Tensor, (product, node.kwargs["alpha"]), node, node.meta["val"])
    if node.kwargs.get("beta", 1) == 0:
        return product
    if node.kwargs.get("beta", 1) != 1:
        c = context.insert(aten.mul.Tensor, (c, node.kwargs["beta"]), node, c.meta["val"])
    # the first is the one whose layout the sum has, and the product's is the node's
    return context.insert(aten.add.Tensor, (product, c), node, node.meta["val"])
