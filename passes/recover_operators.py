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

    operator_sum = operators.operator_sum(x, Sum((Dense(W), LowRank(A, B, 2.0)), 'bf16'))

No list of spellings: every node is given, bottom up, the *form* of its value as a linear function of one activation
(a sum of products of parameter matrices, each with a scale, plus vectors), where it has one. Casts carry a form
through, scales multiply into it, sums of forms on one activation concatenate. A form whose node nobody folds any
further is a root, and is replaced whole, if it has exactly one base projection and everything in it is a parameter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.fixed import cone
from gawscompile.analysis.forms import Form, escapes, form_of, on_its_slices, shrunk
from gawscompile.analysis.identity import reinterpreted, stored, through_casts, widens
from gawscompile.analysis.matrices import Factor, Inverse, Product, Scale, in_a_weight, matrix_of, scaling_of
from gawscompile.analysis.reading import args, aten, dtype, empty_like, is_call, is_cast, prims, shape, transposed
from gawscompile.analysis.vectors import Vector, readable
from gawscompile.ir.operators import Bias, Dense, Given, Kronecker, LowRank, Mode, Opaque, Operator, RowScale
from gawscompile.ir.records import LinearRecord, Reason
from gawscompile.ir.sizes import same_sizes, same_strides
from gawscompile.ir.sums import Sum, linear, operator_sum
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.passes.opaque_bases import is_opaque, on_an_opaque_base, opaque_refusal, way_to
from gawscompile.passes.refusals import adapters_refusal, by_columns, low_rank, refusal, shape_refusal, vectors_refusal
from gawscompile.passes.sink_scales import scaled_before


def run(graph: Graph, context: Context) -> None:
    forms: dict[Node, Form] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not context.looks_at(node):
            continue
        form = on_an_opaque_base(node, forms, context) or form_of(node, forms, context.fixed)
        if form is not None:
            forms[node] = form
        elif is_cast(node) and args(node)[0] in forms and dtype(node) not in DTYPE_NAMES:
            path, detail = context.module_path(node), f"what follows is computed in {dtype(node)}"
            context.record.notes.append(f"{path}: not fused with what reads it: {Reason.DTYPE.name}: {detail}")
    settled: set[Node] = set()
    seen = len(context.record.linears)
    for node in reversed(graph.nodes):
        if node not in forms or node in settled or node._erased or in_a_weight(node):
            continue
        if context.looks_at(node):
            settled.update(_root(graph, context, node, forms))
    context.record.linears[seen:] = context.record.linears[seen:][::-1]  # found back to front


# ---- roots ------------------------------------------------------------------------------------------------


def _root(graph: Graph, context: Context, node: Node, forms: dict[Node, Form]) -> tuple[Node, ...]:
    """Replace `node` by its operator sum, or say why not. Returns the nodes that are settled by this.

    Last nodes come first: what reads `node` as its activation is replaced already, and reads it.
    """
    moved = is_call(node, aten.permute.default) or reinterpreted(node) is not None or transposed(node) is not None
    if (moved and not is_call(node, aten.clone.default)) or widens(node):
        # a reader that wants the result wider, flat or turned makes it so for itself; what it reads comes up later
        return (node,)
    form = forms[node]
    if form.regrouped:
        return (node,)
    form = on_its_slices(form) or form
    if escapes(form, forms):
        return (node,)  # some of it would run twice: it is a sum of its own
    if form.opaque is not None:
        return _on_an_opaque_base(context, node, form, form.opaque, forms)
    form, rowscale = form.without_row_scale()
    rowscale = rowscale and stored(rowscale)
    if len(form.bases) != 1:
        # no base, or several: what it is made of may still be sums of their own
        reason = Reason.SEVERAL_BASES if form.bases else Reason.NO_BASE
        for product in form.products if len(form.products) > 1 else ():
            context.record.notes.append(f"{context.module_path(product.origin)}: {reason.value}")
        return _alone(graph, context, node, forms)
    (base,) = form.bases
    scaling = scaling_of(node)
    if scaling is not None and base.scale != Scale() and scaling[0] in forms:
        return (node,)  # what is scaled as a whole is a sum all the same, and comes up later
    sizes = (*shape(form.activation)[:-1], base.matrices[0].sizes[0])
    wanted = shape(node)[::-1] if form.turned else shape(node)
    refused = refusal(context, form, base, node)
    of_sum = None
    if refused is None:
        adapters = [p for p in form.products if p is not base]
        of_sum = adapters_refusal(context, adapters, base.matrices[0].sizes)
        of_sum = of_sum or vectors_refusal(form, rowscale) or shape_refusal(form, node, sizes, wanted)
    if of_sum is not None and len(form.inner) > 1:
        # the parts may still be projections, the base among them
        path, (reason, detail) = context.module_path(base.origin), of_sum
        context.record.notes.append(f"{path}: not fused with what is added to it: {reason.name}: {detail}")
        return _alone(graph, context, node, forms)
    refused = refused or of_sum
    entry = context.found(base.origin, base.matrices[0].sizes, dtype(base.matrices[0].node))
    entry.adapters = len(form.products) - 1
    if refused is not None:
        context.reject(entry, *refused)
        return form.inner
    if not context.allows(node):
        context.reject(entry, *context.denied)
        return form.inner
    with graph.inserting_before(node):
        terms = _terms(context, form, base, node)
        terms += (RowScale(rowscale),) if rowscale is not None else ()
    return _replaced(context, node, form, terms, sizes, entry, base.origin)


def _replaced(
    context: Context,
    node: Node,
    form: Form,
    terms: tuple[Operator, ...],
    sizes: tuple[Any, ...],
    entry: LinearRecord,
    like: Node,
) -> tuple[Node, ...]:
    """Put the sum of `terms` in the place of `node`. Returns the nodes that are settled by this."""
    wanted = shape(node)[::-1] if form.turned else shape(node)
    total = Sum.of(terms, DTYPE_NAMES[dtype(node)])
    settled = tuple(n for leaf in total.leaves if leaf in context.fixed for n in cone(leaf))
    with context.graph.inserting_before(node):
        value = empty_like(form.activation, sizes, dtype(node))
        new = context.insert(operator_sum, (form.activation, total), like, value)
        new.meta["gaws_entries"] = [entry]
        if not same_sizes(sizes, wanted):
            value = empty_like(form.activation, wanted, dtype(node))
            new = context.insert(aten.view.default, (new, list(wanted)), node, value)
        new = _laid_out(context, context.transpose(new, node) if form.turned else new, node)
    entry.operators = total.describe()
    context.replace(node, new)
    context.erase(node)
    context.matched()
    return (*settled, *(n for n in form.inner if n._erased))  # what others read too is a root of its own


def _on_an_opaque_base(
    context: Context, node: Node, form: Form, product: Node, forms: dict[Node, Form]
) -> tuple[Node, ...]:
    """Replace `node`, what an opaque base makes of x and what adapters add to that, by their sum, or say why not."""
    x, n = form.activation, shape(product)[-1]
    sizes = (*shape(x)[:-1], n)
    base = [one for one in way_to(product, x) if one in forms and is_opaque(forms[one], context)]
    refusal = opaque_refusal(x, product, node) or adapters_refusal(context, form.products, (n, shape(x)[-1]))
    refusal = refusal or shape_refusal(form, node, sizes, shape(node))
    first = next((one for one in base if is_call(one, linear)), None)
    origin, matrix = (node, product) if first is None else (first, args(first)[1])
    if refusal is not None:
        # base and factors may still be projections each
        path, (reason, detail) = context.module_path(origin), refusal
        context.record.notes.append(f"{path}: not fused with what is added to it: {reason.name}: {detail}")
        return (node,)
    entry = context.found(origin, (n, shape(x)[-1]), dtype(matrix))
    entry.adapters = len(form.products)
    if not context.allows(node):
        context.reject(entry, *context.denied)
        return (*form.inner, *base)
    context.seen.update(base)
    with context.graph.inserting_before(node):
        if not same_sizes(shape(product), sizes):
            plain = empty_like(product, sizes, dtype(product))
            product = context.insert(aten.view.default, (product, list(sizes)), node, plain)
        terms = _terms(context, replace(form, opaque=product), None, node)
    return (*base, *_replaced(context, node, form, terms, sizes, entry, node))


def _laid_out(context: Context, new: Node, node: Node) -> Node:
    """`new` with the strides of `node`: its readers' views, and the caller of the graph, rely on them."""
    if same_strides(shape(node), new.meta["val"].stride(), node.meta["val"].stride()):
        return new
    turned = by_columns(node)
    new = context.transpose(new, node) if turned else new
    new = context.contiguous(new, node)
    return context.transpose(new, node) if turned else new


def _alone(graph: Graph, context: Context, node: Node, forms: dict[Node, Form]) -> tuple[Node, ...]:
    """A linear whose form is no sum with one base is a projection of its own (its inner one comes up later)."""
    if not is_call(node, linear):
        return (node,)
    x, weight = args(node)[:2]
    found = matrix_of(weight)
    simple = found is not None and len(found[0]) == len(found[0][0].matrices) == 1 and found[0][0].scale == Scale()
    factor = found[0][0].matrices[0] if found and simple else Factor(weight)
    if not factor.dense:
        return (node,)
    forms[node] = Form(x, (Product((factor,), node),), tuple(Vector(readable(v)) for v in args(node)[2:]), (node,))
    return _root(graph, context, node, forms)


def _terms(context: Context, form: Form, base: Product | None, node: Node) -> tuple[Operator, ...]:
    """The operator sum of a form, its nodes inserted where the caller stands."""
    terms: list[Operator] = [Opaque(form.opaque)]
    if base is not None:
        (weight,) = base.matrices
        terms = [weight.packed or Dense(stored(weight.node), weight.turned)]
    bias = _bias(context, form.vectors, node)
    terms += [Bias(bias)] if bias is not None else []
    adapters = [p for p in form.products if p is not base]
    for p in sorted(adapters, key=low_rank, reverse=True):
        factors = [_factor(context, f) for f in p.matrices]
        scale = _scale(context, p.scale)
        if p.given is not None:
            terms.append(Given(factors[0], scaled_before(context, p.given, p.scale.number)))
        elif (u := _shared(context, form, p)) is not None:
            terms.append(Given(factors[1], scaled_before(context, u, p.scale.number)))
        elif low_rank(p):
            a, b = factors
            terms.append(LowRank(a, b, scale))
        else:
            modes = [Mode(f.before, g, f.after) for f, g in zip(p.matrices, factors, strict=True)]
            terms.append(Kronecker(tuple(modes), scale))
    return tuple(terms)


def _shared(context: Context, form: Form, p: Product) -> Node | None:
    """``A x``, where others read it too, scaled or not: a gradient of B is a product of it."""
    u = shrunk(form, p) if context.training and low_rank(p) and not p.scale.nodes else None
    if u is None:
        return None
    same = [u]
    for one in same:  # grows
        same += [user for user in one.users if user in form.inner and not is_call(user, linear)]
    return u if any(user not in form.inner for one in same for user in one.users) else None


def _factor(context: Context, factor: Factor) -> Node:
    """The factor as it is stored, or a view of its transpose (which the op copies in every call: it is small)."""
    node = stored(factor.node)
    if not factor.turned or factor.diagonal:
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
    if len(vectors) == 1 and vectors[0].scale == Scale() and not vectors[0].rows:
        return vectors[0].node
    total: Node | None = None
    for vector in vectors:
        part = _cast(context, vector.node, torch.float32)
        for row in vector.rows:
            part = _derive(context, aten.mul.Tensor, (part, _cast(context, row, torch.float32)), part.meta["val"])
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
    for found in scale.nodes:
        # what a kernel reads, it can read in any dtype: no cast needed
        node = through_casts(found.node if isinstance(found, Inverse) else found)
        if dtype(node) not in (torch.float32, torch.float64):
            node = _cast(context, node, torch.float32)
        if shape(node) != ():
            node = _derive(context, aten.view.default, (node, []), node.meta["val"].view([]))
        if isinstance(found, Inverse):
            node = _derive(context, aten.reciprocal.default, (node,), node.meta["val"])
        if total is None:
            total = node
        else:
            total = _derive(context, aten.mul.Tensor, (total, node), total.meta["val"] * node.meta["val"])
    assert total is not None
    if scale.number != 1.0:
        total = _derive(context, aten.mul.Tensor, (total, scale.number), total.meta["val"])
    return total
