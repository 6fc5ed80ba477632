"""The reference executor: what a graph computes, before and after our passes, without any generated kernel.

Our operators run by their meaning, in fp32 as kernels do; `exact` runs a graph in fp64, where casts between floating
dtypes are identities, as `gawscompile.verify.proof` does. What the op would refuse (an operand of another shape or
dtype than its program says) is refused here too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_map_only

from gawscompile.analysis.reading import is_cast
from gawscompile.codegen import cpp_attention
from gawscompile.ir.recipe import hoisted, iota
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operands_of, operator_group, operator_sum, project
from gawscompile.ir.types import DTYPE_NAMES, DTYPES, OPERAND_DTYPES
from gawscompile.planning.table import Program as Planned
from gawscompile.runtime import attention
from gawscompile.runtime.banked import SCHEDULE, SNAPSHOT
from gawscompile.runtime.ops import OPS


class Refused(Exception):
    """A call of the op that its dispatcher would not take, or a node that is not what it says it is."""


@dataclass
class Ran:
    """Outputs of a graph, and its inputs as they are after."""

    outputs: list[Any]
    inputs: list[Any]


def run(graph: Graph, holder: Any, inputs: Sequence[Any], exact: bool = False, truthful: bool = False) -> Ran:
    """Run `graph` on `inputs`, which it may write to. `truthful`: raise `Refused` where a node is not of the
    shape and the dtype that its ``meta["val"]`` says, and one that is returned of its strides."""
    given = iter(inputs)
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = _wide(operator.attrgetter(str(node.target))(holder), exact)
            elif node.op == "call_function":
                values[node] = _call(node, *map_arg((node.args, dict(node.kwargs)), values.__getitem__), exact)
                if truthful:
                    _check(node, values[node])
    (results,) = next(iter(graph.find_nodes(op="output"))).args
    found: Any = map_arg(results, values.__getitem__)
    return Ran(list(found), list(inputs))


def _wide(value: Any, exact: bool) -> Any:
    return value.double() if exact and isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _call(node: Node, inputs: Any, keywords: Any, exact: bool) -> Any:
    target: Any = node.target
    if exact and is_cast(node):
        return inputs[0]
    if "device" in keywords:
        keywords = {**keywords, "device": "cpu"}
    if target is torch.ops.aten.view.default:
        target = torch.ops.aten.reshape.default  # Inductor's views are of any layout
    if target is torch.ops.prims.iota.default:
        return iota(*inputs, **keywords)
    if target in (operator_sum, operator_group):
        return target(inputs[0].float(), map_aggregate(inputs[1], _single))
    if target is project:
        x, sums, swiglu, _ = inputs
        return kernel(x, operands_of(sums), str(KernelSpec.of(x, sums, swiglu)))
    if target in OPS:
        program = Planned.parse(inputs[2])
        if exact:
            return program.run(inputs[0], inputs[1], hoisted)
        return kernel(inputs[0], program.operands(inputs[1], hoisted), str(program.spec))
    if target is SNAPSHOT:
        return SCHEDULE(*inputs)
    if target is attention.ATTEND:
        return cpp_attention.result_of(inputs[0]).copy_(attention.meaning(*map(_single, inputs)))
    return tree_map_only(torch.Tensor, lambda t: _wide(t, exact), target(*inputs, **keywords))


def _single(t: Any) -> Any:
    return t.float() if isinstance(t, torch.Tensor) and t.dtype in DTYPE_NAMES else t


def kernel(x: torch.Tensor, operands: list[torch.Tensor], spec: str) -> list[torch.Tensor]:
    """What a generated kernel computes: everything in fp32, rounded once. Raises `Refused`, naming the operand."""
    parsed = KernelSpec.parse(spec)
    if x.dtype != DTYPES[parsed.x] or x.shape[-1] != parsed.k:
        raise Refused(f"x is {tuple(x.shape)} {x.dtype} in {spec}")
    m = math.prod(x.shape[:-1])
    for operand, tensor in zip(parsed.operands(), operands, strict=True):
        dtype = OPERAND_DTYPES[operand.dtype]
        shape = tuple(m if size == "m" else size for size in operand.shape)
        found = (math.prod(tensor.shape[:-1]), tensor.shape[-1]) if operand.activation else tuple(tensor.shape)
        shape = found if operand.table else shape  # any
        found = (tensor.numel(),) if operand.flat else found
        if tensor.dtype != dtype or found != shape:
            raise Refused(f"{operand.name} is {tuple(tensor.shape)} {tensor.dtype} in {spec}")
    made = project(x.float(), parsed.bound([_single(t) for t in operands]), parsed.swiglu, None)
    return [y.to(DTYPES[out]).contiguous() for y, (_, out) in zip(made, parsed.outputs, strict=True)]


def _check(node: Node, value: Any) -> None:
    said, returned = node.meta.get("val"), any(user.op == "output" for user in node.users)
    for found, fake in zip(*((v if isinstance(v, (list, tuple)) else [v]) for v in (value, said)), strict=False):
        if not isinstance(found, torch.Tensor) or not isinstance(fake, torch.Tensor):
            continue
        if not all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
            continue
        integers = not (found.is_floating_point() or fake.is_floating_point())  # an iota is wider than it says
        same = found.shape == fake.shape and (integers or found.dtype == fake.dtype)
        if not same or (returned and strides(found) != strides(fake)):
            is_, was = ((tuple(t.shape), t.stride(), t.dtype) for t in (found, fake))
            raise Refused(f"{node.format_node()} is {is_}, and says that it is {was}")


def strides(t: torch.Tensor) -> tuple[int, ...]:
    """Of the sizes that have more than one place; none of a tensor without numbers."""
    return tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1) if t.numel() else ()
