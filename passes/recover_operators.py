"""Folds chains of linears, scales and sums into operator sums on one activation: the semantic heart.

before::

    linear   = operators.linear(x, W)
    cast     = convert_element_type(x, float32)
    linear_1 = operators.linear(cast, A)
    linear_2 = operators.linear(linear_1, B)
    mul      = aten.mul(linear_2, 2.0)
    add      = aten.add(linear, mul)
    cast_1   = convert_element_type(add, bfloat16)

after::

    operator_sum = operators.operator_sum(x, (Dense(W), LowRank(B, A, 2.0)), bfloat16)

No list of spellings: every node is given, bottom up, the *form* of its value as a linear function of one activation
(a sum of products of parameter matrices, each with a scale, plus vectors), where it has one. Casts carry a form
through, scales multiply into it, sums of forms on one activation concatenate. A form whose node nobody folds any
further is a root, and is replaced whole, if it has exactly one base projection and everything in it is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gawscompile.codegen.spec import DTYPE_NAMES
from gawscompile.debug.records import Reason
from gawscompile.operators import Bias, Dense, LowRank, Operator, describe, linear, operator_sum
from gawscompile.passes.context import (
    CASTS,
    MATRIX_MATHS,
    TRANSPOSES,
    VIEWS,
    Context,
    args,
    aten,
    dtype,
    empty_like,
    is_call,
    is_cast,
    is_parameter,
    plain_sizes,
    prims,
    same_sizes,
    shape,
    through_casts,
    transposed,
    value,
)


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
    """A node's value as products and vectors on one activation. `inner`: the nodes it folds, itself included."""

    activation: Node
    products: tuple[Product, ...]
    vectors: tuple[Vector, ...]
    inner: tuple[Node, ...]

    @property
    def bases(self) -> list[Product]:
        return [p for p in self.products if len(p.matrices) == 1]

    def scaled(self, by: Any, node: Node) -> Form:
        products = tuple(p.scaled(by) for p in self.products)
        return Form(self.activation, products, tuple(v.scaled(by) for v in self.vectors), (*self.inner, node))


def run(graph: Graph, context: Context) -> None:
    forms: dict[Node, Form] = {}
    for node in graph.nodes:
        form = _form(node, forms)
        if form is not None:
            forms[node] = form
    settled: set[Node] = set()
    seen = len(context.record.linears)
    for node in reversed(graph.nodes):
        if node in forms and node not in settled and not node._erased and not _in_a_weight(node):
            settled.update(_root(graph, context, node, forms))
    context.record.linears[seen:] = context.record.linears[seen:][::-1]  # found back to front


# ---- forms, bottom up -------------------------------------------------------------------------------------


def _form(node: Node, forms: dict[Node, Form]) -> Form | None:
    if is_call(node, linear):
        return _of_linear(node, forms)
    if is_cast(node):
        return _extend(node, forms)
    if is_call(node, aten.clone.default):
        return _extend(node, forms) if not node.kwargs else None  # dropout in eval mode
    if is_call(node, *VIEWS) and value(args(node)[0]) is not None:
        # in-place arithmetic goes through flat views and back: only leading dimensions change
        return _extend(node, forms) if same_sizes(shape(node)[-1:], shape(args(node)[0])[-1:]) else None
    scaling = _scaling(node)
    if scaling is not None:
        inner, by = scaling
        form = _folded(inner, forms) if same_sizes(shape(node), shape(inner)) else None
        return form and form.scaled(by, node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _of_sum(node, forms)
    return None


def _scaling(node: Node) -> tuple[Node, Any] | None:
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
    products, inner_nodes = _matrix(weight) or ((Product((Factor(weight),), node),), ())
    inner = _folded(x, forms)
    if inner is not None and not inner.vectors and len(inner.products) == len(inner.bases) == len(products) == 1:
        (first,), (second,) = inner.products, products
        chain = Product((*first.matrices, *second.matrices), node, first.scale.times(second.scale))
        return Form(inner.activation, (chain,), vectors, (*inner.inner, *inner_nodes, node))
    return Form(
        _activation(x, weight), tuple(p._replace(origin=node) for p in products), vectors, (*inner_nodes, node)
    )


def _matrix(node: Any) -> tuple[tuple[Product, ...], tuple[Node, ...]] | None:
    """A matrix as a sum of products of parameters, with the nodes that form it: ``W + s B A`` is what merging makes."""
    if not isinstance(node, Node) or value(node) is None or len(shape(node)) != 2:
        return None
    source = through_casts(node)
    if is_parameter(source):
        return (Product((Factor(source),), node),), ()
    turned = transposed(node)
    if turned is not None:
        found = _matrix(turned)
        return found and (tuple(_turned(p) for p in found[0]), (*found[1], node))
    scaling = _scaling(node)
    if scaling is not None and same_sizes(shape(node), shape(scaling[0])):
        found = _matrix(scaling[0])
        return found and (tuple(p.scaled(scaling[1]) for p in found[0]), (*found[1], node))
    if is_cast(node):
        found = _matrix(args(node)[0])
        return found and (found[0], (*found[1], node))
    if is_call(node, linear) and len(args(node)) == 2:  # P Q', which mm(P, Q) was
        left, right = _matrix(args(node)[0]), _matrix(args(node)[1])
        if left and right and len(left[0]) == len(right[0]) == 1:
            (p,), (q,) = left[0], right[0]
            q = _turned(q)
            product = Product((*q.matrices, *p.matrices), node, p.scale.times(q.scale))
            return (product,), (*left[1], *right[1], node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        left, right = _matrix(args(node)[0]), _matrix(args(node)[1])
        if left and right and same_sizes(shape(args(node)[0]), shape(args(node)[1])):
            return left[0] + tuple(p.scaled(_weight(node)) for p in right[0]), (*left[1], *right[1], node)
    return None


def _in_a_weight(node: Node) -> bool:
    """Whether a linear is a product of parameters on its way into a weight, and no projection at all."""
    return is_call(node, linear) and _matrix(node) is not None and _feeds_weights(node)


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
    while _widens(x) or is_call(x, aten.clone.default):  # dropout in eval mode leaves a copy
        x = args(x)[0]
    return x


def _extend(node: Node, forms: dict[Node, Form]) -> Form | None:
    inner = _folded(args(node)[0], forms)
    return inner and Form(inner.activation, inner.products, inner.vectors, (*inner.inner, node))


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
        return Form(activation, a.products + b.products, a.vectors + b.vectors, (*a.inner, *b.inner, node))
    if a is not None and _is_vector(right, left, node):
        return Form(a.activation, a.products, (*a.vectors, Vector(right, Scale(weight))), (*a.inner, node))
    if b is not None and _is_vector(left, right, node):
        b = b if weight == 1.0 else b.scaled(weight, node)
        return Form(b.activation, b.products, (*b.vectors, Vector(left)), (*b.inner, node))
    return None


def _is_vector(other: Node, summand: Node, node: Node) -> bool:
    """Whether `other` is a parameter with one number per feature of `summand`, and the sum broadcasts nothing else."""
    if value(other) is None or not is_parameter(through_casts(other)):
        return False
    return same_sizes(shape(other), shape(node)[-1:]) and same_sizes(shape(summand), shape(node))


def _on_activation_of(form: Form, other: Form) -> Form:
    """``B A (s x)`` as ``s B A x``, where the other summand reads x."""
    scaling = _scaling(through_casts(form.activation))
    if form.bases or scaling is None or _source(scaling[0]) is not _source(other.activation):
        return form
    products = tuple(p.scaled(scaling[1]) for p in form.products)
    return Form(other.activation, products, form.vectors, form.inner)


def _same_activation(a: Form, b: Form) -> bool:
    return _source(a.activation) is _source(b.activation)


def _source(x: Node) -> Node:
    while is_cast(x) or is_call(x, aten.clone.default):
        x = args(x)[0]
    return x


# ---- roots ------------------------------------------------------------------------------------------------


def _root(graph: Graph, context: Context, node: Node, forms: dict[Node, Form]) -> tuple[Node, ...]:
    """Replace `node` by its operator sum, or say why not. Returns the nodes that are settled by this."""
    if is_call(node, *VIEWS) or _widens(node):
        # a reader that wants the result wider, or flat, makes it so for itself
        source = args(node)[0]
        return (node, *(_root(graph, context, source, forms) if source in forms else ()))
    form = forms[node]
    if len(form.bases) != 1:
        # no base, or several: what it is made of may still be sums of their own
        reason = Reason.SEVERAL_BASES if form.bases else Reason.NO_BASE
        for product in form.products if len(form.products) > 1 else ():
            context.record.notes.append(f"{context.module_path(product.origin)}: {reason.value}")
        return _alone(graph, context, node, forms)
    (base,) = form.bases
    scaling = _scaling(node)
    if scaling is not None and base.scale != Scale() and scaling[0] in forms:
        return (node, *_root(graph, context, scaling[0], forms))  # what is scaled as a whole is a sum all the same
    entry = context.found(base.origin, base.matrices[0].node)
    entry.shape = plain_sizes(base.matrices[0].sizes)
    entry.adapters = len(form.products) - 1
    sizes = (*shape(form.activation)[:-1], shape(node)[-1])
    refusal = _refusal(form, base, node)
    if refusal is None and not same_sizes(sizes, shape(node)) and not all(isinstance(s, int) for s in shape(node)):
        refusal = Reason.RESHAPED, f"{sizes} as {shape(node)}"
    if refusal is not None:
        context.reject(entry, *refusal)
        return form.inner
    with graph.inserting_before(node):
        terms = _terms(context, form, base, node)
        new = context.insert(
            operator_sum,
            (form.activation, terms, dtype(node)),
            base.origin,
            empty_like(form.activation, sizes, dtype(node)),
        )
        new.meta["gaws_entries"] = [entry]
        if not same_sizes(sizes, shape(node)):
            new = context.insert(aten.view.default, (new, list(shape(node))), node, node.meta["val"])
    entry.operators = describe(terms)
    context.replace(node, new)
    context.erase(node)
    context.matched()
    return tuple(n for n in form.inner if n._erased)  # what others read too is a root of its own


def _widens(node: Node) -> bool:
    return is_cast(node) and dtype(node).itemsize > dtype(args(node)[0]).itemsize


def _alone(graph: Graph, context: Context, node: Node, forms: dict[Node, Form]) -> tuple[Node, ...]:
    """A linear whose form is no sum with one base is a projection of its own (its inner one comes up later)."""
    if not is_call(node, linear):
        return (node,)
    x, weight = args(node)[:2]
    found = _matrix(weight)
    simple = found is not None and len(found[0]) == len(found[0][0].matrices) == 1 and found[0][0].scale == Scale()
    factor = found[0][0].matrices[0] if found and simple else Factor(weight)
    forms[node] = Form(x, (Product((factor,), node),), tuple(Vector(v) for v in args(node)[2:]), (node,))
    return _root(graph, context, node, forms)


def _refusal(form: Form, base: Product, node: Node) -> tuple[Reason, str] | None:
    """Why this sum cannot be one projection, if it cannot."""
    x = form.activation
    weight = through_casts(base.matrices[0].node)
    if base.matrices[0].turned:
        return Reason.WEIGHT_LAYOUT, f"it is stored as [in, out] = {shape(weight)}"
    if not is_parameter(weight):
        return Reason.WEIGHT_COMPUTED, f"it is the result of {weight.target}"
    if not all(isinstance(size, int) for size in shape(weight)) or not weight.meta["val"].is_contiguous():
        return Reason.WEIGHT_LAYOUT, f"shape {shape(weight)}, strides {weight.meta['val'].stride()}"
    if 0 in shape(weight):
        return Reason.WEIGHT_LAYOUT, f"it is empty: {shape(weight)}"
    for tensor in (x, weight, *(v.node for v in form.vectors)):
        if dtype(through_casts(tensor)) not in DTYPE_NAMES:
            return Reason.DTYPE, str(dtype(through_casts(tensor)))
    if dtype(node) not in DTYPE_NAMES:
        return Reason.DTYPE, str(dtype(node))
    if dtype(x) != dtype(weight):
        return Reason.MIXED_DTYPES, f"{dtype(x)} activation, {dtype(weight)} weight"
    if base.scale != Scale():
        return Reason.SCALE, ""
    for p in form.products:
        if p is base:
            continue
        if len(p.matrices) != 2:
            return Reason.FACTOR_SHAPE, f"a product of {len(p.matrices)} matrices"
        kinds = {dtype(through_casts(f.node)) for f in p.matrices}
        if not all(is_parameter(through_casts(f.node)) for f in p.matrices):
            return Reason.WEIGHT_COMPUTED, "a factor of the adapter is computed in the graph"
        if len(kinds) != 1 or not kinds <= DTYPE_NAMES.keys():
            return Reason.DTYPE, f"factors of {', '.join(map(str, kinds))}"
        if not all(isinstance(size, int) for f in p.matrices for size in f.sizes):
            return Reason.FACTOR_SHAPE, "the rank is symbolic"
        rank = p.matrices[0].sizes[0]
        if not 0 < rank <= min(shape(weight)):
            return Reason.FACTOR_SHAPE, f"rank {rank} beside a weight of {shape(weight)}"
    return None


def _terms(context: Context, form: Form, base: Product, node: Node) -> tuple[Operator, ...]:
    """The operator sum of a form, its nodes inserted where the caller stands."""
    terms: list[Operator] = [Dense(through_casts(base.matrices[0].node))]
    bias = _bias(context, form.vectors, node)
    terms += [Bias(bias)] if bias is not None else []
    for p in form.products:
        if p is not base:
            a, b = (_factor(context, f) for f in p.matrices)
            terms.append(LowRank(b, a, _scale(context, p.scale)))
    return tuple(terms)


def _factor(context: Context, factor: Factor) -> Node:
    """The factor as it is stored, or a view of its transpose (which the op copies in every call: it is small)."""
    node = through_casts(factor.node)
    if not factor.turned:
        return node
    return _derive(context, aten.permute.default, (node, [1, 0]), node.meta["val"].permute(1, 0))


def _derive(context: Context, target: Any, inputs: tuple[Any, ...], value: Any) -> Node:
    """A node as early as its inputs allow: siblings group only if all that they read comes before the first."""
    last = max(arg for arg in inputs if isinstance(arg, Node))
    with context.graph.inserting_after(last):
        return context.insert(target, inputs, last, value)


def _bias(context: Context, vectors: tuple[Vector, ...], node: Node) -> Node | None:
    """One bias: the vector itself, or the sum of several (a bias on B beside the base's), formed in the graph."""
    if not vectors:
        return None
    if len(vectors) == 1 and vectors[0].scale == Scale():
        return through_casts(vectors[0].node)
    total: Node | None = None
    for vector in vectors:
        part = _cast(context, through_casts(vector.node), torch.float32)
        scale = _scale(context, vector.scale)
        if scale != 1.0:
            part = _derive(context, aten.mul.Tensor, (part, scale), part.meta["val"])
        total = part if total is None else _derive(context, aten.add.Tensor, (total, part), part.meta["val"])
    assert total is not None
    return _cast(context, total, dtype(node))


def _cast(context: Context, node: Node, to: torch.dtype) -> Node:
    if dtype(node) == to:
        return node
    return _derive(context, prims.convert_element_type.default, (node, to), node.meta["val"].to(to))


def _scale(context: Context, scale: Scale) -> Any:
    """A number, or one 0-d node of fp32 or fp64."""
    if not scale.nodes:
        return scale.number
    total: Node | None = None
    for node in scale.nodes:
        node = through_casts(node)  # what a kernel reads, it can read in any dtype: no cast needed
        if dtype(node) not in (torch.float32, torch.float64):
            node = _cast(context, node, torch.float32)
        if total is None:
            total = node
        else:
            total = _derive(context, aten.mul.Tensor, (total, node), total.meta["val"] * node.meta["val"])
    assert total is not None
    if scale.number != 1.0:
        total = _derive(context, aten.mul.Tensor, (total, scale.number), total.meta["val"])
    return total
