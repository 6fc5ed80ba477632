"""Opaque bases: their own matmul stays in the graph, since their weight is quantised; adapters are added to it.

The rule knows no library: the base is whatever makes y of the activation that an adapter of the sum reads too, if no
kernel may read the matrix that does it.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from gawscompile.analysis.forms import Form, summed
from gawscompile.analysis.identity import source_of, stored
from gawscompile.analysis.matrices import Scale, weight_of
from gawscompile.analysis.reading import args, aten, dtype, empty_like, is_call, is_parameter, shape, value
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes, same_strides
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.passes.hoist_weights import hoistable
from gawscompile.planning.devices import on_cpu


def on_an_opaque_base(node: Node, forms: dict[Node, Form], context: Context) -> Form | None:
    """``y + s B (A x)``, where y is made of x too, but by no matrix that a kernel may read: by one that is dequantised,
    or by an operator of its own. y stays what it is, and is added to."""
    if not is_call(node, aten.add.Tensor, aten.sub.Tensor) or not isinstance(node.kwargs.get("alpha", 1), (int, float)):
        return None
    left, right = args(node)
    weight = weight_of(node)
    for product, other in ((left, right), (right, left)) if weight == 1.0 else ((left, right),):
        form = summed(other, forms)
        if form is None or not form.added:
            continue
        sized = value(product) is not None and same_sizes(shape(product), shape(node))
        if not sized or not same_sizes(shape(other), shape(node)):
            continue
        way = way_to(product, form.activation)
        if way and all(one not in forms or is_opaque(forms[one], context) for one in way):
            form = form if weight == 1.0 else form.scaled(weight, node)
            return replace(form, inner=(*form.inner, node), opaque=product)
    return None


def is_opaque(form: Form, context: Context) -> bool:
    """Whether no kernel may read what it is made of: a matrix is computed in the graph, or no linear is known."""
    factors = [(p, factor) for p in form.products for factor in p.matrices]
    matrices = [stored(factor.node) for _, factor in factors]
    readable = all(is_parameter(m) or hoistable(m, context) for m in matrices)
    readable = readable and not any(f.packed and (f.turned or p.scale != Scale()) for p, f in factors)
    return form.opaque is None and (form.regrouped or not readable)


DEPTH = 32
"""Nodes at most that are looked at between an opaque base's result and its activation."""


def way_to(node: Node, x: Node) -> list[Node]:
    """`node` and the nodes that it is computed from, nearest first, down to x; none if x is not among the first few."""
    found, x = [node], source_of(x)
    for one in found:  # grows
        if one is not x and len(found) < DEPTH:
            found += [source for source in one.all_input_nodes if source not in found]
    return [one for one in found if one is not x] if x in found[1:] else []


def opaque_refusal(x: Node, product: Node, node: Node) -> tuple[Reason, str] | None:
    """Why nothing can be added to an opaque base's result in a kernel, if it cannot."""
    odd = [str(d) for d in (dtype(x), dtype(product), dtype(node)) if d not in DTYPE_NAMES]
    if odd:
        return Reason.DTYPE, ", ".join(odd)
    if not on_cpu(x):
        return Reason.DEVICE, "on a GPU nothing is added to what a base's own matmul makes"
    plain = empty_like(product, shape(product), dtype(product))
    if not same_strides(shape(product), plain.stride(), product.meta["val"].stride()):
        return Reason.RESHAPED, "the base's result is not laid out plainly"
    return None
