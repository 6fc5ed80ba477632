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
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.codegen.spec import DTYPE_NAMES
from gawscompile.debug.records import Reason
from gawscompile.operators import Bias, Dense, LowRank, Operator, describe, linear, operator_sum
from gawscompile.passes.context import (
    VIEWS,
    Context,
    args,
    aten,
    dtype,
    empty_like,
    is_call,
    is_parameter,
    prims,
    same_sizes,
    shape,
    through_casts,
    value,
)


@dataclass(frozen=True)
class Product:
    """``scale * W_n … W_1 x``: `matrices` innermost first, with the linear node that each came from."""

    matrices: tuple[Node, ...]
    origins: tuple[Node, ...]
    scale: float = 1.0
    scale_node: Node | None = None


@dataclass(frozen=True)
class Form:
    """A node's value as products and vectors on one activation. `inner`: the nodes it folds, itself included."""

    activation: Node
    products: tuple[Product, ...]
    vectors: tuple[Node, ...]
    inner: tuple[Node, ...]


def run(graph: Graph, context: Context) -> None:
    forms: dict[Node, Form] = {}
    for node in graph.nodes:
        form = _form(node, forms)
        if form is not None:
            forms[node] = form
    folded: set[Node] = set()
    seen = len(context.record.linears)
    for node in reversed(graph.nodes):
        if node in forms and node not in folded:
            folded.update(_root(graph, context, node, forms))
    context.record.linears[seen:] = context.record.linears[seen:][::-1]  # found back to front


# ---- forms, bottom up -------------------------------------------------------------------------------------


def _form(node: Node, forms: dict[Node, Form]) -> Form | None:
    if is_call(node, linear):
        return _of_linear(node, forms)
    if is_call(node, prims.convert_element_type.default):
        return _extend(node, forms) if dtype(node).is_floating_point else None
    if is_call(node, aten.clone.default):
        return _extend(node, forms) if not node.kwargs else None  # dropout in eval mode
    if is_call(node, *VIEWS) and value(args(node)[0]) is not None:
        # in-place arithmetic goes through flat views and back: only leading dimensions change
        return _extend(node, forms) if same_sizes(shape(node)[-1:], shape(args(node)[0])[-1:]) else None
    if is_call(node, aten.mul.Tensor):
        return _of_scale(node, forms)
    if is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
        return _of_sum(node, forms)
    return None


def _alone(node: Any, forms: dict[Node, Form]) -> Form | None:
    """The form of `node` if folding it leaves no other reader behind."""
    return forms.get(node) if isinstance(node, Node) and len(node.users) == 1 else None


def _of_linear(node: Node, forms: dict[Node, Form]) -> Form:
    x, weight = args(node)[:2]
    vectors = tuple(args(node)[2:])
    inner = _alone(x, forms)
    if inner is not None and not inner.vectors and len(inner.products) == 1 and len(inner.products[0].matrices) == 1:
        first = inner.products[0]
        product = Product((*first.matrices, weight), (*first.origins, node), first.scale, first.scale_node)
        return Form(inner.activation, (product,), vectors, (*inner.inner, node))
    return Form(_activation(x, weight), (Product((weight,), (node,)),), vectors, (node,))


def _activation(x: Node, weight: Node) -> Node:
    """x before casts that widen it: they lose nothing, and PEFT puts one before every fp32 adapter of a bf16 base.

    Autocast narrows both activation and weight; kernels read both as they are stored instead, which is no less exact
    and spares a copy of the weight.
    """
    if weight is not through_casts(weight) and dtype(through_casts(x)) == dtype(through_casts(weight)):
        return through_casts(x)
    while _widens(x) and dtype(args(x)[0]).is_floating_point:
        x = args(x)[0]
    return x


def _extend(node: Node, forms: dict[Node, Form]) -> Form | None:
    inner = _alone(args(node)[0], forms)
    return inner and Form(inner.activation, inner.products, inner.vectors, (*inner.inner, node))


def _of_scale(node: Node, forms: dict[Node, Form]) -> Form | None:
    left, right = args(node)
    if not isinstance(left, Node) or _alone(left, forms) is None:
        left, right = right, left
    inner = _alone(left, forms)
    if inner is None or inner.vectors or not same_sizes(shape(node), shape(left)):
        return None
    if isinstance(right, (int, float)):
        products = tuple(
            Product(p.matrices, p.origins, p.scale * right, p.scale_node) for p in inner.products
        )
    elif value(right) is not None and not shape(right) and all(p.scale_node is None for p in inner.products):
        products = tuple(Product(p.matrices, p.origins, p.scale, right) for p in inner.products)
    else:
        return None
    return Form(inner.activation, products, (), (*inner.inner, node))


def _of_sum(node: Node, forms: dict[Node, Form]) -> Form | None:
    left, right = (arg if isinstance(arg, Node) else None for arg in args(node))
    if left is None or right is None:
        return None
    a, b = _alone(left, forms), _alone(right, forms)
    if a is not None and b is not None and same_sizes(shape(left), shape(right)) and _same_activation(a, b):
        # where an adapter narrows the activation for itself, the base's is the one to read
        activation = a.activation if any(len(p.matrices) == 1 for p in a.products) else b.activation
        return Form(activation, a.products + b.products, a.vectors + b.vectors, (*a.inner, *b.inner, node))
    for form, other in ((a, right), (b, left)):
        if form is not None and is_parameter(through_casts(other)) and same_sizes(shape(other), shape(node)[-1:]):
            return Form(form.activation, form.products, (*form.vectors, other), (*form.inner, node))
    return None


def _same_activation(a: Form, b: Form) -> bool:
    return through_casts(a.activation) is through_casts(b.activation)


# ---- roots ------------------------------------------------------------------------------------------------


def _root(
    graph: Graph, context: Context, node: Node, forms: dict[Node, Form]
) -> tuple[Node, ...]:
    """Replace `node` by its operator sum, or say why not. Returns the nodes that are settled by this."""
    if is_call(node, *VIEWS) or _widens(node):
        # a reader that wants the result wider, or flat, makes it so for itself
        return (node, *_root(graph, context, args(node)[0], forms))
    form = forms[node]
    bases = [p for p in form.products if len(p.matrices) == 1]
    if len(bases) != 1:
        # no base, or several: what it is made of may still be sums of their own
        reason = Reason.SEVERAL_BASES if bases else Reason.NO_BASE
        for product in form.products if len(form.products) > 1 else ():
            context.record.notes.append(f"{context.module_path(product.origins[-1])}: {reason.value}")
        return (node,) if not is_call(node, linear) else _single(graph, context, node, forms)
    (base,) = bases
    entry = context.found(base.origins[0], base.matrices[0])
    entry.adapters = len(form.products) - 1
    sizes = (*shape(form.activation)[:-1], shape(node)[-1])
    refusal = _refusal(form, base, node)
    if refusal is None and not same_sizes(sizes, shape(node)) and not all(isinstance(s, int) for s in shape(node)):
        refusal = Reason.RESHAPED, f"{sizes} as {shape(node)}"
    if refusal is not None:
        context.reject(entry, *refusal)
        return form.inner
    terms: list[Operator] = [Dense(through_casts(base.matrices[0]))]
    terms += [Bias(through_casts(vector)) for vector in form.vectors]
    for p in form.products:
        if p is not base:
            terms.append(LowRank(through_casts(p.matrices[1]), through_casts(p.matrices[0]), _scale(graph, context, p)))
    with graph.inserting_before(node):
        new = context.insert(
            operator_sum,
            (form.activation, tuple(terms), dtype(node)),
            base.origins[0],
            empty_like(form.activation, sizes, dtype(node)),
        )
        new.meta["gaws_entries"] = [entry]
        if not same_sizes(sizes, shape(node)):
            new = context.insert(aten.view.default, (new, list(shape(node))), node, node.meta["val"])
    entry.operators = describe(tuple(terms))
    context.replace(node, new)
    context.erase(node)
    context.matched()
    return form.inner


def _widens(node: Node) -> bool:
    return is_call(node, prims.convert_element_type.default) and dtype(node).itemsize > dtype(args(node)[0]).itemsize


def _single(
    graph: Graph, context: Context, node: Node, forms: dict[Node, Form]
) -> tuple[Node, ...]:
    """The outer linear of a product without a base is a projection of its own (its inner one comes up later)."""
    x, weight = args(node)[:2]
    forms[node] = Form(x, (Product((weight,), (node,)),), tuple(args(node)[2:]), (node,))
    return _root(graph, context, node, forms)


def _refusal(form: Form, base: Product, node: Node) -> tuple[Reason, str] | None:
    """Why this sum cannot be one projection, if it cannot."""
    x = form.activation
    weight = through_casts(base.matrices[0])
    if not is_parameter(weight):
        return Reason.WEIGHT_COMPUTED, f"it is the result of {weight.target}"
    if not all(isinstance(size, int) for size in shape(weight)) or not weight.meta["val"].is_contiguous():
        return Reason.WEIGHT_LAYOUT, f"shape {shape(weight)}, strides {weight.meta['val'].stride()}"
    if len(form.vectors) > 1:
        return Reason.SEVERAL_BIASES, f"{len(form.vectors)} vectors"
    for tensor in (x, weight, *form.vectors):
        if dtype(through_casts(tensor)) not in DTYPE_NAMES:
            return Reason.DTYPE, str(dtype(through_casts(tensor)))
    if dtype(node) not in DTYPE_NAMES:
        return Reason.DTYPE, str(dtype(node))
    if dtype(x) != dtype(weight):
        return Reason.MIXED_DTYPES, f"{dtype(x)} activation, {dtype(weight)} weight"
    if base.scale != 1.0 or base.scale_node is not None:
        return Reason.SCALE, "the base projection itself is scaled"
    for p in form.products:
        if p is base:
            continue
        a, b = (through_casts(matrix) for matrix in p.matrices)
        if not (is_parameter(a) and is_parameter(b)):
            return Reason.WEIGHT_COMPUTED, "a factor of the adapter is computed in the graph"
        if dtype(a) != dtype(b) or dtype(a) not in DTYPE_NAMES:
            return Reason.DTYPE, f"factors of {dtype(a)} and {dtype(b)}"
        if not 0 < shape(a)[0] <= min(shape(weight)):
            return Reason.FACTOR_SHAPE, f"rank {shape(a)[0]} beside a weight of {shape(weight)}"
    return None


def _scale(graph: Graph, context: Context, product: Product) -> Any:
    """A number, or one 0-d node of fp32 or fp64."""
    if product.scale_node is None:
        return product.scale
    node = through_casts(product.scale_node)  # what a kernel reads, it can read in any dtype: no cast needed
    if dtype(node) not in (torch.float32, torch.float64):
        with graph.inserting_after(node):
            fake = node.meta["val"].to(torch.float32)
            node = context.insert(prims.convert_element_type.default, (node, torch.float32), node, fake)
    if product.scale != 1.0:
        with graph.inserting_after(node):
            node = context.insert(aten.mul.Tensor, (node, product.scale), node, node.meta["val"])
    return node
