"""Which activation a node is, under views, casts and copies."""

from __future__ import annotations

from torch.fx import Node

from gawscompile.passes.context import args, aten, dtype, is_call, is_cast, reinterpreted, same_size, shape


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
