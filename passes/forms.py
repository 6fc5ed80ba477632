"""Forms: what the value of a node is as a linear function of one activation, read bottom up.

A form is a sum of products of parameter matrices, each with a scale, plus vectors. `recover_operators` asks for the
form of every node and replaces those that are whole projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from gawscompile.operators import linear
from gawscompile.passes.context import (
    CASTS,
    MATRIX_MATHS,
    TRANSPOSES,
    args,
    aten,
    dtype,
    is_call,
    is_cast,
    is_parameter,
    reinterpreted,
    same_sizes,
    shape,
    through_casts,
    transposed,
    value,
)

PLAIN = torch.contiguous_format


class Factor(NamedTuple):
    """A parameter matrix, or its transpose."""

    node: Node
    turned: bool = False

    @property
    def sizes(self) -> tuple[Any, ...]:
        return shape(self.node)[::-1] if self.turned else shape(self.node)


class Scale(NamedTuple):
    """A number times 0-d nodes."""

    number: float = 1.0
    nodes: tuple[Node, ...] = ()

    def times(self, other: Any) -> Scale:
        if isinstance(other, Scale):
            return Scale(self.number * other.number, self.nodes + other.nodes)
        if isinstance(other, (int, float)):
            return Scale(self.number * other, self.nodes)
        return Scale(self.number, (*self.nodes, other))


class Product(NamedTuple):
    """``scale * W_n … W_1 x``, innermost matrix first. `origin`: the linear node that the outermost came from."""

    matrices: tuple[Factor, ...]
    origin: Node
    scale: Scale = Scale()

    def scaled(self, by: Any) -> Product:
        return self._replace(scale=self.scale.times(by))


class Vector(NamedTuple):
    """``scale * v``, the same for every token."""

    node: Node
    scale: Scale = Scale()

    def scaled(self, by: Any) -> Vector:
        return self._replace(scale=self.scale.times(by))


@dataclass(frozen=True)
class Form:
    """A node's value as products and vectors on one activation. `inner`: the nodes it folds, itself included.

    Where it is `turned`, the node is the transpose of that, ``[N, m]``.
    """

    activation: Node
    products: tuple[Product, ...]
    vectors: tuple[Vector, ...]
    inner: tuple[Node, ...]
    turned: bool = False

    @property
    def bases(self) -> list[Product]:
        return [p for p in self.products if len(p.matrices) == 1]

    def scaled(self, by: Any, node: Node) -> Form:
        products = tuple(p.scaled(by) for p in self.products)
        vectors = tuple(v.scaled(by) for v in self.vectors)
        return replace(self, products=products, vectors=vectors, inner=(*self.inner, node))


def form_of(node: Node, forms: dict[Node, Form]) -> Form | None:
    if is_call(node, linear):
        return _of_linear(node, forms)
    if is_cast(node):
        return _extend(node, forms)
    if is_call(node, aten.clone.default):  # dropout in eval mode
        return _extend(node, forms) if node.kwargs.get("memory_format", PLAIN) is PLAIN else None
    if transposed(node) is not None:
        form = _extend(node, forms)
        return form and replace(form, turned=not form.turned)
    if reinterpreted(node) is not None:
        # in-place arithmetic goes through flat views and back: only leading dimensions change
        return _extend(node, forms) if same_sizes(shape(node)[-1:], shape(args(node)[0])[-1:]) else None
    scaling = scaling_of(node)
    if scaling is not None:
        inner, by = scaling
        form = _folded(inner, forms) if same_sizes(shape(node), shape(inner)) else None
        return form and form.scaled(by, node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _of_sum(node, forms)
    return None


def scaling_of(node: Node) -> tuple[Node, Any] | None:
    """(x, s) where `node` is s x, s a number or a 0-d node."""
    if is_call(node, aten.neg.default):
        return args(node)[0], -1.0
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and not node.kwargs:
        x, s = args(node)
        if is_call(node, aten.mul.Tensor) and (not isinstance(x, Node) or (value(x) is not None and not shape(x))):
            x, s = s, x
        if not isinstance(x, Node) or value(x) is None:
            return None
        if isinstance(s, (int, float)) and (s or is_call(node, aten.mul.Tensor)):
            return x, (s if is_call(node, aten.mul.Tensor) else 1.0 / s)
        if is_call(node, aten.mul.Tensor) and value(s) is not None and not shape(s):
            return x, s
    return None


def _folded(node: Any, forms: dict[Node, Form]) -> Form | None:
    """The form of `node`, where its reader may compute it anew: nobody else reads it, or it is an adapter's part.

    A base projection must not run twice; an intermediate of an adapter costs next to nothing, and stays for its other
    readers besides.
    """
    form = forms.get(node) if isinstance(node, Node) else None
    if form is None or len(node.users) == 1:
        return form
    return form if not form.vectors and all(_small(p) for p in form.products) else None


def _small(product: Product) -> bool:
    """Whether a product goes through, or ends in, far fewer features than it starts from."""
    narrowest = min(matrix.sizes[0] for matrix in product.matrices)
    return isinstance(narrowest, int) and 4 * narrowest <= product.matrices[0].sizes[1]


def _of_linear(node: Node, forms: dict[Node, Form]) -> Form | None:
    x, weight = args(node)[:2]
    vectors = tuple(Vector(v) for v in args(node)[2:])
    # what is not made of parameters alone is a projection all the same, and to be reported as one
    products, inner_nodes = matrix_of(weight) or ((Product((Factor(weight),), node),), ())
    inner = _folded(x, forms)
    if (
        inner is not None
        and not (inner.turned or inner.vectors)
        and len(inner.products) == len(inner.bases) == len(products) == 1
    ):
        (first,), (second,) = inner.products, products
        chain = Product((*first.matrices, *second.matrices), node, first.scale.times(second.scale))
        return Form(inner.activation, (chain,), vectors, (*inner.inner, *inner_nodes, node))
    return Form(
        _activation(x, weight), tuple(p._replace(origin=node) for p in products), vectors, (*inner_nodes, node)
    )


def matrix_of(node: Any) -> tuple[tuple[Product, ...], tuple[Node, ...]] | None:
    """A matrix as a sum of products of parameters, with the nodes that form it: ``W + s B A`` is what merging makes."""
    if not isinstance(node, Node) or value(node) is None or len(shape(node)) != 2:
        return None
    source = through_casts(node)
    if is_parameter(source):
        return (Product((Factor(source),), node),), ()
    turned = transposed(node)
    if turned is not None:
        found = matrix_of(turned)
        return found and (tuple(_turned(p) for p in found[0]), (*found[1], node))
    scaling = scaling_of(node)
    if scaling is not None and same_sizes(shape(node), shape(scaling[0])):
        found = matrix_of(scaling[0])
        return found and (tuple(p.scaled(scaling[1]) for p in found[0]), (*found[1], node))
    if is_cast(node):
        found = matrix_of(args(node)[0])
        return found and (found[0], (*found[1], node))
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
            return left[0] + tuple(p.scaled(_weight(node)) for p in right[0]), (*left[1], *right[1], node)
    return None


def in_a_weight(node: Node) -> bool:
    """Whether a linear is a product of parameters on its way into a weight, and no projection at all."""
    return is_call(node, linear) and matrix_of(node) is not None and _feeds_weights(node)


def _feeds_weights(node: Node) -> bool:
    """Whether all that `node` becomes in the end is the weight of some linear."""
    return bool(node.users) and all(
        (is_call(user, linear) and args(user)[1] is node)
        or (is_call(user, linear, *CASTS, *TRANSPOSES, *MATRIX_MATHS) and _feeds_weights(user))
        for user in node.users
    )


def _turned(p: Product) -> Product:
    """(W_n … W_1)' = W_1' … W_n'."""
    return p._replace(matrices=tuple(Factor(f.node, not f.turned) for f in reversed(p.matrices)))


def _weight(node: Node) -> float:
    """What the second summand of an add or sub is multiplied by."""
    alpha = node.kwargs.get("alpha", 1)
    assert isinstance(alpha, (int, float))
    return float(alpha) if is_call(node, aten.add.Tensor) else -float(alpha)


def _activation(x: Node, weight: Node) -> Node:
    """x before casts that widen it: they lose nothing, and PEFT puts one before every fp32 adapter of a bf16 base.

    Autocast narrows both activation and weight; kernels read both as they are stored instead, which is no less exact
    and spares a copy of the weight.
    """
    if weight is not through_casts(weight) and dtype(through_casts(x)) == dtype(through_casts(weight)):
        return through_casts(x)
    while widens(x) or is_call(x, aten.clone.default):  # dropout in eval mode leaves a copy
        x = args(x)[0]
    return x


def _extend(node: Node, forms: dict[Node, Form]) -> Form | None:
    inner = _folded(args(node)[0], forms)
    return inner and replace(inner, inner=(*inner.inner, node))


def _of_sum(node: Node, forms: dict[Node, Form]) -> Form | None:
    left, right = args(node)
    if value(left) is None or value(right) is None or not isinstance(node.kwargs.get("alpha", 1), (int, float)):
        return None
    weight = _weight(node)
    a, b = _folded(left, forms), _folded(right, forms)
    if a is not None and b is not None:
        a, b = _on_activation_of(a, b), _on_activation_of(b, a)
    if a is not None and b is not None and same_sizes(shape(left), shape(right)) and _same_activation(a, b):
        b = b if weight == 1.0 else b.scaled(weight, node)
        # where an adapter narrows the activation for itself, the base's is the one to read
        activation = a.activation if a.bases else b.activation
        inner = (*a.inner, *b.inner, node)
        return Form(activation, a.products + b.products, a.vectors + b.vectors, inner, a.turned)
    if a is not None and not a.turned and _is_vector(right, left, node):
        return replace(a, vectors=(*a.vectors, Vector(right, Scale(weight))), inner=(*a.inner, node))
    if b is not None and not b.turned and _is_vector(left, right, node):
        b = b if weight == 1.0 else b.scaled(weight, node)
        return replace(b, vectors=(*b.vectors, Vector(left)), inner=(*b.inner, node))
    return None


def _is_vector(other: Node, summand: Node, node: Node) -> bool:
    """Whether `other` is a parameter with one number per feature of `summand`, and the sum broadcasts nothing else."""
    if value(other) is None or not is_parameter(through_casts(other)):
        return False
    return same_sizes(shape(other), shape(node)[-1:]) and same_sizes(shape(summand), shape(node))


def _on_activation_of(form: Form, other: Form) -> Form:
    """``B A (s x)`` as ``s B A x``, where the other summand reads x."""
    scaling = scaling_of(through_casts(form.activation))
    if form.bases or scaling is None or _source(scaling[0]) is not _source(other.activation):
        return form
    return replace(form, activation=other.activation, products=tuple(p.scaled(scaling[1]) for p in form.products))


def _same_activation(a: Form, b: Form) -> bool:
    return _source(a.activation) is _source(b.activation) and a.turned == b.turned


def _source(x: Node) -> Node:
    while is_cast(x) or is_call(x, aten.clone.default):
        x = args(x)[0]
    return x


def widens(node: Node) -> bool:
    return is_cast(node) and dtype(node).itemsize > dtype(args(node)[0]).itemsize
