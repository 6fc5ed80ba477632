"""Matrices: what the weight of a linear is as products of parameters, ``s B A``, ``W + s B A``, ``kron(w1, w2)``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from gawscompile.analysis.identity import reinterpreted, through_casts
from gawscompile.analysis.layouts import kronecker_factors
from gawscompile.analysis.packed import packed_of
from gawscompile.analysis.reading import (
    CASTS,
    MATRIX_MATHS,
    ONES,
    TRANSPOSES,
    VIEWS,
    args,
    aten,
    dtype,
    is_call,
    is_cast,
    is_parameter,
    shape,
    transposed,
    value,
)
from gawscompile.ir.packed import Packed
from gawscompile.ir.sizes import same_size, same_sizes
from gawscompile.ir.sums import linear


class Factor(NamedTuple):
    """``I_before ⊗ M ⊗ I_after``: M a parameter matrix, its transpose, the diagonal matrix of a parameter vector, or
    the block-diagonal one of a parameter ``[blocks, rows, columns]``. Where M is `packed`, the node has its codes."""

    node: Node
    turned: bool = False
    before: int = 1
    after: int = 1
    packed: Packed | None = None

    @property
    def whole(self) -> bool:
        """Whether it is M alone."""
        return self.before == self.after == 1

    @property
    def diagonal(self) -> bool:
        return self.packed is None and len(shape(self.node)) == 1

    @property
    def distinct(self) -> bool:
        """Whether M is block-diagonal."""
        return self.packed is None and len(shape(self.node)) == 3

    @property
    def dense(self) -> bool:
        """Whether it is M alone, and M a matrix of as many numbers as it has places."""
        return self.whole and not self.diagonal and not self.distinct

    @property
    def own(self) -> tuple[Any, Any]:
        """(rows, columns) of M."""
        sizes = self.packed.sizes if self.packed else shape(self.node)
        if self.distinct:
            return sizes[0] * sizes[1], sizes[0] * sizes[2]
        rows, columns = (*sizes, *sizes)[:2] if self.diagonal else sizes
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """(rows, columns) of the whole."""
        return tuple(size * self.before * self.after for size in self.own)

    @property
    def multiplications(self) -> Any:
        """For one token."""
        rows = 1 if self.diagonal else shape(self.node)[1] if self.distinct else self.own[0]
        return rows * self.sizes[1]


class Inverse(NamedTuple):
    """One over a 0-d node."""

    node: Node


class Scale(NamedTuple):
    """A number times 0-d nodes and inverses of such."""

    number: float = 1.0
    nodes: tuple[Node | Inverse, ...] = ()

    def times(self, other: Any) -> Scale:
        if isinstance(other, Scale):
            return Scale(self.number * other.number, self.nodes + other.nodes)
        if isinstance(other, (int, float)):
            return Scale(self.number * other, self.nodes)
        return Scale(self.number, (*self.nodes, other))


class Product(NamedTuple):
    """``scale * W_n … W_1 x``, innermost matrix first. `origin`: the linear node that the outermost came from.

    Without matrices it is x itself, regrouped. Where another activation is `given`, it is that one's product.
    """

    matrices: tuple[Factor, ...]
    origin: Node
    scale: Scale = Scale()
    given: Node | None = None

    def scaled(self, by: Any) -> Product:
        return self._replace(scale=self.scale.times(by))


def scaling_of(node: Node) -> tuple[Node, Any] | None:
    """(x, s) where `node` is s x, s a number or a 0-d node."""
    if is_call(node, aten.neg.default):
        return args(node)[0], -1.0
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and not node.kwargs:
        x, s = args(node)
        if is_call(node, aten.mul.Tensor) and (not isinstance(x, Node) or _single(x)):
            x, s = s, x
        if not isinstance(x, Node) or value(x) is None:
            return None
        if isinstance(s, (int, float)) and (s or is_call(node, aten.mul.Tensor)):
            return x, (s if is_call(node, aten.mul.Tensor) else 1.0 / s)
        if _single(s):
            return x, (s if is_call(node, aten.mul.Tensor) else Inverse(s))
    return None


def _single(s: Any) -> bool:
    """Whether it is a tensor of one number."""
    return value(s) is not None and all(same_size(size, 1) for size in shape(s))


def matrix_of(node: Any) -> tuple[tuple[Product, ...], tuple[Node, ...]] | None:
    """A matrix as a sum of products of parameters, with the nodes that form it: ``W + s B A`` is what merging makes."""
    if not isinstance(node, Node) or value(node) is None or len(shape(node)) != 2:
        return None
    source = through_casts(node)
    if (packed := packed_of(node)) is not None:
        return (Product((Factor(packed.codes, packed=packed),), node),), ()
    if is_parameter(source):
        return (Product((Factor(source),), node),), ()
    if dtype(node) == torch.float64:
        return None  # who widens a product of weights wants it computed so
    turned = transposed(node)
    if turned is not None:
        found = matrix_of(turned)
        return found and (tuple(_turned(p) for p in found[0]), (*found[1], node))
    pair = kronecker_factors(node)
    if pair is not None:
        return _kronecker(node, *pair)
    same = reinterpreted(node)
    if same is not None and same_sizes(shape(same), shape(node)):
        found = matrix_of(same)
        return found and (found[0], (*found[1], node))
    scaling = scaling_of(node)
    if scaling is not None and same_sizes(shape(node), shape(scaling[0])):
        found = matrix_of(scaling[0])
        return found and (tuple(p.scaled(scaling[1]) for p in found[0]), (*found[1], node))
    if is_cast(node):
        found = matrix_of(args(node)[0])
        return found and (found[0], (*found[1], node))
    if is_call(node, aten.mul.Tensor):  # G diag(v)
        for g, v in (args(node), args(node)[::-1]):
            found = matrix_of(g)
            if not found or not same_sizes(shape(g), shape(node)) or value(v) is None:
                continue
            if is_parameter(through_casts(v)) and same_sizes(shape(v), shape(node)[-1:]):
                columns = Factor(through_casts(v))
                return tuple(p._replace(matrices=(columns, *p.matrices)) for p in found[0]), (*found[1], node)
        return None
    if is_call(node, linear) and len(args(node)) == 2:  # P Q', which mm(P, Q) was
        left, right = matrix_of(args(node)[0]), matrix_of(args(node)[1])
        if left and right and len(left[0]) == len(right[0]) == 1:
            (p,), (q,) = left[0], right[0]
            q = _turned(q)
            product = Product((*q.matrices, *p.matrices), node, p.scale.times(q.scale))
            return (product,), (*left[1], *right[1], node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        left, right = matrix_of(args(node)[0]), matrix_of(args(node)[1])
        if left and right and same_sizes(shape(args(node)[0]), shape(args(node)[1])):
            return left[0] + tuple(p.scaled(weight_of(node)) for p in right[0]), (*left[1], *right[1], node)
    return None


def _kronecker(node: Node, w1: Node, w2: Node) -> tuple[tuple[Product, ...], tuple[Node, ...]] | None:
    """``w1 ⊗ w2`` as mode products, in the order that multiplies less. Either may be a product of factors itself."""
    left, right = matrix_of(w1), matrix_of(w2)
    if not left or not right or not len(left[0]) == len(right[0]) == 1:
        return None
    (p,), (q,) = left[0], right[0]
    if not all(factor.whole for factor in (*p.matrices, *q.matrices)):
        return None
    (a, b), (c, d) = shape(w1), shape(w2)

    orders = [
        (*modes(p, 1, d), *modes(q, a, 1)),  # (I_a ⊗ w2)(w1 ⊗ I_d)
        (*modes(q, b, 1), *modes(p, 1, c)),  # (w1 ⊗ I_c)(I_b ⊗ w2)
    ]
    if len(q.matrices) > 1:  # (I_a ⊗ w2a)(w1 ⊗ I_r)(I_b ⊗ w2b)
        inner, last = q._replace(matrices=q.matrices[:-1]), q._replace(matrices=q.matrices[-1:])
        orders.append((*modes(inner, b, 1), *modes(p, 1, last.matrices[0].own[1]), *modes(last, a, 1)))
    matrices = min(orders, key=lambda order: sum(factor.multiplications for factor in order))
    return (Product(matrices, node, p.scale.times(q.scale)),), (*left[1], *right[1], node)


def modes(product: Product, before: int, after: int) -> tuple[Factor, ...]:
    return tuple(factor._replace(before=before, after=after) for factor in product.matrices)


def in_a_weight(node: Node) -> bool:
    """Whether a linear is a product of parameters on its way into a weight, and no projection at all."""
    return is_call(node, linear) and matrix_of(node) is not None and _feeds_weights(node)


def _feeds_weights(node: Node) -> bool:
    """Whether all that `node` becomes in the end is the weight of some linear or convolution."""
    return bool(node.users) and all(
        (is_call(user, linear, aten.convolution.default) and args(user)[1] is node and args(user)[0] is not node)
        or (is_call(user, linear, *CASTS, *VIEWS, *ONES, *TRANSPOSES, *MATRIX_MATHS) and _feeds_weights(user))
        for user in node.users
    )


def _turned(p: Product) -> Product:
    """(W_n … W_1)' = W_1' … W_n'."""
    return p._replace(matrices=tuple(f._replace(turned=not f.turned) for f in reversed(p.matrices)))


def weight_of(node: Node) -> float:
    """What the second summand of an add or sub is multiplied by."""
    alpha = node.kwargs.get("alpha", 1)
    assert isinstance(alpha, (int, float))
    return float(alpha) if is_call(node, aten.add.Tensor) else -float(alpha)
