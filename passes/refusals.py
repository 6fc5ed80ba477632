"""Why a sum cannot be one fused projection: reasons of `recover_operators`, each None where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from gawscompile.analysis.forms import NARROW, Form
from gawscompile.analysis.identity import stored, through_casts
from gawscompile.analysis.matrices import Product, Scale
from gawscompile.analysis.reading import dtype, empty_like, is_parameter, shape
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_size, same_sizes, same_strides
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.passes.hoist_weights import hoistable
from gawscompile.planning import devices


def refusal(context: Context, form: Form, base: Product, node: Node) -> tuple[Reason, str] | None:
    """Why this sum cannot be one projection, if it cannot."""
    x = form.activation
    if base.matrices[0].packed is not None:
        return _packed_refusal(base, x, node)
    weight = stored(base.matrices[0].node)
    if not is_parameter(weight) and not hoistable(weight, context):
        return Reason.WEIGHT_COMPUTED, f"it is the result of {through_casts(weight).target}"
    strided = is_parameter(weight) and not weight.meta["val"].is_contiguous()
    if strided or not all(isinstance(size, int) for size in shape(weight)):
        return Reason.WEIGHT_LAYOUT, f"shape {shape(weight)}, strides {weight.meta['val'].stride()}"
    if 0 in shape(weight):
        return Reason.WEIGHT_LAYOUT, f"it is empty: {shape(weight)}"
    for tensor in (x, through_casts(weight)):
        if dtype(tensor) not in DTYPE_NAMES:
            return Reason.DTYPE, str(dtype(tensor))
    if dtype(node) not in DTYPE_NAMES:
        return Reason.DTYPE, str(dtype(node))
    if dtype(x) != dtype(weight) and not _taken_as_they_are(x, weight):
        return Reason.MIXED_DTYPES, f"{dtype(x)} activation, {dtype(weight)} weight"
    if base.scale != Scale():
        return Reason.SCALE, ""
    return None


def _packed_refusal(base: Product, x: Node, node: Node) -> tuple[Reason, str] | None:
    odd = [str(d) for d in (dtype(x), dtype(node)) if d not in DTYPE_NAMES]
    if odd:
        return Reason.DTYPE, ", ".join(odd)
    if base.matrices[0].turned:
        return Reason.WEIGHT_LAYOUT, "it is kept as codes, and transposed"
    return (Reason.SCALE, "") if base.scale != Scale() else None


def vectors_refusal(form: Form, rowscale: Node | None) -> tuple[Reason, str] | None:
    """Why what is added to all tokens alike, or scales the rows, cannot be read by the sum's kernel, if it cannot."""
    for what, v in (("added", v.node) for v in form.vectors):
        if dtype(v) not in DTYPE_NAMES:
            return Reason.DTYPE, f"a vector of {dtype(v)} is {what}"
    if rowscale is not None and dtype(rowscale) not in DTYPE_NAMES:
        return Reason.DTYPE, f"a vector of {dtype(rowscale)} scales the rows"
    return None


def _taken_as_they_are(x: Node, weight: Node) -> bool:
    """Whether the generated C++ multiplies them unrounded: an fp32 factor that stands alone on a bf16 activation, and
    any fp32 weight where the library, for which it would be rounded, has no products of bf16."""
    if dtype(weight).itemsize <= dtype(x).itemsize or not devices.on_cpu(x):
        return False
    small = min(shape(weight)) <= NARROW and 4 * min(shape(weight)) <= max(shape(weight))
    return small or devices.multiplies_in_fp32(DTYPE_NAMES[dtype(x)])


def shape_refusal(
    form: Form, node: Node, sizes: tuple[Any, ...], wanted: tuple[Any, ...]
) -> tuple[Reason, str] | None:
    """Why the sum's result cannot be put back into the node's shape and strides, if it cannot."""
    if form.layout is not None and list(form.layout.order) != sorted(form.layout.order):
        return Reason.RESHAPED, "a sum of permuted features"
    if not same_sizes(sizes, wanted) and not all(isinstance(s, int) for s in wanted):
        return Reason.RESHAPED, f"{sizes} as {wanted}"
    plain = empty_like(form.activation, shape(node), dtype(node))
    if same_strides(shape(node), plain.stride(), node.meta["val"].stride()) or by_columns(node):
        return None
    return Reason.RESHAPED, "the sum's strides are not a plain tensor's"


def adapters_refusal(
    context: Context, adapters: Iterable[Product], base: tuple[Any, Any]
) -> tuple[Reason, str] | None:
    """Why what is added to a base of these sizes, ``(N, K)``, cannot be in its kernel, if it cannot."""
    for p in adapters:
        features = base[1] if p.given is None else shape(p.given)[-1]
        ends = (features, *(f.sizes[0] for f in p.matrices))
        starts = (*(f.sizes[1] for f in p.matrices), base[0])
        if not all(isinstance(n, int) for n in (*ends, *starts)) or ends != starts:
            return Reason.FACTOR_SHAPE, f"features go through {ends} and {starts}, of symbolic sizes or not the same"
        if 0 in ends:
            return Reason.FACTOR_SHAPE, f"a factor is empty: features go through {ends}"
        if not math.isfinite(p.scale.number):
            return Reason.SCALE, f"the adapter is scaled by {p.scale.number}"
        factors = [stored(f.node) for f in p.matrices]
        kinds = {dtype(factor) for factor in factors}
        if not all(is_parameter(factor) or hoistable(factor, context) for factor in factors):
            return Reason.WEIGHT_COMPUTED, "a factor of the adapter is computed in the graph"
        if len(kinds) != 1 or not kinds <= DTYPE_NAMES.keys():
            return Reason.DTYPE, f"factors of {', '.join(map(str, kinds))}"
        if p.given is not None:
            if dtype(p.given) not in DTYPE_NAMES or p.scale.nodes:
                return Reason.DTYPE, f"beside an activation of {dtype(p.given)}, scaled by {p.scale}"
            continue
        if low_rank(p):
            rank = p.matrices[0].sizes[0]
            if not 0 < rank <= min(base):
                return Reason.FACTOR_SHAPE, f"rank {rank} beside a weight of {base}"
        elif p.matrices[-1].node.meta["val"].dim() == 1 and not devices.on_cpu(factors[-1]):
            return Reason.DEVICE, "on a GPU no adapter ends with a vector"
        else:
            needed, dense = sum(f.multiplications for f in p.matrices), math.prod(base)
            if not 0 < needed < dense:
                detail = f"{len(p.matrices)} factors that take {needed} multiplications a token, and a dense ΔW {dense}"
                return Reason.FACTOR_SHAPE, detail
    return None


def low_rank(p: Product) -> bool:
    return len(p.matrices) == 2 and all(factor.dense for factor in p.matrices)


def by_columns(node: Node) -> bool:
    """Whether a matrix is laid out as the transpose of a plain one."""
    stride = node.meta["val"].stride()
    return len(stride) == 2 and same_size(stride[0], 1) and not same_size(stride[1], 1)
