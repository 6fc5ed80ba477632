"""A plan table for every fused group, from the cost model, symbolic in the number of tokens.

before::

    fused = operators.project(x, (Sum(…), …), swiglu)

after::

    fused = operators.project(x, (Sum(…), …), swiglu, Program("gemv_cpp<=31, gemm_accumulate | k=576 x=bf16; …"))

or, on a GPU, ``triton single_launch[8]<=2, fused_tile<=96, gemm_accumulate | …``. Where the number of tokens m is
known, the table has one row; where it is symbolic, the op picks its row at run time and no guard is added. A group
without adapters whose plan would be the library's matmul anyway is given back to Inductor as the linears that it was.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, shape
from gawscompile.ir.records import GroupRecord, Reason
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operands_of, project
from gawscompile.passes.context import Context
from gawscompile.passes.hoist_weights import arguments
from gawscompile.passes.spell_out import spell_out
from gawscompile.planning import devices
from gawscompile.planning.cost import Planned, plan
from gawscompile.planning.table import PlanTable, Program


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=project):
        if not context.allows(node):
            continue
        x, sums, swiglu, _ = args(node)
        spec = KernelSpec.of(x, sums, swiglu)
        planned = plan(spec, devices.of(x.meta["val"].device.type))
        tokens = _tokens(x)
        table = planned.table
        if isinstance(tokens, int):
            table = PlanTable(((table.pick(tokens), None),))
        _, derived = arguments(operands_of(sums))
        program = Program(table, spec, planned.target, planned.target.tunes and context.options.autotune, derived)
        entries = node.meta["gaws_entries"]
        adapted = derived or any(total.adapted for total in sums)
        packed = any(total.packed for total in sums)  # whose own spelling is slower than ours
        if not adapted and not packed and program.target.kind(program.plans[0]).uses_library:
            spell_out(context, node, seen=True)
            for entry in entries:
                context.reject(entry, Reason.LIBRARY, f"m = {tokens}: {planned.compare(tokens)}")
            continue
        node.args = (x, sums, swiglu, program)
        context.touch(node)
        _record(context, entries, planned, program, tokens)
        context.matched()


def _record(context: Context, entries: list[Any], planned: Planned, program: Program, tokens: Any) -> None:
    group = GroupRecord(
        index=len(context.record.groups),
        members=[entry.name for entry in entries],
        tokens=str(tokens),
        plan=str(program.table),
        spec=str(program.spec),
        kernel=f"{program.target.name}:{planned.kernel}",
        costs={name: str(cost) for name, cost in planned.costs.items()},
        prefix=program.prefix,
        suffix=program.suffix,
        table=str(planned.table),
    )
    context.record.groups.append(group)
    for entry in entries:
        entry.status, entry.group, entry.plan, entry.kernel = "fused", group.index, group.plan, group.kernel
        entry.reason = entry.detail = entry.stage = None


def _tokens(x: Node) -> Any:
    """m as an int, or as the symbolic expression of x's leading dimensions."""
    m: Any = 1
    for size in shape(x)[:-1]:
        m = m * size
    return m
