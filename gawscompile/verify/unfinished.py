"""A part of the pipeline: passes that are disabled, fuel that ends between two rewrites, and rewrites that failed.

Between any two rewrites the graph is a program (`passes.spell_out`). What a cut pipeline leaves of our nodes is spelled
out in aten, and Inductor compiles it. So the first prefix of the pipeline that gives a wrong answer ends with the
rewrite that is wrong (`gawscompile bisect`), whichever pass it is of.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from gawscompile.analysis.identity import through_casts
from gawscompile.analysis.reading import PRODUCTS, args, dtype, is_call, of_parameters, shape
from gawscompile.ir.recipe import hoisted
from gawscompile.ir.records import LinearRecord, Reason
from gawscompile.ir.sums import OURS, linear, operator_group, operator_sum, project
from gawscompile.passes.context import Context
from gawscompile.passes.spell_out import spell_out

NEXT: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(PRODUCTS, ("canonicalize", "recover_operators")),  # `lower` spells what the first alone made
    linear: ("recover_operators", "lower"),
    operator_sum: ("group_siblings",),
    operator_group: ("fuse_zflora", "fuse_kronecker"),
    project: ("choose_plan", "lower"),
}
"""The passes that would have gone on with a node."""


def finish(context: Context) -> None:
    """Spell out what disabled passes, spent fuel and failed rewrites left of our operators in ``context.graph``, and
    record why."""
    for node in list(context.graph.nodes):
        if is_call(node, *OURS):
            for entry in _entries(context, node):
                _leave(context, entry, _cause(context, node) or _consequence(context))
            spell_out(context, node)
        elif is_call(node, hoisted):
            spell_out(context, node)
        elif _unseen(context, node) and (cause := _cause(context, node)):
            sizes = (shape(node)[-1], shape(args(node)[-2])[-1])
            _leave(context, context.found(node, sizes, dtype(node)), cause)


def _unseen(context: Context, node: Node) -> bool:
    """Whether it is a linear, as torch spells it, that no pass has seen."""
    if not is_call(node, *PRODUCTS) or not of_parameters(args(node)[-1]):
        return False
    return node not in context.seen and context.record.linear(context.module_path(node)) is None


def _entries(context: Context, node: Node) -> list[LinearRecord]:
    if node.target is not linear:
        return list(node.meta["gaws_entries"])
    if node in context.seen:
        return []
    path = context.module_path(node)  # that of others too, where no module tells them apart
    entries = [entry for entry in context.record.linears if entry.path == path]
    if not entries:
        weight = through_casts(args(node)[1])
        entries = [context.found(node, shape(weight), dtype(weight))]
    # others are fused, or a pass said why not already
    return [entry for entry in entries if entry.group is None and entry.reason in (None, Reason.FUEL.name)][:1]


Cause = tuple[str, Reason, str]
"""A stage, and why it did not go on with a node."""


def _cause(context: Context, node: Node) -> Cause | None:
    if failed := context.failure(node, NEXT[node.target]):
        return failed.partition(",")[0], Reason.INTERNAL_ERROR, failed
    if stages := [stage for stage in NEXT[node.target] if stage in context.options.disable]:
        return stages[0], Reason.DISABLED, f"options={{'disable': {stages}}}"
    if context.ended:
        how = f"{context.options.fuel} rewrites went ahead, the last in {_last(context)}"
        return context.ended, Reason.FUEL, how
    return None


def _consequence(context: Context) -> Cause:
    """Where nothing was to be done with a node itself: it would have been a part of what failed, or is disabled."""
    if failed := next(iter(context.barred.values()), None):
        return failed.partition(",")[0], Reason.INTERNAL_ERROR, failed
    return context.options.disable[0], Reason.DISABLED, f"options={{'disable': {list(context.options.disable)}}}"


def _leave(context: Context, entry: LinearRecord, cause: Cause) -> None:
    context.stage, reason, detail = cause
    if entry.group is not None:
        context.record.drop_group(entry.group)
    context.reject(entry, reason, detail)


def _last(context: Context) -> str:
    return context.matches[-1][0] if context.matches else "no pass"
