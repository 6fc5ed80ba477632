"""Reading a graph: what a node is, its value, shape and dtype, and who reads it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from gawscompile.ir.recipe import hoisted
from gawscompile.ir.sizes import same_size, same_sizes, settled
from gawscompile.ir.sums import linear

aten, prims = torch.ops.aten, torch.ops.prims

ROUNDING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
MATRIX_MATHS = (aten.mm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, linear)
ONES = {aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
TRANSPOSES = {aten.permute.default, aten.t.default, aten.transpose.int}


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def args(node: Node) -> tuple[Any, ...]:
    """A node's arguments, without fx's twenty-way union that no reader can use."""
    return node.args


def shape(node: Node) -> tuple[Any, ...]:
    """A node's sizes. A symbolic one that a guard has settled (``mm`` with a weight of 8 columns) is a number."""
    return tuple(size if type(size) is int else settled(size) for size in node.meta["val"].shape)


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def same_value(a: Any, b: Any) -> bool:
    """Shape, dtype and device of two fake values agree."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return a.dtype == b.dtype and a.device == b.device and same_sizes(a.shape, b.shape)


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_cast(node: Any) -> bool:
    """Whether `node` is a cast that only rounds or widens. One to float8 quantises: another number comes back."""
    made, source = (value(node), value(args(node)[0])) if is_call(node, *CASTS) else (None, None)
    if made is None or source is None or made.device != source.device:
        return False
    return {made.dtype, source.dtype} <= ROUNDING


def is_parameter(node: Any) -> bool:
    """A graph input (every parameter and buffer is one), one without its dimensions of size one (a convolution's weight
    of one position), or what `hoist_weights` has made of them."""
    while is_call(node, *VIEWS) and value(node) is not None and value(args(node)[0]) is not None:
        wide = [shape(one) for one in (node, args(node)[0])]
        if not same_sizes(*(tuple(size for size in sizes if not same_size(size, 1)) for sizes in wide)):
            return False
        node = args(node)[0]
    return isinstance(node, Node) and (node.op == "placeholder" or is_call(node, hoisted))


def of_parameters(node: Any) -> bool:
    """Whether a matrix is computed from graph inputs alone, by sums, products and scales."""
    pending, seen = [node], 0
    while pending:
        node, seen = pending.pop(), seen + 1
        if is_parameter(node) or not isinstance(node, Node):
            continue
        if seen > 64 or not is_call(node, *CASTS, *TRANSPOSES, *MATRIX_MATHS):
            return False
        pending += node.all_input_nodes
    return True


def transposed(node: Any) -> Node | None:
    """The matrix of which `node` is the transpose, if it is one."""
    if not is_call(node, *TRANSPOSES):
        return None
    source = args(node)[0]
    if value(source) is None or len(shape(source)) != 2:
        return None
    if node.target is aten.permute.default and [d % 2 for d in args(node)[1]] != [1, 0]:
        return None
    if node.target is aten.transpose.int and args(node)[1] % 2 == args(node)[2] % 2:
        return None
    return source


def is_view(node: Any) -> bool:
    """Whether `node` shares memory with what it is made of."""
    if is_call(node, *VIEWS, operator.getitem):
        return True
    target = node.target if isinstance(node, Node) and node.op == "call_function" else None
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(found.alias_info is not None and not found.alias_info.is_write for found in target._schema.returns)


def with_views(node: Node) -> list[Node]:
    """`node` and all that is a view of it."""
    found = [node]
    for one in found:  # grows
        found += [user for user in one.users if is_view(user) and user not in found]
    return found


def returned(node: Node) -> bool:
    """Whether `node` or a view of it leaves the graph: whose memory it is, and its strides, are part of the answer."""
    return any(user.op == "output" for one in with_views(node) for user in one.users)


def empty_like(x: Node, sizes: tuple[Any, ...], out: torch.dtype) -> torch.Tensor:
    """A contiguous fake of `sizes` on x's device, under x's fake mode."""
    fake = x.meta["val"]
    with fake.fake_mode:
        return torch.empty(sizes, dtype=out, device=fake.device)
