"""Batched products over blocks of a token's features become linears.

before (GraLoRA: Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation", with k = 2 blocks)::

    view     = aten.view(x, [1, 5, 2, 32])
    bmm      = aten.bmm(…view…, A)                                           # A [k, K/k, r]
    permute  = aten.permute(aten.view(…bmm…, [1, 5, 2, 2, 4]), [0, 1, 3, 2, 4])
    bmm_1    = aten.bmm(…permute…, B)                                        # B [k, r, N/k]
    view_1   = aten.view(…bmm_1…, [1, 5, 64])

after::

    linear   = operators.linear(x, A')                                       # A' [k r, K], of A alone
    linear_1 = operators.linear(linear, B')                                  # B' [N, k r], of B alone

A' and B' are block-diagonal, the rows of A' in the order in which the permutation deals every block's ranks out to all.
`recover_operators` makes a low-rank term of them and `hoist_weights` has them computed once. They hold k times the
numbers of A and B, so wide ones are left alone; so are all on a GPU, where nothing is hoisted. Where A or B holds inf
or NaN, so do features of other blocks then: a zero times that is NaN.

One product whose blocks stay in order is the linear of a block-diagonal matrix, whose blocks are read as they are::

    bmm      = aten.bmm(…view…, G)                                           # G [n, K/n, N/n]
    linear   = operators.linear(x, G')                                       # G' [n, N/n, K/n], a view

With a dense factor before or after, that is block-diagonal LoRA (BD-LoRA).

Which features end up where is followed through views and permutations axis by axis, not matched by spelling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.identity import base_activation
from gawscompile.analysis.reading import ONES, VIEWS, args, aten, dtype, empty_like, is_call, shape
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_size, same_sizes
from gawscompile.ir.sums import linear
from gawscompile.passes.context import Context
from gawscompile.planning.devices import on_cpu

NARROWER = 2
"""The ranks of all blocks together are at most one in so many of the features of ΔW's narrower side."""


@dataclass(frozen=True, eq=False)
class Axis:
    """A factor of some dimension's size. `place`: of a feature, where it stands among those that it was split from;
    nothing for tokens."""

    size: Any
    place: tuple[int, ...] = ()


Axes = tuple[tuple[Axis, ...], ...]
"""For each dimension of a node, the axes that it is made of, slowest first; none for a size of one."""


@dataclass(frozen=True)
class Blocks:
    """A batched product over blocks of features, ``[blocks, tokens, columns] → [blocks, tokens, rows]``."""

    node: Node
    blocks: tuple[Axis, ...]
    columns: tuple[Axis, ...]

    @property
    def read(self) -> tuple[Axis, ...]:
        """The features that it reads, in the order of a block-diagonal matrix's columns."""
        return self.blocks + self.columns

    @property
    def matrices(self) -> Node:
        """``[blocks, columns, rows]``."""
        found: Node = args(self.node)[1]
        return found


def run(graph: Graph, context: Context) -> None:
    """Rewrite every such product or pair, or note why a product over blocks of features stays."""
    products = graph.find_nodes(op="call_function", target=aten.bmm.default)
    for node in products:
        if not node._erased and context.looks_at(node):
            _merge(context, node)


def _left(context: Context, node: Node, reason: Reason, detail: str) -> None:
    context.record.notes.append(f"{context.module_path(node)}: blocks left alone: {reason.name}: {detail}")


def _merge(context: Context, node: Node) -> None:
    x = _activation(node)
    if x is None or not _of_parameters(node, context):
        return
    x = base_activation(x)  # with its tokens in as many dimensions as what is returned may have
    leading: Axes = tuple(() if same_size(size, 1) else (Axis(size),) for size in shape(x)[:-1])
    tokens = tuple(axis for dim in leading for axis in dim)
    first = _blocks(node, _along(x, node, (*leading, (Axis(shape(x)[-1], (0,)),))), tokens)
    if first is None:
        return  # blocks of tokens, say
    if not _in_order(first.read):
        _left(context, node, Reason.RESHAPED, "its blocks are no slices of the features")
        return
    blocks = tuple(Axis(axis.size, (i,)) for i, axis in enumerate(first.blocks))
    ranks = (*blocks, Axis(shape(node)[2], (len(blocks),)))
    next_node, axes = _next_product(node, (blocks, tokens, ranks[-1:]))
    second = None
    if next_node is not None and _of_parameters(next_node, context):
        second = _blocks(next_node, axes, tokens)
    if second is None or not _all_of(ranks, second.read):
        _alone(context, x, first, _end(node, (blocks, tokens, ranks[-1:]), ranks, tokens))
        return
    features = (*second.blocks, Axis(shape(second.node)[2], (len(ranks),)))
    end = _end(second.node, (second.blocks, tokens, features[-1:]), features, tokens)
    if end is None:
        _left(context, node, Reason.RESHAPED, "what the two return is not put back into one row of features")
        return
    _replace(context, x, first, second, end)


def _alone(context: Context, x: Node, product: Blocks, end: Node | None) -> None:
    """One product, whose blocks `end` has one after the other."""
    if end is None:
        detail = "what it returns is not put back in order, and no second product follows"
        _left(context, product.node, Reason.FACTOR_SHAPE, detail)
        return
    if not context.allows(product.node, end):
        return
    with context.graph.inserting_before(end):
        blocks = _rows_first(context, product)
        sizes = (*shape(x)[:-1], shape(end)[-1])
        new = context.insert(linear, (x, blocks), product.node, empty_like(x, sizes, dtype(end)))
        context.seen.add(new)
        _put(context, end, new)


def _put(context: Context, end: Node, new: Node) -> None:
    """`new` in the place of the view `end`, and of its shape."""
    if not same_sizes(shape(new), shape(end)):
        new = context.insert(aten.view.default, (new, list(args(end)[1])), end, empty_like(new, shape(end), dtype(end)))
    context.replace(end, new)
    context.erase(end)
    context.matched()


def _replace(context: Context, x: Node, first: Blocks, second: Blocks, end: Node) -> None:
    rank, narrower = _size(second.read), min(shape(x)[-1], shape(end)[-1])
    if not on_cpu(x):
        _left(context, first.node, Reason.DEVICE, "nothing is hoisted on a GPU")
        return
    if NARROWER * rank > narrower:
        _left(context, first.node, Reason.FACTOR_SHAPE, f"{rank} ranks in all blocks, beside {narrower} features")
        return
    if not context.allows(first.node, second.node, end):
        return
    with context.graph.inserting_before(end):
        order = sorted(second.read, key=lambda axis: axis.place)
        a = _block_diagonal(context, first)
        a = _dealt(context, a, [axis.size for axis in order], [order.index(axis) for axis in second.read])
        b = _block_diagonal(context, second)
        sizes = shape(x)[:-1]
        inner = context.insert(
            linear, (x, a), first.node, empty_like(x, (*sizes, rank), dtype(first.node))
        )
        outer = context.insert(
            linear, (inner, b), second.node, empty_like(x, (*sizes, shape(end)[-1]), dtype(second.node))
        )
        _put(context, end, outer)


# ---- matrices ---------------------------------------------------------------------------------------------


def _step(context: Context, like: Node, target: Any, source: Node, *more: Any) -> Node:
    return context.insert(target, (source, *more), like, target(source.meta["val"], *more))


def _block_diagonal(context: Context, product: Blocks) -> Node:
    """``[blocks rows, blocks columns]``. For one r, the rows r of all blocks lie one after the other, each followed by
    `width` zeros. So each begins ``width + columns`` after the one before: one line lower, `columns` further right.
    (Inductor has no lowering of ``diag_embed``, and where the sum is refused these nodes reach it.)"""
    blocks, columns, rows = shape(product.matrices)
    width = blocks * columns
    step = functools.partial(_step, context, product.node)
    lines = step(aten.permute.default, product.matrices, [2, 0, 1])
    padded = step(aten.constant_pad_nd.default, lines, [0, width], 0.0)
    flat = step(aten.view.default, context.contiguous(padded, product.node), [rows, blocks * (columns + width)])
    whole = step(aten.view.default, step(aten.slice.Tensor, flat, 1, 0, blocks * width), [rows, blocks, width])
    plain = context.contiguous(step(aten.permute.default, whole, [1, 0, 2]), product.node)
    return step(aten.view.default, plain, [blocks * rows, width])


def _rows_first(context: Context, product: Blocks) -> Node:
    """``[blocks, rows, columns]``: the parameter itself where that is how it is kept. A view of it stands as early as
    it may: siblings group only if all that they read comes before the first."""
    source, order = product.matrices, [0, 2, 1]
    while is_call(source, aten.permute.default):
        order = [args(source)[1][place] % 3 for place in order]
        source = args(source)[0]
    if order == sorted(order):
        return source
    with context.graph.inserting_after(source):
        return _step(context, product.node, aten.permute.default, source, order)


def _dealt(context: Context, matrix: Node, sizes: list[int], order: list[int]) -> Node:
    """`matrix` with its rows, which are several axes of these sizes, in another order of axes."""
    if order == sorted(order):
        return matrix
    rows, columns = shape(matrix)
    step = functools.partial(_step, context, matrix)
    split = step(aten.view.default, matrix, [*sizes, columns])
    moved = context.contiguous(step(aten.permute.default, split, [*order, len(order)]), matrix)
    return step(aten.view.default, moved, [rows, columns])


def _of_parameters(node: Node, context: Context) -> bool:
    right: Any = args(node)[1]
    return context.of_stored(right) and all(isinstance(size, int) for size in shape(right))


# ---- axes -------------------------------------------------------------------------------------------------


def _activation(node: Node) -> Node | None:
    """The nearest node above a batched product's left side that has all of its features in one dimension."""
    blocks, _, columns = shape(args(node)[0])
    source: Any = args(node)[0]
    while not same_size(shape(source)[-1], blocks * columns):
        if not _only_moves(source):
            return None
        source = args(source)[0]
    return source if isinstance(blocks, int) and blocks > 1 and isinstance(columns, int) else None


def _only_moves(node: Any) -> bool:
    return is_call(node, *VIEWS, *ONES, aten.permute.default, aten.clone.default)


def _along(x: Node, node: Node, axes: Axes) -> Axes | None:
    """The axes of `node`'s left side, those of x being known."""
    way = [args(node)[0]]
    while way[-1] is not x:
        way.append(args(way[-1])[0])
    found: Axes | None = axes
    for one in reversed(way[:-1]):
        found = _moved(found, one) if found is not None else None
    return found


def _readers(node: Node, axes: Axes | None) -> Iterator[tuple[Node, Axes]]:
    """`node` and what is only a view or permutation of it, as long as each has one reader; and their axes."""
    while axes is not None:
        yield node, axes
        if len(node.users) != 1:
            return
        (reader,) = node.users
        if not _only_moves(reader):
            return
        node, axes = reader, _moved(axes, reader)


def _next_product(node: Node, axes: Axes) -> tuple[Node | None, Axes | None]:
    """The batched product that `node` goes into, and the axes of its left side."""
    for last, found in _readers(node, axes):
        for reader in last.users if len(last.users) == 1 else ():
            if is_call(reader, aten.bmm.default) and args(reader)[1] is not last:
                return reader, found
    return None, None


def _end(node: Node, axes: Axes, features: tuple[Axis, ...], tokens: tuple[Axis, ...]) -> Node | None:
    """Where what a product returns is ``[…tokens, features]``, the tokens in their order."""
    for last, found in _readers(node, axes):
        in_order = tuple(axis for dim in found[:-1] for axis in dim) == tokens
        if found[-1] == features and in_order and is_call(last, *VIEWS):
            return last
    return None


def _moved(axes: Axes, node: Node) -> Axes | None:
    """The axes of a view, permutation or copy of a node with `axes`; None where a view cuts across them."""
    if is_call(node, aten.permute.default):
        return tuple(axes[place % len(axes)] for place in args(node)[1])
    if is_call(node, aten.clone.default):
        return axes
    rest = [axis for dim in axes for axis in dim]
    found = []
    for size in shape(node):
        taken: list[Axis] = []
        have: Any = 1
        while not same_size(have, size):
            if not rest:
                return None
            axis = rest.pop(0)
            if isinstance(size, int) and isinstance(have * axis.size, int) and size < have * axis.size:
                outer, remainder = divmod(size, have)
                if remainder or not axis.place or axis.size % outer:
                    return None
                axis, inner = Axis(outer, (*axis.place, 0)), Axis(axis.size // outer, (*axis.place, 1))
                rest.insert(0, inner)
            taken.append(axis)
            have = have * axis.size
        found.append(tuple(taken))
    if rest and found and all(same_size(axis.size, 1) for axis in rest):  # one rank for each block, say
        found[-1] = (*found[-1], *rest)
        rest = []
    return tuple(found) if not rest else None


def _blocks(node: Node, axes: Axes | None, tokens: tuple[Axis, ...]) -> Blocks | None:
    """A batched product of features by features, for every token alone."""
    if axes is None or axes[1] != tokens or not all(axis.place for axis in (*axes[0], *axes[2])):
        return None
    return Blocks(node, axes[0], axes[2])


def _in_order(axes: tuple[Axis, ...]) -> bool:
    places = [axis.place for axis in axes]
    return places == sorted(places)


def _all_of(whole: tuple[Axis, ...], parts: tuple[Axis, ...]) -> bool:
    """Whether `parts` are all features of `whole`, some of them split, in whatever order."""
    return _size(whole) == _size(parts) and {axis.place[0] for axis in parts} == {axis.place[0] for axis in whole}


def _size(axes: tuple[Axis, ...]) -> int:
    return math.prod(int(axis.size) for axis in axes)
