"""Forms: what the value of a node is as a linear function of one activation, read bottom up.

A form is a sum of products of parameter matrices, each with a scale, plus vectors. `recover_operators` asks for the
form of every node and replaces those that are whole projections.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from gawscompile.analysis.identity import base_activation, reinterpreted, source_of, through_casts, unwidened
from gawscompile.analysis.layouts import Layout, Unknown, moved, split
from gawscompile.analysis.matrices import Factor, Product, Scale, matrix_of, modes, scaling_of, weight_of
from gawscompile.analysis.packed import product_of, with_scales
from gawscompile.analysis.reading import (
    CASTS,
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
from gawscompile.analysis.vectors import Vector, merged, merged_vectors, readable, shifted, vector_of
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.sums import linear
from gawscompile.ir.types import DTYPE_NAMES

PLAIN = torch.contiguous_format


@dataclass(frozen=True)
class Form:
    """A node's value as products and vectors on one activation. `inner`: the nodes it folds, itself included.

    Where it is `turned`, the node is the transpose of that, ``[N, m]``; where it has a `layout`, its features are
    several axes. `opaque` is what an opaque base makes of the activation, and a part of the sum.
    """

    activation: Node
    products: tuple[Product, ...]
    vectors: tuple[Vector, ...]
    inner: tuple[Node, ...]
    turned: bool = False
    layout: Layout | None = None
    opaque: Node | None = None

    @property
    def bases(self) -> list[Product]:
        return [p for p in self.products if len(p.matrices) == 1 and p.matrices[0].dense and p.given is None]

    @property
    def regrouped(self) -> bool:
        """Whether it is the activation itself, and no linear has read it yet."""
        return not all(p.matrices for p in self.products)

    @property
    def plain(self) -> bool:
        return not self.turned and self.layout is None

    @property
    def added(self) -> bool:
        """Whether it is what adapters add to a base, and no more."""
        products = [p.matrices if p.given is None else () for p in self.products]
        return self.plain and self.opaque is None and all(len(matrices) > 1 for matrices in products)

    def without_row_scale(self) -> tuple[Form, Node | None]:
        """``c ⊙ S`` as (S, c), where a sum without a base is a base's whose rows are scaled (DoRA, (IA)³)."""
        last = {p.matrices[-1] if p.matrices and p.given is None else None for p in self.products}
        (factor,) = last if len(last) == 1 else (None,)
        if self.bases or not self.plain or factor is None or not factor.whole or not factor.diagonal:
            return self, None
        products = tuple(p._replace(matrices=p.matrices[:-1]) for p in self.products)
        inner = replace(self, products=products)
        return (inner, factor.node) if len(inner.bases) == 1 else (self, None)

    def scaled(self, by: Any, node: Node) -> Form:
        products = tuple(p.scaled(by) for p in self.products)
        vectors = tuple(v.scaled(by) for v in self.vectors)
        return replace(self, products=products, vectors=vectors, inner=(*self.inner, node))


def form_of(node: Node, forms: dict[Node, Form], fixed: Container[Node]) -> Form | None:
    if is_call(node, linear):
        return _of_linear(node, forms)
    if (found := product_of(node)) is not None:
        x, packed, bias = found
        vectors = (Vector(readable(bias)),) if bias is not None else ()
        return Form(x, (Product((Factor(packed.codes, packed=packed),), node),), vectors, (node,))
    if value(node) is None or dtype(node) not in DTYPE_NAMES:
        return None  # who widens a sum to fp64 wants it summed so
    if is_cast(node):
        return _extend(node, forms)
    if is_call(node, aten.clone.default):  # dropout in eval mode
        return _extend(node, forms) if node.kwargs.get("memory_format", PLAIN) is PLAIN else None
    if is_call(node, aten.permute.default) or reinterpreted(node) is not None:
        return _of_view(node, forms)
    scaling = scaling_of(node)
    if scaling is not None:
        inner, by = scaling
        form = summed(inner, forms) if same_sizes(shape(node), shape(inner)) else None
        return form.scaled(by, node) if form is not None and form.opaque is None else None
    if is_call(node, aten.mul.Tensor):
        return _of_diagonal(node, forms) or _of_rows(node, forms, fixed)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _of_sum(node, forms, fixed)
    return None


def _of_view(node: Node, forms: dict[Node, Form]) -> Form | None:
    """Views and permutations: of a form, or of an activation whose features they make several axes of."""
    source = args(node)[0]
    form = _folded(source, forms)
    if form is None:
        layout = split(node, source)
        if layout is None:
            return None
        source = unwidened(source)
        return Form(source, (Product((), node),), (), (node,), layout=layout)
    if form.opaque is not None:
        return None
    form = replace(form, inner=(*form.inner, node), activation=_unflattened(form, node))
    if form.layout is None and transposed(node) is not None:
        return replace(form, turned=not form.turned)
    if form.turned:  # its last dimension is tokens
        return form if same_sizes(shape(node), shape(source)) else None
    try:
        return replace(form, layout=moved(form.layout, node)) if not form.vectors or form.layout is None else None
    except Unknown:
        return None


def _unflattened(form: Form, node: Node) -> Node:
    """The activation of a packed weight's product, which its operator takes as a matrix, with the tokens of `node`."""
    x = base_activation(form.activation)
    packed = form.plain and any(factor.packed for p in form.products for factor in p.matrices)
    return x if packed and same_sizes(shape(x)[:-1], shape(node)[:-1]) else form.activation


def on_its_slices(form: Form) -> Form | None:
    """A sum of mode products that all are ``I_n ⊗ M`` on slices of an activation: the same sum of M's on the slices
    themselves, where one of them is a whole matrix and may be their base.
    """
    view, layout = form.inner[0], form.layout
    plain = split(view, args(view)[0]) if layout is not None and is_call(view, *VIEWS) else None
    factors = [factor for p in form.products for factor in p.matrices]
    if layout is None or plain is None or len(layout.axes) != 2 or layout.order != (0, 1):
        return None
    if any((factor.before, factor.after) != (plain.axes[0], 1) for factor in factors):
        return None
    products = tuple(
        p._replace(matrices=tuple(factor._replace(before=1) for factor in p.matrices)) for p in form.products
    )
    return replace(form, activation=view, products=products, layout=None)


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


def _of_rows(node: Node, forms: dict[Node, Form], fixed: Container[Node]) -> Form | None:
    """A sum whose rows are scaled by a vector, ``v ⊙ S``; by v = u - 1 (DoRA) it is ``u ⊙ S - S``."""
    for x, v in (args(node), args(node)[::-1]):
        form = summed(x, forms)
        if form is None or not form.plain or form.opaque is not None or form.regrouped:
            continue
        if not same_sizes(shape(x), shape(node)):
            continue
        if (scaled := _with_scales(form, v, node)) is not None:
            return scaled
        v, less = shifted(v)
        v = vector_of(v, shape(node)[-1])
        if v is None or not (is_parameter(through_casts(v)) or v in fixed):
            continue
        v = readable(v)
        rows = Factor(v)
        products = [p._replace(matrices=(*p.matrices, rows)) for p in form.products]
        vectors = [vector._replace(rows=(*vector.rows, v)) for vector in form.vectors]
        if less:
            products += [p.scaled(less) for p in form.products]
            vectors += [vector.scaled(less) for vector in form.vectors]
        inner = (*form.inner, node)
        return replace(form, products=merged(products), vectors=merged_vectors(vectors), inner=inner)
    return None


def _with_scales(form: Form, v: Node, node: Node) -> Form | None:
    """``v ⊙ (Q x)``, Q the codes of a packed weight, and v its scales."""
    (factor,) = form.products[0].matrices if len(form.products) == 1 and len(form.bases) == 1 else (None,)
    if factor is None or factor.packed is None or form.vectors or form.products[0].scale != Scale():
        return None
    n = factor.packed.n
    if value(v) is None or not same_sizes(shape(v), (*(1 for _ in shape(v)[1:]), n)):  # one along the tokens, say
        return None
    packed = with_scales(factor.packed, v)
    if packed is None:
        return None
    product = form.products[0]._replace(matrices=(factor._replace(packed=packed),))
    return replace(form, products=(product,), inner=(*form.inner, node))


def summed(node: Any, forms: dict[Node, Form]) -> Form | None:
    """The form of `node`, for a reader that may be one of several that end up in one sum (DoRA reads its base twice):
    whether they do, `escapes` tells once that is whole."""
    form = _folded(node, forms)
    if form is not None or not isinstance(node, Node) or len(node.users) > READERS:
        return form
    form = _known(node, forms)
    together = form is not None and form.plain and not form.opaque
    together = together and all(is_call(user, *SUMMED) for user in node.users)
    return form if together else None


def _known(node: Any, forms: dict[Node, Form]) -> Form | None:
    """The form of `node`, if what reads it may be computed in a kernel with it: kernels sum in fp32."""
    form = forms.get(node) if isinstance(node, Node) else None
    return form if form is not None and dtype(node) in DTYPE_NAMES else None


READERS = 4
SUMMED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, *CASTS, *VIEWS)


def escapes(form: Form, forms: dict[Node, Form]) -> bool:
    """Whether some part of a form that should not run twice is read by others too."""
    inside = set(form.inner)
    for node in inside - {form.inner[-1]}:
        part = forms.get(node)
        if part is None or part.regrouped or source_of(part.activation) is not source_of(form.activation):
            continue  # a product of parameters on its way into a weight, or a view of the activation
        outside = any(user not in inside for user in node.users)
        if outside and (part.vectors or part.opaque or not all(map(_small, part.products))):
            return True
    return False


def _folded(node: Any, forms: dict[Node, Form]) -> Form | None:
    """The form of `node`, where its reader may compute it anew: nobody else reads it, or it is an adapter's part.

    A base projection must not run twice; an intermediate of an adapter costs next to nothing, and stays for its other
    readers besides.
    """
    form = _known(node, forms)
    if form is None or len(node.users) == 1 or form.regrouped:
        return form
    return form if not form.vectors and not form.opaque and all(_small(p) for p in form.products) else None


def _small(product: Product) -> bool:
    """Whether a product goes through, or ends in, far fewer features than it starts from."""
    if not product.matrices:
        return False
    sizes = [product.matrices[0].sizes[1], *(matrix.sizes[0] for matrix in product.matrices)]
    return all(isinstance(size, int) for size in sizes) and 4 * min(sizes[1:]) <= sizes[0]


def _of_linear(node: Node, forms: dict[Node, Form]) -> Form | None:
    x, weight = args(node)[:2]
    vectors = tuple(Vector(readable(v)) for v in args(node)[2:])
    # what is not made of parameters alone is a projection all the same, and to be reported as one
    products, inner_nodes = matrix_of(weight) or ((Product((Factor(weight),), node),), ())
    inner = _folded(x, forms)
    if inner is not None and inner.layout is not None:
        found = _along_an_axis(node, inner, products, inner_nodes) if not vectors else None
        if found is not None:
            return found
        inner = None  # a projection of the regrouped features, then
    alone = inner is not None and inner.plain and not inner.vectors and not inner.opaque
    if inner is not None and alone and len(inner.products) == len(products) == 1 and _matrices(inner.products[0]):
        (first,), (second,) = inner.products, products
        chain = Product((*first.matrices, *second.matrices), node, first.scale.times(second.scale))
        return Form(inner.activation, (chain,), vectors, (*inner.inner, *inner_nodes, node))
    # codes have no dtype: the activation is in that in which the linear multiplies
    packed = any(factor.packed for p in products for factor in p.matrices)
    activation = x if packed else _activation(x, weight)
    return Form(activation, tuple(p._replace(origin=node) for p in products), vectors, (*inner_nodes, node))


def _matrices(p: Product) -> bool:
    """Whether it is one matrix on the activation, its rows scaled or not (VeRA)."""
    first, *rest = p.matrices or (None,)
    if p.given is not None or first is None or not first.whole or first.diagonal:
        return False
    return all(f.whole and f.diagonal for f in rest)


def _along_an_axis(
    node: Node, inner: Form, products: tuple[Product, ...], inner_nodes: tuple[Node, ...]
) -> Form | None:
    """A linear on features that are several axes: a mode product along the last of them."""
    assert inner.layout is not None
    whole = all(factor.whole and not factor.distinct for p in products for factor in p.matrices)
    if len(products) != 1 or len(inner.products) != 1 or inner.vectors or not whole:
        return None
    (first,), (second,) = inner.products, products
    before, _, after = inner.layout.last
    rows = second.matrices[-1].sizes[0]
    if not isinstance(rows, int):
        return None
    chain = Product((*first.matrices, *modes(second, before, after)), node, first.scale.times(second.scale))
    layout = inner.layout.with_last(rows)
    return Form(inner.activation, (chain,), (), (*inner.inner, *inner_nodes, node), layout=layout)


def _activation(x: Node, weight: Node) -> Node:
    """x before casts that widen it: they lose nothing, and PEFT puts one before every fp32 adapter of a bf16 base.

    Autocast narrows both activation and weight; kernels read both as they are stored instead, which is no less exact
    and spares a copy of the weight.
    """
    if weight is not through_casts(weight) and dtype(through_casts(x)) == dtype(through_casts(weight)):
        return through_casts(x)
    return unwidened(x)


def _extend(node: Node, forms: dict[Node, Form], source: Node | None = None) -> Form | None:
    inner = summed(source or args(node)[0], forms)
    return inner and replace(inner, inner=(*inner.inner, node))


def _of_sum(node: Node, forms: dict[Node, Form], fixed: Container[Node]) -> Form | None:
    left, right = args(node)
    if value(left) is None or value(right) is None or not isinstance(node.kwargs.get("alpha", 1), (int, float)):
        return None
    for summand, zero in ((left, right), (right, left)):
        if is_call(zero, aten.full.default) and args(zero)[1] == 0 and same_sizes(shape(summand), shape(node)):
            form = _extend(node, forms, summand) if summand is left or weight_of(node) == 1.0 else None
            # a single matrix stays alone: it may be the z of a widened stream, which others read
            return form if form is not None and not form.bases else None
    weight = weight_of(node)
    a, b = summed(left, forms), summed(right, forms)
    if a is not None and b is not None:
        a, b = _on_activation_of(a, b, fixed), _on_activation_of(b, a, fixed)
        if a.layout != b.layout:  # a projection of slices, by its bias, beside an adapter of theirs
            a, b = on_its_slices(a) or a, on_its_slices(b) or b
    if a is not None and b is not None and same_sizes(shape(left), shape(right)) and _same_activation(a, b):
        b = b if weight == 1.0 else b.scaled(weight, node)
        if (a.opaque or b.opaque) and (a.bases or b.bases or (a.opaque and b.opaque) or (b.opaque and weight != 1.0)):
            return None
        # where an adapter narrows the activation for itself, the base's is the one to read
        activation = a.activation if a.bases else b.activation
        inner = (*a.inner, *b.inner, node)
        products, vectors = merged(a.products + b.products), merged_vectors(a.vectors + b.vectors)
        if not products:
            return None
        return Form(activation, products, vectors, inner, a.turned, a.layout, a.opaque or b.opaque)
    if a is not None and b is not None and weight == 1.0 and same_sizes(shape(left), shape(right)):
        for wide, narrow in ((a, b), (b, a)):
            if (given := _given(narrow, wide, forms)) is not None:
                own = forms[given.given].inner if given.given in forms else ()
                folded = (inner for inner in narrow.inner if inner not in own)
                return replace(wide, products=(*wide.products, given), inner=(*folded, *wide.inner, node))
    if a is not None and a.plain and _is_vector(right, left, node):
        vectors = merged_vectors((*a.vectors, Vector(readable(right), Scale(weight))))
        return replace(a, vectors=vectors, inner=(*a.inner, node))
    if b is not None and b.plain and (weight == 1.0 or not b.opaque) and _is_vector(left, right, node):
        b = b if weight == 1.0 else b.scaled(weight, node)
        vectors = merged_vectors((*b.vectors, Vector(readable(left))))
        return replace(b, vectors=vectors, inner=(*b.inner, node))
    return None


NARROW = 256
"""Features of an activation beside another at most, and a quarter of the other's."""


def _given(narrow: Form, wide: Form, forms: dict[Node, Form]) -> Product | None:
    """``B z`` of an activation z of few features, as a summand of a projection of a wide one (zFLoRA's stream). So is
    ``B A x'`` of another wide one, as x is after dropout: z is ``A x'``."""
    if not (narrow.plain and wide.plain) or len(wide.bases) != 1 or narrow.vectors or narrow.opaque:
        return None
    (product, *others), x = narrow.products, wide.activation
    if others or product.given is not None or product.scale.nodes:
        return None
    z: Node | None = narrow.activation
    if len(product.matrices) == 2:
        z = shrunk(narrow, product)
        product = product._replace(matrices=product.matrices[1:])
    if z is None or len(product.matrices) != 1 or not product.matrices[0].dense:
        return None
    rank, features = product.matrices[0].sizes[1], wide.bases[0].matrices[0].sizes[1]
    if not (isinstance(rank, int) and isinstance(features, int) and 0 < rank <= min(NARROW, features // 4)):
        return None
    if not same_sizes(shape(z)[:-1], shape(x)[:-1]):
        return None
    return product._replace(given=z)


def shrunk(form: Form, product: Product) -> Node | None:
    """The node that is ``A x``, of a product ``B A x`` of a form."""
    for node in form.inner:
        if is_call(node, linear) and len(args(node)) == 2 and source_of(args(node)[0]) is source_of(form.activation):
            found = matrix_of(args(node)[1])
            if found and len(found[0]) == 1 and found[0][0].matrices == product.matrices[:1]:
                return node if found[0][0].scale == Scale() else None
    return None


def _is_vector(other: Node, summand: Node, node: Node) -> bool:
    """Whether `other` is a parameter with one number per feature of `summand`, and the sum broadcasts nothing else."""
    if value(other) is None or not is_parameter(through_casts(other)):
        return False
    return same_sizes(shape(other), shape(node)[-1:]) and same_sizes(shape(summand), shape(node))


def _on_activation_of(form: Form, other: Form, fixed: Container[Node] = ()) -> Form:
    """``B A (s x)`` as ``s B A x``, and ``B A (v ⊙ x)`` as ``B A diag(v) x``, where the other summand reads x."""
    x = through_casts(form.activation)
    for of, v in ((args(x), args(x)[::-1]) if is_call(x, aten.mul.Tensor) and not (form.bases or form.opaque) else ()):
        v = vector_of(v, shape(x)[-1])
        stands = v is not None and (is_parameter(through_casts(v)) or v in fixed)
        stands = stands and value(of) is not None and same_sizes(shape(of), shape(x))
        if stands and source_of(of) is source_of(other.activation) and form.plain:
            columns = Factor(through_casts(v))
            products = tuple(p._replace(matrices=(columns, *p.matrices)) for p in form.products)
            return replace(form, activation=other.activation, products=products)
    scaling = scaling_of(x)
    if form.bases or form.opaque or scaling is None or source_of(scaling[0]) is not source_of(other.activation):
        return form
    if not same_sizes(shape(scaling[0]), shape(x)):
        return form
    return replace(form, activation=other.activation, products=tuple(p.scaled(scaling[1]) for p in form.products))


def _same_activation(a: Form, b: Form) -> bool:
    if a.regrouped or b.regrouped:
        return False
    return source_of(a.activation) is source_of(b.activation) and (a.turned, a.layout) == (b.turned, b.layout)
