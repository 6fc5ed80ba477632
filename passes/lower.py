"""Planned groups become calls of the op that runs their kernels; every linear left over becomes aten again.

before::

    fused  = operators.project(x, [...], "gemv_cpp | k=576 x=f32; …")
    linear = operators.linear(x, W)

after::

    fused = torch.ops.gaws.project(x, [...], "gemv_cpp | k=576 x=f32; …")
    mm    = aten.view(aten.mm(aten.view(x, [m, k]), aten.permute(W, [1, 0])), [..., n])

Kernels start to build here, in the background, while Inductor compiles the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.ir.operators import linear
from gawscompile.ir.project import project
from gawscompile.passes.context import Context, args, aten, dtype, empty_like, shape
from gawscompile.planning.table import Program
from gawscompile.runtime import ops


def run(graph: Graph, context: Context) -> None:
    programs: dict[str, None] = {}
    for node in graph.find_nodes(op="call_function", target=project):
        program = args(node)[2]
        if " | " not in program or not context.allows(node):
            continue  # choose_plan is disabled, or fuel has run out
        transparent = context.options.transparent and is_transparent(Program.parse(program))
        node.target = torch.ops.gaws.project_traced.default if transparent else torch.ops.gaws.project.default
        programs[program] = None
        context.touch(node)
        context.matched()
    for node in graph.find_nodes(op="call_function", target=linear):
        if context.allows(node):
            _spell(graph, context, node)
    for program in programs:
        ops.prepare(program)


def is_transparent(program: Program) -> bool:
    """Whether Inductor may see the kernels themselves: one plan is left, so that the choice adds no guard, and it keeps
    nothing between calls."""
    (plan, *others) = [plan for plan, _ in program.table.rows]
    return program.emitter == "triton" and not others and not plan.startswith("single_launch")


def _spell(graph: Graph, context: Context, node: Node) -> None:
    """A linear as AOTAutograd writes it."""
    x, weight, *bias = args(node)
    with graph.inserting_before(node):
        n, k = (_size(graph, context, node, weight, d) for d in (0, 1))
        turned = context.transpose(weight, node)
        flat, leading = x, shape(x)[:-1]
        if len(leading) != 1:
            rows = _rows(graph, context, node, x)
            m = _product(leading)
            flat = context.insert(aten.view.default, (x, [rows, k]), node, empty_like(x, (m, shape(x)[-1]), dtype(x)))
        value = empty_like(x, (_product(leading), shape(weight)[0]), dtype(node))
        if bias:
            new = context.insert(aten.addmm.default, (bias[0], flat, turned), node, value)
        else:
            new = context.insert(aten.mm.default, (flat, turned), node, value)
        if len(leading) != 1:
            sizes = [_size(graph, context, node, x, d) for d in range(len(leading))]
            new = context.insert(aten.view.default, (new, [*sizes, n]), node, empty_like(x, shape(node), dtype(node)))
    product = args(new)[0] if len(leading) != 1 else new
    if "gaws_entries" in node.meta or context.record.linear(context.module_path(node)) is not None:
        product.meta["gaws_entries"] = node.meta.get("gaws_entries", [])  # it was seen
    context.replace(node, new)
    context.erase(node)


def _product(sizes: tuple[Any, ...]) -> Any:
    m: Any = 1
    for size in sizes:
        m = m * size
    return m


def _size(graph: Graph, context: Context, like: Node, x: Node, d: int) -> Any:
    """Dimension `d` of x as an argument: a number, or a node where it is symbolic."""
    size = shape(x)[d]
    if isinstance(size, int):
        return size
    return context.insert(aten.sym_size.int, (x, d), like, size)


def _rows(graph: Graph, context: Context, like: Node, x: Node) -> Any:
    """The product of x's leading dimensions as an argument."""
    import operator

    total: Any = 1
    for d in range(len(shape(x)) - 1):
        size = _size(graph, context, like, x, d)
        if isinstance(total, int) and isinstance(size, int):
            total = total * size
        elif isinstance(total, int) and total == 1:
            total = size
        else:
            left = total.meta["val"] if isinstance(total, Node) else total
            right = size.meta["val"] if isinstance(size, Node) else size
            total = context.insert(operator.mul, (total, size), like, left * right)
    return total
