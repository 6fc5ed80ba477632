"""Which activation, or which parameter, a node is, under views, casts and copies."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from gawscompile.analysis.reading import ONES, VIEWS, args, aten, dtype, is_call, is_cast, is_parameter, shape, value
from gawscompile.ir.sizes import same_size, same_sizes


def base_activation(node: Node) -> Node:
    """`node` before the views that only merge or split its leading dimensions."""
    found, source = node, reinterpreted(node)
    features = shape(node)[-1]
    if same_size(features, 0):
        return node  # of nothing there may be any number of rows
    while source is not None and shape(source):
        if same_size(shape(source)[-1], features):
            found = source
        elif not same_size(next((size for size in reversed(shape(source)) if not same_size(size, 1)), 1), features):
            break  # features merged or split: that is no longer the same activation
        source = reinterpreted(source)
    return found


def source_of(x: Node) -> Node:
    while is_cast(x) or is_call(x, aten.clone.default):
        x = args(x)[0]
    return x


def widens(node: Node) -> bool:
    return is_cast(node) and dtype(node).itemsize > dtype(args(node)[0]).itemsize


def unwidened(x: Node) -> Node:
    """`x` before casts that widen it, which lose nothing, and before copies (dropout in eval mode leaves one)."""
    while widens(x) or is_call(x, aten.clone.default):
        x = args(x)[0]
    return x


def through_casts(node: Any) -> Any:
    """The node whose value, rounded, `node` is."""
    while is_cast(node):
        node = args(node)[0]
    return node


def stored(node: Node) -> Node:
    """The parameter of which `node` is a cast, or itself: kernels read parameters in their own dtype."""
    source: Node = through_casts(node)
    return source if is_parameter(source) else node


def reinterpreted(node: Any) -> Node | None:
    """The node whose numbers `node` has in the same order, under other sizes or copied (dropout in eval mode)."""
    if not isinstance(node, Node) or not node.args or value(node) is None or value(args(node)[0]) is None:
        return None
    source: Node = args(node)[0]
    if is_call(node, *VIEWS, *ONES) or (is_call(node, aten.clone.default) and not node.kwargs):
        return source
    if is_call(node, aten.expand.default):  # to what it is already
        return source if same_sizes(shape(node), shape(source)) else None
    if is_call(node, aten.permute.default):  # einsum moves dimensions of size one about
        moved = [d % len(shape(node)) for d in args(node)[1] if not same_size(shape(source)[d], 1)]
        return source if moved == sorted(moved) else None
    return None
