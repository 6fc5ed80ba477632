"""What is put together only to be taken apart again stays apart.

before::

    stream  = aten.cat([h, z], -1)                      # zFLoRA's residual stream, d + r features wide
    widened = aten.add(stream, aten.cat([o, u], -1))
    h1, z1  = aten.split_with_sizes(widened, [d, r], -1)

after::

    h1 = aten.add(h, o)
    z1 = aten.add(z, u)

A projection then reads h alone, as the base's does, and z beside it. Names for the same value (``alias``) go too: two
readers of one activation are seen to be so.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, aten, dtype, empty_like, is_call, returned, shape, with_views
from gawscompile.ir.sizes import same_sizes
from gawscompile.passes.context import Context

Parts = dict[tuple[Node, tuple[int, ...]], tuple[Node, ...]]
"""(node, sizes along its last axis) → what it consists of."""


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.alias.default):
        if not any(user.op == "output" for user in node.users) and context.allows(node):
            context.replace(node, args(node)[0], named=True)
            context.erase(node)
            context.matched()
    known: Parts = {}
    done: list[Node] = []
    for node in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        if not context.looks_at(node):
            continue
        source, sizes, *axis = args(node)
        if (axis or [0])[0] % len(shape(source)) != len(shape(source)) - 1 or any(map(_laid_out, node.users)):
            continue
        if not all(isinstance(size, int) for size in sizes) or not _splits(source, tuple(sizes)):
            continue
        if not context.allows(node):
            continue
        parts = _parts(context, source, tuple(sizes), known)
        for item in list(node.users):
            assert item.target is operator.getitem
            context.replace(item, parts[args(item)[1]], named=True)
            done.append(item)
        context.matched()
    # not before all are found: a part that has no reader yet may get one
    for part in [*done, *(part for parts in known.values() for part in parts)]:
        context.erase(part)


def _laid_out(node: Node) -> bool:
    """Whether somebody relies on where a part lies: it or a view of it leaves the graph, or is read by strides."""
    return returned(node) or any(is_call(view, aten.as_strided.default) for view in with_views(node))


def _splits(node: Any, sizes: tuple[int, ...]) -> bool:
    """Whether `node` is put together of parts of `sizes`, or a sum of such."""
    pending = [node]
    seen = set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if is_call(one, aten.cat.default):
            parts, *axis = args(one)
            last = (axis or [0])[0] % len(shape(one)) == len(shape(one)) - 1
            whole = all(dtype(part) == dtype(one) for part in parts)
            if not last or not whole or not same_sizes(tuple(shape(part)[-1] for part in parts), sizes):
                return False
        elif is_call(one, aten.add.Tensor) and not one.kwargs and all(isinstance(arg, Node) for arg in args(one)):
            if not all(same_sizes(shape(arg), shape(one)) and dtype(arg) == dtype(one) for arg in args(one)):
                return False
            pending += args(one)
        else:
            return False
    return True


def _parts(context: Context, node: Node, sizes: tuple[int, ...], known: Parts) -> tuple[Node, ...]:
    """The parts of a node that `_splits`; a sum's are made where it stands."""
    chain = [node]  # a stream is a sum of sums, as deep as the model: no recursion
    while chain:
        one = chain[-1]
        if (one, sizes) in known:
            chain.pop()
        elif is_call(one, aten.cat.default):
            known[one, sizes] = tuple(args(one)[0])
        elif missing := [arg for arg in args(one) if (arg, sizes) not in known]:
            chain += missing
        else:
            sides = [known[arg, sizes] for arg in args(one)]
            with context.graph.inserting_before(one):
                known[one, sizes] = tuple(
                    context.insert(
                        aten.add.Tensor, tuple(pair), one, empty_like(one, (*shape(one)[:-1], size), dtype(one))
                    )
                    for *pair, size in zip(*sides, sizes, strict=True)
                )
    return known[node, sizes]
