"""What a fused group spares: launches and bytes of its kernels, and of the operations that it stands for.

The operations are those of the graph as it was traced, one launch each, each reading its inputs from memory and
writing its result there; views cost nothing. That is what eager runs; Inductor would fuse the elementwise ones.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Node

from gawscompile.analysis.reading import args, dtype, is_view, shape
from gawscompile.ir import banked
from gawscompile.ir.records import Work
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES, OPERAND_DTYPES
from gawscompile.passes.context import Context
from gawscompile.planning.table import Program
from gawscompile.runtime.banked import BANKED
from gawscompile.verify.proof import cone, rewrites


def account(context: Context) -> None:
    """Give every group of ``context.record`` its `Work` before and after."""
    originals = {node: context.original(node) for node in context.graph.nodes}
    readers: dict[Node, int] = {}
    for origin in originals.values():
        if origin is not None:
            readers[origin] = readers.get(origin, 0) + 1
    for rewrite in rewrites(context):
        entries = rewrite.call.meta.get("gaws_entries", []) if rewrite.call else []
        if not rewrite.call or not entries or entries[0].group is None:
            continue
        wanted = [context.stands_for[node] for node in rewrite.nodes]
        inside, _ = cone(wanted, lambda node, own=wanted: node not in own and node in readers)
        x = args(rewrite.call)[0].meta["val"]
        tokens = _product(x.shape[:-1])
        program = Program.parse(args(rewrite.call)[2])
        group = context.record.groups[entries[0].group]
        group.before = _traced(inside)
        group.after = Work(program.target.launches(program.spec, program.plans[0]), str(_traffic(program.spec, tokens)))


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
