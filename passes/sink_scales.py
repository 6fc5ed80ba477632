"""What scales a gradient scales the narrow products of it instead.

before, of a LoRA of scale 2 whose gradient is dy::

    mul = aten.mul(dy, 2.0)
    v   = operators.linear(mul, B')
    dB  = aten.mm(aten.permute(mul, [1, 0]), u)

after::

    v   = aten.mul(operators.linear(dy, B'), 2.0)
    dB  = aten.mm(aten.permute(dy, [1, 0]), aten.mul(u, 2.0))

A gradient has as many features as the layer, v and u have as many as the adapter has ranks. Without the scaled gradient
nothing of the layer's width is written that the base does not need itself, and v is a function of dy, as the base's
product is: `recover_operators` makes one sum of them. ``2 u`` stands beside u, so the forward reads it too. A gradient
that others read scaled is left as it is.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from gawscompile.analysis.matrices import scaling_of
from gawscompile.analysis.reading import VIEWS, args, aten, is_call, same_value, shape, transposed
from gawscompile.ir.sums import linear
from gawscompile.passes.context import Context, backward

Way = tuple[Node, ...]
"""Views from a gradient to a product that reads it, and that product."""


def run(graph: Graph, context: Context) -> None:
    if not context.training:
        return
    for node in list(graph.nodes):
        scaling = scaling_of(node) if backward(node) else None
        if scaling is None or not isinstance(scaling[1], (int, float)) or not context.looks_at(node):
            continue
        x, scale = scaling
        ways = _ways(node)
        if not ways or not _alike(x, node) or not context.allows(node):
            continue
        for way in ways:
            _sink(graph, context, x, scale, way)
        context.matched()


def _alike(x: Node, node: Node) -> bool:
    own = x.meta["val"]
    return same_value(own, node.meta["val"]) and own.stride() == node.meta["val"].stride()


def _ways(node: Node, so_far: Way = ()) -> list[Way] | None:
    """The ways to all that read `node`, if these are narrow products."""
    found: list[Way] = []
    for user in node.users:
        way = (*so_far, user)
        if is_call(user, linear):
            narrow = len(args(user)) == 2 and args(user)[0] is node and not so_far and _less(user, node)
            more: list[Way] | None = [way] if narrow else None
        elif is_call(user, aten.mm.default):
            narrow = args(user)[0] is node and args(user)[1] is not node and _less(args(user)[1], node, 0)
            more = [way] if narrow else None
        elif is_call(user, *VIEWS) or transposed(user) is node:
            more = _ways(user, way)
        else:
            more = None
        if more is None:
            return None
        found += more
    return found


def _less(narrow: Node, wide: Node, axis: int = -1) -> bool:
    """Whether a product has fewer features than the gradient, which has them along `axis`."""
    a, b = shape(narrow)[-1], shape(wide)[axis]
    return isinstance(a, int) and isinstance(b, int) and 2 * a <= b


def _sink(graph: Graph, context: Context, x: Node, scale: float, way: Way) -> None:
    *views, product = way
    with graph.inserting_before(product):
        for view in views:
            x = context.insert(view.target, (x, *args(view)[1:]), view, view.meta["val"])  # type: ignore[arg-type]
        if is_call(product, linear):
            plain = context.insert(linear, (x, args(product)[1]), product, product.meta["val"])
            new = context.insert(aten.mul.Tensor, (plain, scale), product, product.meta["val"])
        else:
            narrow = _scaled(graph, context, args(product)[1], scale)
            new = context.insert(aten.mm.default, (x, narrow), product, product.meta["val"])
    context.replace(product, new)
    context.erase(product)


def _scaled(graph: Graph, context: Context, u: Node, scale: float) -> Node:
    """``scale * u``, formed where the product is of which u is a view."""
    product, views = u, list[Node]()
    while is_call(product, *VIEWS):
        views.append(product)
        product = args(product)[0]
    if product.op != "call_function" or not is_call(product, linear):
        return context.insert(aten.mul.Tensor, (u, scale), u, u.meta["val"])
    new = scaled_before(context, product, scale)
    for view in reversed(views):  # with its own sizes, which may be nodes
        new = context.insert(view.target, (new, *args(view)[1:]), view, view.meta["val"])  # type: ignore[arg-type]
    return new


def scaled_before(context: Context, product: Node, scale: float) -> Node:
    """``scale * product`` as it stands beside `product`, for all that read it."""
    if scale == 1.0:
        return product
    behind = product
    while behind.op == behind.next.op == "placeholder":  # inputs come first
        behind = behind.next
    after = behind.next
    if is_call(after, aten.mul.Tensor) and not after.kwargs and args(after) == (product, scale):
        return after
    with context.graph.inserting_after(behind):
        return context.insert(aten.mul.Tensor, (product, scale), product, product.meta["val"])
