"""What follows a projection and costs a trip through memory becomes its epilogue.

before::

    o   = fused[0]
    add = aten.add(residual, o)

after::

    fused = operators.project(x, [Wo, residual, Ao, Bo], "k=576 x=f32; n=576 w=f32 out=f32 residual=f32 lora(…)")
    add   = fused[0]

A bias is there already (``addmm`` brought it into the sum). A residual is taken where it has the output's shape and
dtype, comes before the projection, and nobody else reads the projection's output.
"""

from __future__ import annotations

import dataclasses
import operator

from torch.fx import Graph, Node

from gawscompile.codegen.spec import DTYPE_NAMES, KernelSpec
from gawscompile.operators.project import project
from gawscompile.passes.context import Context, args, aten, dtype, is_call, same_sizes, same_value, value


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=project):
        for item in list(node.users):
            _residual(graph, context, node, item)


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
    if projection.residual:
        return
    changed = dataclasses.replace(projection, residual=DTYPE_NAMES[dtype(residual)])
    projections = (*spec.projections[:index], changed, *spec.projections[index + 1 :])
    fused = dataclasses.replace(spec, projections=projections)
    position = next(
        at for at, o in enumerate(fused.operands()) if o.role == "residual" and o.projection == index
    )
    node.args = (x, [*operands[:position], residual, *operands[position:]], str(fused))
    context.touched.append(node)
    context.replace(add, item)
    context.erase(add)
    context.matched()
