"""A part of the pipeline: passes that are disabled, fuel that ends between two rewrites, and rewrites that failed.

Between any two rewrites the graph is a program: `linear`, `operator_sum`, `operator_group` and `project` are functions
with a meaning. What a cut pipeline leaves of them is spelled out in aten by tracing that meaning, and Inductor compiles
it. So the first prefix of the pipeline that gives a wrong answer ends with the rewrite that is wrong (`gawscompile
bisect`), whichever pass it is of.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from gawscompile.ir.operators import linear, operator_group, operator_sum
from gawscompile.ir.project import project
from gawscompile.ir.recipe import hoisted
from gawscompile.ir.records import LinearRecord, Reason
from gawscompile.passes.context import Context, args, aten, dtype, of_parameters, shape, through_casts
from gawscompile.planning.table import Program

NEXT: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(
        (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
        ("canonicalize", "recover_operators"),  # without the second, `lower` spells what the first made
    ),
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
        if node.op == "call_function" and node.target in (linear, operator_sum, operator_group, project):
            for entry in _entries(context, node):
                _leave(context, entry, _cause(context, node) or _consequence(context))
            _spell_out(context, node)
        elif node.op == "call_function" and node.target is hoisted:
            _spell_out(context, node)
        elif _unseen(context, node) and (cause := _cause(context, node)):
            sizes = (shape(node)[-1], shape(args(node)[-2])[-1])
            _leave(context, context.found(node, sizes, dtype(node)), cause)


def _unseen(context: Context, node: Node) -> bool:
    """Whether it is a linear, as torch spells it, that no pass has seen."""
    product = node.op == "call_function" and node.target in NEXT and of_parameters(args(node)[-1])
    seen = "gaws_entries" in node.meta or context.record.linear(context.module_path(node)) is not None
    return product and not seen


def _entries(context: Context, node: Node) -> list[LinearRecord]:
    known = node.meta.get("gaws_entries")
    if known is not None or node.target is not linear:
        return known or []
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


def _spell_out(context: Context, node: Node) -> None:
    """Replace `node` by the aten operations that its meaning consists of."""
    reads = node.all_input_nodes

    def meaning(*tensors: Any) -> Any:
        inputs: Any = map_arg(node.args, dict(zip(reads, tensors, strict=True)).__getitem__)
        if node.target is project and " | " in inputs[2]:  # without its plans
            program = Program.parse(inputs[2])
            inputs = (inputs[0], program.operands(inputs[1], hoisted), str(program.spec))
        return cast(Any, node.target)(*inputs)

    values = [read.meta["val"] for read in reads]
    with values[0].fake_mode, torch.no_grad():
        # not the nodes' own: passes give several nodes one, and the trace would take those for the same tensor
        fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        traced = make_fx(meaning, decomposition_table=select_decomp_table())(*fakes).graph
    with context.graph.inserting_before(node):
        copied = dict(zip(traced.find_nodes(op="placeholder"), reads, strict=True))
        results = cast(Any, context.graph.graph_copy(traced, copied))
    for new in set(copied.values()) - set(reads):
        new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
    if node.target in (operator_group, project):
        for item in list(node.users):
            assert item.target is operator.getitem
            context.replace(item, results[args(item)[1]])
            context.erase(item)
    else:
        context.replace(node, results)
    context.erase(node)
