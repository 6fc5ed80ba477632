"""A plan table for every fused group, from the cost model, symbolic in the number of tokens.

before::

    fused = operators.project(x, [...], "k=576 x=bf16; …")

after::

    fused = operators.project(x, [...], "gemv_cpp<=31, gemm_accumulate | k=576 x=bf16; …")

or, on a GPU, ``triton single_launch[8]<=2, fused_tile<=96, gemm_accumulate | …``. Where the number of tokens m is
known, the table has one row; where it is symbolic, the op picks its row at run time and no guard is added. A group
without adapters whose plan would be the library's matmul anyway is given back to Inductor as the linears that it was.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.ir.operators import linear
from gawscompile.ir.project import project
from gawscompile.ir.records import GroupRecord, Reason
from gawscompile.ir.spec import KernelSpec
from gawscompile.passes.context import Context, args, aten, dtype, empty_like, prims, shape
from gawscompile.passes.hoist_weights import arguments
from gawscompile.planning import devices
from gawscompile.planning.cost import plan
from gawscompile.planning.table import PlanTable, Program


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=project):
        if not context.allows(node):
            continue
        x, operands, text = args(node)
        spec = KernelSpec.parse(text)
        planned = plan(spec, devices.of(x.meta["val"].device.type))
        tokens = _tokens(x)
        table = planned.table
        if isinstance(tokens, int):
            table = PlanTable(((table.pick(tokens), None),))
        entries = node.meta["gaws_entries"]
        taken, derived = arguments(operands)
        if not derived and not any(p.adapted for p in spec.projections) and table.rows[0][0] == "gemm_accumulate":
            _give_back(graph, context, node, spec)
            for entry in entries:
                context.reject(entry, Reason.LIBRARY, f"m = {tokens}: {planned.compare(tokens)}")
            continue
        tuned = planned.emitter == "triton" and context.options.autotune
        program = Program(table, spec, planned.emitter, tuned, derived)
        node.args = (x, taken, str(program))
        context.touch(node)
        group = GroupRecord(
            index=len(context.record.groups),
            members=[entry.path for entry in entries],
            tokens=str(tokens),
            plan=str(table),
            spec=str(spec),
            kernel=f"{planned.emitter}:{planned.kernel}",
            costs={name: str(cost) for name, cost in planned.costs.items()},
            prefix=program.prefix,
            suffix=program.suffix,
            table=str(planned.table),
        )
        context.record.groups.append(group)
        for entry in entries:
            entry.status, entry.group, entry.plan, entry.kernel = "fused", group.index, group.plan, group.kernel
            entry.reason = entry.detail = entry.stage = None
        context.matched()


def _tokens(x: Node) -> Any:
    """m as an int, or as the symbolic expression of x's leading dimensions."""
    m: Any = 1
    for size in shape(x)[:-1]:
        m = m * size
    return m


def _give_back_product(graph: Graph, context: Context, node: Node, spec: KernelSpec) -> None:
    """Two outputs again, and their product after them."""
    (only,) = node.users
    shaped = only.meta["val"]
    node.meta["val"] = [shaped, shaped]
    with graph.inserting_before(only):
        gate, up = (context.insert(operator.getitem, (node, i), only, shaped) for i in (0, 1))
        cast, wide = prims.convert_element_type.default, shaped.to(torch.float32)
        source = context.insert(cast, (gate, torch.float32), only, wide)
        weight = context.insert(aten.sigmoid.default, (source,), only, wide)
        silu = context.insert(aten.mul.Tensor, (source, weight), only, wide)
        narrow = context.insert(cast, (silu, shaped.dtype), only, shaped)
        new = context.insert(aten.mul.Tensor, (narrow, up), only, shaped)
    context.replace(only, new)
    context.erase(only)


def _give_back(graph: Graph, context: Context, node: Node, spec: KernelSpec) -> None:
    """Plain linears again, in canonical spelling; `lower` spells them in aten."""
    x, operands, _ = args(node)
    if spec.swiglu:
        _give_back_product(graph, context, node, spec)
        spec = dataclasses.replace(spec, swiglu=False)
    named = dict(zip((o.name for o in spec.operands()), operands, strict=True))
    for item in list(node.users):
        i = args(item)[1]
        assert item.target is operator.getitem
        with graph.inserting_before(item):
            weight = named[f"w{i}"]
            if spec.projections[i].transposed:
                weight = context.transpose(weight, item)
            reads: tuple[Any, ...] = (x, weight)
            if f"bias{i}" in named:
                bias = named[f"bias{i}"]
                if dtype(bias) != dtype(x):  # the library's addmm takes one dtype
                    cast = prims.convert_element_type.default
                    bias = context.insert(cast, (bias, dtype(x)), item, bias.meta["val"].to(dtype(x)))
                reads = (*reads, bias)
            new = context.insert(linear, reads, item, empty_like(x, shape(item), dtype(item)))
            new.meta["gaws_entries"] = []  # the group's are rejected
            if f"res{i}" in named:
                new = context.insert(aten.add.Tensor, (named[f"res{i}"], new), item, new.meta["val"])
        context.replace(item, new)
        context.erase(item)
    context.erase(node)
