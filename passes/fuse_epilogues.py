"""What follows a projection and costs a trip through memory becomes its epilogue.

before::

    o   = fused[0]
    add = aten.add(residual, o)

after::

    fused = operators.project(x, [Wo, residual, Ao, Bo], "k=576 x=f32; n=576 w=f32 out=f32 residual=f32 lora(…)")
    add   = fused[0]

and, of SwiGLU's gate and up::

    silu = aten.div(gate, aten.exp(aten.neg(gate)) + 1)      # gate, up = fused[0], fused[1]
    mul  = aten.mul(silu, up)

after::

    fused = operators.project(x, […], "k=576 x=f32 swiglu; n=1536 …; n=1536 …")
    mul   = fused[0]

A bias is there already (``addmm`` brought it into the sum). A residual is taken where it has the output's shape and
dtype, comes before the projection, and nobody else reads the projection's output. So is a product, of the two outputs
of a group that nobody else reads.
"""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import Graph, Node

from gawscompile.ir.project import project
from gawscompile.ir.spec import DTYPE_NAMES, KernelSpec
from gawscompile.passes.context import (
    Context,
    args,
    aten,
    dtype,
    is_call,
    is_cast,
    same_sizes,
    same_value,
    value,
)


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=project):
        for item in list(node.users):
            if context.looks_at(item):
                _residual(graph, context, node, item)
        if context.looks_at(node):
            _swiglu(context, node)


def _swiglu(context: Context, node: Node) -> None:
    """One output, ``silu(gate) * up``, in the place of two."""
    x, operands, text = args(node)
    spec = KernelSpec.parse(text)
    items = sorted(node.users, key=lambda item: args(item)[1])
    if len(spec.projections) != 2 or len(items) != 2 or any(p.transposed or p.residual for p in spec.projections):
        return
    for gate, up in (items, items[::-1]):
        silu = _silu(gate)
        product = next(iter(up.users), None) if len(up.users) == 1 else None
        if silu is None or product is None or not is_call(product, aten.mul.Tensor) or product.kwargs:
            continue
        if set(args(product)) != {silu, up} or len(silu.users) != 1:
            continue
        if not same_value(value(product), value(up)) or not same_value(value(gate), value(up)):
            continue
        if not context.allows(node):
            return
        first = args(gate)[1]
        mine = [list(owned) for owned in _by_projection(spec, operands)]
        fused = dataclasses.replace(
            spec, projections=(spec.projections[first], spec.projections[1 - first]), swiglu=True
        )
        node.args = (x, [*mine[first], *mine[1 - first]], str(fused))
        node.meta["val"] = [value(product)]
        entries = node.meta["gaws_entries"]
        node.meta["gaws_entries"] = [entries[first], entries[1 - first]]
        with context.graph.inserting_after(node):
            only = context.insert(operator.getitem, (node, 0), product, value(product))
        context.touch(node)
        context.replace(product, only)
        context.erase(product)
        context.matched()
        return


def _silu(gate: Node) -> Node | None:
    """The node that is silu of `gate`, perhaps by way of fp32, if nobody else reads the gate."""
    source = _reader(gate) or gate
    wide = source is not gate
    if wide and not (is_cast(source) and dtype(source) == torch.float32):
        return None
    for first in source.users if len(source.users) == 2 else ():
        # Inductor decomposes silu to gate / (exp(-gate) + 1), torch's core and many models have gate * sigmoid(gate)
        total = _reader(_reader(first, aten.neg.default), aten.exp.default)
        last = _reader(total, aten.add.Tensor)
        if total and last and is_call(last, aten.div.Tensor):
            found = args(total)[1] == 1 and args(last)[0] is source
        else:
            last = _reader(first, aten.sigmoid.default)
            found = last is not None and is_call(last, aten.mul.Tensor) and set(args(last)) == {source, first}
        if last is None or not found or last.kwargs:
            continue
        if not wide:
            return last
        silu = _reader(last)
        return silu if silu and is_cast(silu) and dtype(silu) == dtype(gate) else None
    return None


def _reader(node: Node | None, target: object = None) -> Node | None:
    """Who alone reads `node`, if `node` calls `target` and nothing but its positional arguments matters."""
    if node is None or len(node.users) != 1 or (target and (not is_call(node, target) or node.kwargs)):
        return None
    return next(iter(node.users))


def _by_projection(spec: KernelSpec, operands: list[Node]) -> list[list[Node]]:
    owned: list[list[Node]] = [[] for _ in spec.projections]
    for operand, tensor in zip(spec.operands(), operands, strict=True):
        owned[operand.projection].append(tensor)
    return owned


def _residual(graph: Graph, context: Context, node: Node, item: Node) -> None:
    users = list(item.users)
    if not is_call(item, operator.getitem) or len(users) != 1 or not is_call(users[0], aten.add.Tensor):
        return
    (add,) = users
    left, right = args(add)
    residual = left if right is item else right
    if residual is item or value(residual) is None or not residual < node or add.kwargs:
        return
    if not same_value(value(residual), value(item)) or not same_value(value(add), value(item)):
        return
    if any(not same_sizes(n.meta["val"].stride(), item.meta["val"].stride()) for n in (add, residual)):
        return  # the sum with a transposed residual is laid out as that is
    x, operands, text = args(node)
    spec, index = KernelSpec.parse(text), args(item)[1]
    projection = spec.projections[index]
    if projection.residual or not context.allows(node):
        return
    changed = dataclasses.replace(projection, residual=DTYPE_NAMES[dtype(residual)])
    projections = (*spec.projections[:index], changed, *spec.projections[index + 1 :])
    fused = dataclasses.replace(spec, projections=projections)
    position = next(
        at for at, o in enumerate(fused.operands()) if o.role == "residual" and o.projection == index
    )
    node.args = (x, [*operands[:position], residual, *operands[position:]], str(fused))
    context.touch(node)
    context.replace(add, item)
    context.erase(add)
    context.matched()
