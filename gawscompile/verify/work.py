"""What a fused group spares: launches and bytes of its kernels, and of the operations that it stands for.

The operations are those of the graph as it was traced, one launch each, each reading its inputs from memory and
writing its result there; views cost nothing. That is what eager runs; Inductor would fuse the elementwise ones.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, dtype, is_view, shape
from gawscompile.ir import banked
from gawscompile.ir.records import GroupRecord, Work
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES, OPERAND_DTYPES
from gawscompile.passes.context import Context
from gawscompile.planning.table import Program
from gawscompile.runtime.banked import BANKED
from gawscompile.runtime.ops import OPS
from gawscompile.verify.proof import cone, rewrites


def account(context: Context) -> None:
    """Give every group of ``context.record`` its `Work` before and after. Where one group's result goes into another's
    alone, as gradients of one activation are added up, the operations that both stand for are counted with the last."""
    originals = {node: context.original(node) for node in context.graph.nodes}
    readers: dict[Node, int] = {}
    for origin in originals.values():
        if origin is not None:
            readers[origin] = readers.get(origin, 0) + 1
    for rewrite in rewrites(context):
        if not rewrite.call or (group := _group(context, rewrite.call)) is None:
            continue
        wanted = [context.stands_for[node] for node in rewrite.nodes]
        inside, _ = cone(wanted, lambda node, own=wanted: node not in own and node in readers)
        group.before, group.after = _traced(inside), _launched(rewrite.call)
    for call in (node for node in context.graph.nodes if node.target in OPS):
        group = _group(context, call)
        if group is not None and group.before is None and call.users:
            group.before, group.after = Work(0, "0"), _launched(call)


def total(graph: Graph) -> Work:
    """Of all operations and kernels of a graph, rewritten or not."""
    calls = [node for node in graph.nodes if node.target in OPS]
    parts = [_traced([node for node in graph.nodes if node not in calls]), *map(_launched, calls)]
    return Work(sum(part.launches for part in parts), str(sum(sympy.sympify(part.bytes) for part in parts)))


def _group(context: Context, call: Node) -> GroupRecord | None:
    entries = call.meta.get("gaws_entries", [])
    return context.record.groups[entries[0].group] if entries and entries[0].group is not None else None


def _launched(call: Node) -> Work:
    """What a lowered group's kernels cost, by the plan of the first row."""
    x, _, text = args(call)
    program, tokens = Program.parse(text), _product(x.meta["val"].shape[:-1])
    return Work(program.target.launches(program.spec, program.plans[0]), str(_traffic(program.spec, tokens)))


def _traced(nodes: list[Node]) -> Work:
    launches, total = 0, sympy.Integer(0)
    for node in nodes:
        launches_nothing = is_view(node) or not isinstance(node.target, torch._ops.OpOverload)
        if node.op != "call_function" or launches_nothing:
            continue
        launches += 1
        read = list(node.all_input_nodes)
        if node.target is BANKED:  # of the pool, what a row's adapters take of it
            x, pool = args(node)[:2]
            read.remove(pool)
            total += banked.usual_bytes(dtype(pool), shape(x)[-1], shape(node)[-1])
        total += sum(_bytes(value.meta.get("val")) for value in (node, *read))
    return Work(launches, str(total))


def _bytes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return _product(value.shape) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _product(sizes: Any) -> Any:
    return math.prod((s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in sizes), start=1)


def _traffic(spec: KernelSpec, m: Any) -> Any:
    """Bytes of x, of all operands and of the outputs, once each."""
    total = m * spec.k * DTYPES[spec.x].itemsize
    total += sum(p.banked.usual_bytes(spec.k) for p in spec.projections if p.banked)
    for one in spec.operands():
        if one.table:
            continue
        total += OPERAND_DTYPES[one.dtype].itemsize * math.prod(m if n == "m" else int(n) for n in one.shape)
    return total + sum(m * n * DTYPES[dtype].itemsize for n, dtype in spec.outputs)
