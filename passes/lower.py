"""Planned groups become calls of the op that runs their kernels; every linear left over becomes aten again.

before::

    fused  = operators.project(x, (Sum((Dense(W), LowRank(A, B, 2.0)), 'f32'),), False, program)
    linear = operators.linear(x, W)

after::

    fused = torch.ops.gaws.project(x, [W, A, B], "gemv_cpp | k=576 x=f32; n=576 w=f32 out=f32 lora(r=16 f32 s=2.0)")
    mm    = aten.view(aten.mm(aten.view(x, [m, k]), aten.permute(W, [1, 0])), [..., n])

Here text begins: the program is what the op takes, and what caches and reports keep. Kernels start to build, in the
background, while Inductor compiles the rest.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from gawscompile.analysis.reading import args
from gawscompile.ir.sums import linear, operands_of, project
from gawscompile.passes.context import Context
from gawscompile.passes.hoist_weights import arguments
from gawscompile.passes.spell_out import spell_out
from gawscompile.planning.table import Program
from gawscompile.runtime import ops


def run(graph: Graph, context: Context) -> None:
    programs: dict[str, None] = {}
    for node in graph.find_nodes(op="call_function", target=project):
        x, sums, _, program = args(node)
        if not isinstance(program, Program) or not context.allows(node):
            continue  # choose_plan is disabled, or fuel has run out
        taken, _ = arguments(operands_of(sums))
        node.args = (x, taken, str(program))
        inlined = context.options.transparent and program.stateless
        node.target = torch.ops.gaws.project_traced.default if inlined else torch.ops.gaws.project.default
        programs[str(program)] = None
        context.touch(node)
        context.matched()
    for node in graph.find_nodes(op="call_function", target=linear):
        if context.allows(node):
            told = node in context.seen or context.record.linear(context.module_path(node)) is not None
            spell_out(context, node, seen=told)
    for program in programs:
        ops.prepare(program)
