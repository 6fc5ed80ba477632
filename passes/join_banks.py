"""What a bank's adapters add to a projection becomes a term of its sum.

before::

    schedule = torch.ops.gaws.schedule(state, rows, 210, 1)
    sum      = operators.operator_sum(x, Sum((Dense(W), Bias(b)), 'bf16'))
    entries  = aten.select(schedule, 0, 17)
    banked   = torch.ops.gaws.banked(x, pool, entries, sum, b)
    add      = aten.add(sum, banked)

after::

    schedule = torch.ops.gaws.snapshot(state, rows, 210, 1)
    entries  = aten.select(schedule, 0, 17)
    add      = operators.operator_sum(x, Sum((Dense(W), Bias(b), Banked(pool, entries, 576)), 'bf16'))

A module of a bank spells it like that, so one rule finds all. What the op is told is what the base has made, and the
bias in that: without it that is ``W x``, which a kernel has anyway. The snapshot is taken without Python from here
on; on a GPU `gaws::schedule` reads a table there, and stays. The module's part of the schedule moves up to the
schedule: siblings group only if all that they read comes before the first of them. What is not joined stays an op of
its own, which runs in plain torch, and a note has the reason.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from gawscompile.analysis.identity import source_of
from gawscompile.analysis.reading import args, aten, dtype, is_call, shape, value
from gawscompile.analysis.vectors import readable
from gawscompile.ir.operators import Banked
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.sums import Sum, operator_sum
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.planning import devices
from gawscompile.planning.targets import CPP, target_of
from gawscompile.runtime.banked import BANKED, SCHEDULE, SNAPSHOT


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=BANKED):
        if context.looks_at(node):
            _join(context, node)
    for node in graph.find_nodes(op="call_function", target=SCHEDULE):
        if target_of(devices.of(node.meta["val"].device.type)) is CPP and context.allows(node):
            node.target = SNAPSHOT
            context.matched()


def _join(context: Context, node: Node) -> None:
    x, pool, entries, _, _, *modes = args(node)
    n = shape(node)[-1]
    add = next(iter(node.users)) if len(node.users) == 1 else None
    total, why = _base(add, node, x)
    if not why and (dtype(pool) not in DTYPE_NAMES or type(n) is not int):
        why = f"its factors are of {dtype(pool)}"
    if why or total is None or add is None:
        context.record.notes.append(f"{context.module_path(node)}: {Reason.BANK.value}: {why}")
        return
    if not context.allows(add):
        return
    _early(context, entries)
    activation, terms = args(total)
    width = None if target_of(devices.of(x.meta["val"].device.type)) is CPP else int(shape(entries)[1])
    with context.graph.inserting_before(add):
        joined = terms.plus(Banked(pool, entries, n, width, *modes))
        new = context.insert(operator_sum, (activation, joined), total, value(add))
    (entry,) = new.meta["gaws_entries"] = total.meta["gaws_entries"]
    entry.adapters += 1
    entry.operators = joined.describe()
    context.replace(add, new)
    context.erase(add)
    context.matched()


def _base(add: Node | None, node: Node, x: Node) -> tuple[Node | None, str]:
    """The sum that `node` is added to, or why there is none."""
    if add is None or not is_call(add, aten.add.Tensor) or add.kwargs:
        return None, "it is not added to one projection"
    made, bias = args(node)[3:5]
    total: Node = next((one for one in args(add) if one is not node), node)
    if not is_call(total, operator_sum):
        return None, "what it is added to is no projection of a generated kernel"
    activation, terms = args(total)
    if made is not total:
        return None, "it is not told what this projection makes"
    if set(total.users) != {add, node}:
        return None, "others read the projection too"
    if source_of(activation) is not source_of(x) or dtype(activation) != dtype(x):
        return None, "the projection reads another activation"
    if not same_sizes(shape(total), shape(add)) or dtype(total) != dtype(add) or dtype(node) != dtype(add):
        return None, "the projection has another shape or dtype"
    assert isinstance(terms, Sum)
    if terms.rowscale is not None or terms.opaque is not None:
        return None, "the projection's rows are scaled, or its base keeps its own matmul"
    if terms.bias is not (None if bias is None else readable(bias)):
        return None, "it is told another bias than the projection's"
    if terms.adapted:
        return None, "the projection has other adapters before it"
    return total, ""


def _early(context: Context, entries: Node) -> None:
    """Moves a module's part of the schedule up to the schedule, or to where a graph begins that is given one."""
    if is_call(entries, aten.select.int):
        schedule: Node = args(entries)[0]
        given = context.graph.find_nodes(op="placeholder")
        (given[-1] if schedule in given else schedule).append(entries)
        context.touch(entries)
