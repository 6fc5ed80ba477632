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
    ONES,
    TRANSPOSES,
    VIEWS,
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
from gawscompile.passes.layouts import Layout, Unknown, kronecker_factors, moved, split

PLAIN = torch.contiguous_format


class Factor(NamedTuple):
    """``I_before ⊗ M ⊗ I_after``: M a parameter matrix, its transpose, or the diagonal matrix of a parameter vector."""

    node: Node
    turned: bool = False
    before: int = 1
    after: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is M alone."""
        return self.before == self.after == 1

    @property
    def dense(self) -> bool:
        """Whether it is M alone, and M a matrix."""
        return self.whole and len(shape(self.node)) == 2

    @property
    def sizes(self) -> tuple[Any, ...]:
        """(rows, columns) of the whole."""
        rows, columns = (*shape(self.node), *shape(self.node))[:2] if len(shape(self.node)) == 1 else shape(self.node)
        rows, columns = (columns, rows) if self.turned else (rows, columns)
        return rows * self.before * self.after, columns * self.before * self.after

    @property
    def columns(self) -> Any:
        """Of M."""
        return self.sizes[1] // (self.before * self.after)

    @property
    def multiplications(self) -> Any:
        """For one token."""
        rows, columns = self.sizes
        return columns if len(shape(self.node)) == 1 else rows * columns // (self.before * self.after)


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
    """``scale * W_n … W_1 x``, innermost matrix first. `origin`: the linear node that the outermost came from.

    Without matrices it is x itself, regrouped.
    """

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

    Where it is `turned`, the node is the transpose of that, ``[N, m]``; where it has a `layout`, its features are
    several axes.
    """

    activation: Node
    products: tuple[Product, ...]
    vectors: tuple[Vector, ...]
    inner: tuple[Node, ...]
    turned: bool = False
    layout: Layout | None = None

    @property
    def bases(self) -> list[Product]:
        return [p for p in self.products if len(p.matrices) == 1 and p.matrices[0].dense]

    @property
    def regrouped(self) -> bool:
        """Whether it is the activation itself, and no linear has read it yet."""
        return not all(p.matrices for p in self.products)

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
    if is_call(node, aten.permute.default) or reinterpreted(node) is not None:
        return _of_view(node, forms)
    scaling = scaling_of(node)
    if scaling is not None:
        inner, by = scaling
        form = _folded(inner, forms) if same_sizes(shape(node), shape(inner)) else None
        return form and form.scaled(by, node)
    if is_call(node, aten.mul.Tensor):
        return _of_diagonal(node, forms)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _of_sum(node, forms)
    return None


def _of_view(node: Node, forms: dict[Node, Form]) -> Form | None:
    """Views and permutations: of a form, or of an activation whose features they make several axes of."""
    source = args(node)[0]
    form = _folded(source, forms)
    if form is None:
        layout = split(node, source)
        if layout is None:
            return None
        while widens(source) or is_call(source, aten.clone.default):
            source = args(source)[0]
        return Form(source, (Product((), node),), (), (node,), layout=layout)
    form = replace(form, inner=(*form.inner, node))
    if form.layout is None and transposed(node) is not None:
        return replace(form, turned=not form.turned)
    try:
        return replace(form, layout=moved(form.layout, node)) if not form.vectors or form.layout is None else None
    except Unknown:
        return None


def _of_diagonal(node: Node, forms: dict[Node, Form]) -> Form | None:
    """Features that are several axes, times a vector along the last one."""
    for x, v in (args(node), args(node)[::-1]):
        form = _folded(x, forms)
        if form is None or form.layout is None or len(form.products) != 1 or form.vectors:
            continue
        before, size, after = form.layout.last
        if value(v) is not None and is_parameter(through_casts(v)) and same_sizes(shape(v), (size,)):
            (product,) = form.products
            factor = Factor(through_casts(v), before=before, after=after)
            product = product._replace(matrices=(*product.matrices, factor))
            return replace(form, products=(product,), inner=(*form.inner, node))
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
    if form is None or len(node.users) == 1 or form.regrouped:
        return form
    return form if not form.vectors and all(_small(p) for p in form.products) else None


def _small(product: Product) -> bool:
    """Whether a product goes through, or ends in, far fewer features than it starts from."""
    narrowest = min((matrix.sizes[0] for matrix in product.matrices), default=None)
    return isinstance(narrowest, int) and 4 * narrowest <= product.matrices[0].sizes[1]


def _of_linear(node: Node, forms: dict[Node, Form]) -> Form | None:
    x, weight = args(node)[:2]
    vectors = tuple(Vector(v) for v in args(node)[2:])
    # what is not made of parameters alone is a projection all the same, and to be reported as one
    products, inner_nodes = matrix_of(weight) or ((Product((Factor(weight),), node),), ())
    inner = _folded(x, forms)
    if inner is not None and inner.layout is not None:
        return _along_an_axis(node, inner, products, inner_nodes) if not vectors else None
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


def _along_an_axis(
    node: Node, inner: Form, products: tuple[Product, ...], inner_nodes: tuple[Node, ...]
) -> Form | None:
    """A linear on features that are several axes: a mode product along the last of them."""
    assert inner.layout is not None
    whole = all(factor.whole for p in products for factor in p.matrices)
    if len(products) != 1 or len(inner.products) != 1 or inner.vectors or not whole:
        return None
    (first,), (second,) = inner.products, products
    before, _, after = inner.layout.last
    rows = second.matrices[-1].sizes[0]
    if not isinstance(rows, int):
        return None
    chain = Product((*first.matrices, *_modes(second, before, after)), node, first.scale.times(second.scale))
    layout = inner.layout.with_last(rows)
    return Form(inner.activation, (chain,), (), (*inner.inner, *inner_nodes, node), layout=layout)


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
            if found and value(v) is not None and is_parameter(through_casts(v)) and shape(v) == shape(node)[-1:]:
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
            return left[0] + tuple(p.scaled(_weight(node)) for p in right[0]), (*left[1], *right[1], node)
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
        (*_modes(p, 1, d), *_modes(q, a, 1)),  # (I_a ⊗ w2)(w1 ⊗ I_d)
        (*_modes(q, b, 1), *_modes(p, 1, c)),  # (w1 ⊗ I_c)(I_b ⊗ w2)
    ]
    if len(q.matrices) > 1:  # (I_a ⊗ w2a)(w1 ⊗ I_r)(I_b ⊗ w2b)
        inner, last = q._replace(matrices=q.matrices[:-1]), q._replace(matrices=q.matrices[-1:])
        orders.append((*_modes(inner, b, 1), *_modes(p, 1, last.matrices[0].columns), *_modes(last, a, 1)))
    matrices = min(orders, key=lambda order: sum(factor.multiplications for factor in order))
    return (Product(matrices, node, p.scale.times(q.scale)),), (*left[1], *right[1], node)


def _modes(product: Product, before: int, after: int) -> tuple[Factor, ...]:
    return tuple(factor._replace(before=before, after=after) for factor in product.matrices)


def in_a_weight(node: Node) -> bool:
    """Whether a linear is a product of parameters on its way into a weight, and no projection at all."""
    return is_call(node, linear) and matrix_of(node) is not None and _feeds_weights(node)


def _feeds_weights(node: Node) -> bool:
    """Whether all that `node` becomes in the end is the weight of some linear."""
    return bool(node.users) and all(
        (is_call(user, linear) and args(user)[1] is node)
        or (is_call(user, linear, *CASTS, *VIEWS, *ONES, *TRANSPOSES, *MATRIX_MATHS) and _feeds_weights(user))
        for user in node.users
    )


def _turned(p: Product) -> Product:
    """(W_n … W_1)' = W_1' … W_n'."""
    return p._replace(matrices=tuple(f._replace(turned=not f.turned) for f in reversed(p.matrices)))


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
        return Form(activation, a.products + b.products, a.vectors + b.vectors, inner, a.turned, a.layout)
    if a is not None and _plain(a) and _is_vector(right, left, node):
        return replace(a, vectors=(*a.vectors, Vector(right, Scale(weight))), inner=(*a.inner, node))
    if b is not None and _plain(b) and _is_vector(left, right, node):
        b = b if weight == 1.0 else b.scaled(weight, node)
        return replace(b, vectors=(*b.vectors, Vector(left)), inner=(*b.inner, node))
    return None


def _plain(form: Form) -> bool:
    return not form.turned and form.layout is None


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
    if a.regrouped or b.regrouped:
        return False
    return _source(a.activation) is _source(b.activation) and (a.turned, a.layout) == (b.turned, b.layout)


def _source(x: Node) -> Node:
    while is_cast(x) or is_call(x, aten.clone.default):
        x = args(x)[0]
    return x


def widens(node: Node) -> bool:
    return is_cast(node) and dtype(node).itemsize > dtype(args(node)[0]).itemsize
