"""Layouts: the features of a node as several axes, as Kronecker adapters regroup them, and what views do to those.

``x.unflatten(-1, (n, K/n))`` gives the axes ``(n, K/n)``; a linear on that applies its matrix along the last one, which
is a mode product ``I_n ⊗ G``; after ``.mT`` the same linear is ``G ⊗ I_d``. ``kron(w1, w2)`` is two mode products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch.fx import Node

from gawscompile.analysis.identity import reinterpreted
from gawscompile.analysis.reading import ONES, VIEWS, args, aten, is_call, shape, value
from gawscompile.ir.sizes import same_sizes


class Layout(NamedTuple):
    """`axes`: sizes of the features' axes, slowest first; `order`: which of them each trailing dimension is."""

    axes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The node's trailing dimensions."""
        return tuple(self.axes[axis] for axis in self.order)

    @property
    def last(self) -> tuple[int, int, int]:
        """(before, size, after): the axis that is the node's last dimension, between the products of the others."""
        axis = self.order[-1]
        return math.prod(self.axes[:axis]), self.axes[axis], math.prod(self.axes[axis + 1 :])

    def with_last(self, size: int) -> Layout:
        """The same with another size along the node's last dimension."""
        axis = self.order[-1]
        return Layout((*self.axes[:axis], size, *self.axes[axis + 1 :]), self.order)


class Unknown(Exception):
    """A view that no layout describes."""


def split(node: Node, source: Node) -> Layout | None:
    """The layout that a view gives to a node whose features were one axis, if that is all it does."""
    before, after = shape(source), shape(node)
    if not is_call(node, *VIEWS) or len(after) != len(before) + 1 or not before:
        return None
    sizes = after[-2:]
    if not all(isinstance(size, int) for size in (*sizes, before[-1])) or math.prod(sizes) != before[-1]:
        return None
    return Layout(sizes, (0, 1)) if same_sizes(after[:-2], before[:-1]) else None


def moved(layout: Layout | None, node: Node) -> Layout | None:
    """The layout of a view or permutation of a node with `layout` (None: one axis). Raises `Unknown`."""
    source: Node = args(node)[0]
    before, after = shape(source), shape(node)
    if layout is None:
        if same_sizes(before[-1:], after[-1:]) and not is_call(node, aten.permute.default):
            return None  # in-place arithmetic goes through flat views and back: only leading dimensions change
        found = split(node, source)
        if found is None:
            raise Unknown
        return found
    count = len(layout.axes)
    if is_call(node, aten.permute.default):
        places = [d % len(before) for d in args(node)[1]]
        lead = len(before) - count
        if places[:lead] != list(range(lead)):
            raise Unknown
        return Layout(layout.axes, tuple(layout.order[place - lead] for place in places[lead:]))
    if same_sizes(after[-count:], layout.sizes):
        return layout
    if layout.order == tuple(range(count)) and same_sizes(after[-1:], (math.prod(layout.axes),)):
        return None
    raise Unknown


def kronecker_factors(node: Node) -> tuple[Node, Node] | None:
    """(w1, w2) where `node` is ``kron(w1, w2)`` as ATen spells it: a view of a product of four-dimensional views."""
    product: Any = args(node)[0] if is_call(node, *VIEWS) else None
    if not is_call(product, aten.mul.Tensor) or len(shape(product)) != 4:
        return None
    found: dict[int, Node] = {}
    for factor in args(product):
        matrix: Any = factor
        while is_call(matrix, *VIEWS, *ONES) and len(shape(matrix)) != 2:
            matrix = reinterpreted(matrix)
        if value(matrix) is None or len(shape(matrix)) != 2 or value(factor) is None:
            return None
        rows, columns = shape(matrix)
        for which, sizes in enumerate([(rows, 1, columns, 1), (1, rows, 1, columns)]):
            if which not in found and same_sizes(shape(factor), sizes):
                found[which] = matrix
                break
    if len(found) != 2:
        return None
    (a, b), (c, d) = shape(found[0]), shape(found[1])
    fits = all(isinstance(size, int) for size in (a, b, c, d)) and same_sizes(shape(node), (a * c, b * d))
    return (found[0], found[1]) if fits else None
