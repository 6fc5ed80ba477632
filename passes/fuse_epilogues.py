"""What follows a projection and costs a trip through memory becomes its epilogue.

before::

    o   = fused[0]
    add = aten.add(residual, o)

after::

    fused = operators.project(x, (Sum((Dense(Wo), Residual(residual), LowRank(Ao, Bo, 2.0)), 'f32'),))
    add   = fused[0]

and, of SwiGLU's gate and up::

    silu = aten.div(gate, aten.exp(aten.neg(gate)) + 1)      # gate, up = fused[0], fused[1]
    mul  = aten.mul(silu, up)

after::

    fused = operators.project(x, (Sum(…), Sum(…)), True)
    mul   = fused[0]

A bias is there already (``addmm`` brought it into the sum). A residual is taken where it has the output's shape and
dtype, comes before the projection, and nobody else reads the projection's output. So is a product, of the two outputs
of a group that nobody else reads. Where either is recognised and not taken, a note has the reason.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, aten, dtype, is_call, is_cast, same_value, value
from gawscompile.ir.operators import Residual
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.sums import Sum, project
from gawscompile.passes.context import Context
from gawscompile.planning import devices
from gawscompile.planning.targets import target_of


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=project):
        for item in list(node.users):
            if context.looks_at(item):
                _residual(context, node, item)
        if context.looks_at(node):
            _swiglu(context, node)


def _tell(context: Context, node: Node, item: Node, what: str, why: str) -> None:
    """An epilogue of one of the projections of `node` is not taken."""
    path = node.meta["gaws_entries"][args(item)[1]].path
    context.record.notes.append(f"{path}: {Reason.EPILOGUE.value}: {what}: {why}")


# ---- residual ---------------------------------------------------------------------------------------------


def _residual(context: Context, node: Node, item: Node) -> None:
    """The sum with a residual, in the place of the projection's output."""
    adds = [user for user in item.users if is_call(user, aten.add.Tensor)]
    if not adds:
        return
    (add, *_), (x, sums, *rest), index = adds, args(node), args(item)[1]
    left, right = args(add)
    residual = left if right is item else right
    if value(residual) is None:
        return  # a number is no residual
    why = _no_residual(node, item, add, residual, sums[index])
    if why is not None:
        if not _made_of(residual, node) and not _takes(residual, node):
            _tell(context, node, item, "residual", why)
        return
    if not context.allows(node):
        return
    node.args = (x, (*sums[:index], sums[index].plus(Residual(residual)), *sums[index + 1 :]), *rest)
    context.touch(node)
    context.replace(add, item)
    context.erase(add)
    context.matched()


STEPS = 32
"""Nodes at most that are looked at between a projection and what is added to it."""


def _made_of(residual: object, node: Node) -> bool:
    """Whether `residual` is computed from the outputs of `node`: no residual, then, but a sum of its own."""
    found = [residual] if isinstance(residual, Node) else []
    for one in found:  # grows
        if len(found) < STEPS and not one < node:
            found += [source for source in one.all_input_nodes if source not in found]
    return node in found


def _takes(residual: object, node: Node) -> bool:
    """Whether `residual` is the output of a later projection, whose own residual that of `node` is then."""
    later = isinstance(residual, Node) and not residual < node and is_call(residual, operator.getitem)
    return later and is_call(args(residual)[0], project)  # type: ignore[arg-type]


def _no_residual(node: Node, item: Node, add: Node, residual: object, total: Sum) -> str | None:
    """Why `residual` cannot be added in the kernel, if it cannot."""
    if len(item.users) > 1 or residual is item:
        return "others read the projection's output too"
    if not isinstance(residual, Node) or add.kwargs:
        return "it is scaled as it is added"
    if not residual < node:
        return "it comes after the projection"
    if not same_value(value(residual), value(item)) or not same_value(value(add), value(item)):
        return "it has another shape or dtype than the projection's output"
    if any(not same_sizes(n.meta["val"].stride(), item.meta["val"].stride()) for n in (add, residual)):
        return "it is laid out otherwise than the projection's output"  # and so the sum would be
    if total.opaque is not None:
        return "the base keeps its own matmul"
    return "the projection has a residual already" if total.residual is not None else None


# ---- SwiGLU -----------------------------------------------------------------------------------------------


def _swiglu(context: Context, node: Node) -> None:
    """One output, ``silu(gate) * up``, in the place of two."""
    x, sums, *_ = args(node)
    items = sorted(node.users, key=lambda item: args(item)[1])
    for gate in items:
        silu = _silu(gate)
        product = _reader(silu)
        if silu is None or product is None or not is_call(product, aten.mul.Tensor):
            continue
        (up,) = [other for other in args(product) if other is not silu] or [silu]
        if value(up) is None:
            continue
        why = _no_swiglu(node, gate, up, product, sums)
        if why is not None:
            _tell(context, node, gate, "silu(gate) * up", why)
            continue
        if not context.allows(node):
            return
        first = args(gate)[1]
        node.args = (x, (sums[first], sums[1 - first]), True, None)
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


def _no_swiglu(node: Node, gate: Node, up: object, product: Node, sums: tuple[Sum, ...]) -> str | None:
    """Why the product cannot be formed in the kernel, if it cannot."""
    if up is gate or not is_call(up, operator.getitem) or up not in node.users:
        return "gate and up are not of one group"
    if len(sums) != 2 or len(node.users) != 2:
        return f"{len(node.users)} of their group's {len(sums)} projections are read"
    if len(up.users) != 1:
        return "others read up too"
    if product.kwargs or not same_value(value(product), value(up)) or not same_value(value(gate), value(up)):
        return "gate, up and their product differ in shape or dtype"
    if any(total.opaque is not None or total.residual is not None for total in sums):
        return "one has an opaque base or a residual"
    return target_of(devices.of(node.meta["val"][0].device.type)).no_swiglu(sums)


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
