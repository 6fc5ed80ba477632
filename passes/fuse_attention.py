"""Attention of few queries reads keys and values where the cache has them.

before::

    where  = aten.where(mask, 0.0, -inf)
    k      = aten.view(aten.clone(aten.expand(aten.unsqueeze(keys, 2), [B, G, H // G, L, D])), [B, H, L, D])
    v      = …                                                             # the same of the cache's values
    sdpa   = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=where, scale=s)
    out    = sdpa[0]

after::

    out    = torch.ops.gaws.attend(q, keys, values, mask, s, "attend d=64 x=bf16")

With grouped queries, Inductor writes every key and value out once for each head that reads it, in every step, and a
mask of the activation's dtype beside them. The kernel does not need them (`codegen/attention.cpp`; on a GPU
flash-decoding, `codegen/triton_attention.py`). Many queries share turned keys on a CPU
(`codegen/attention_tiles.cpp`); the library keeps them on a GPU, and where it has instructions for products of 16 bits.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import VIEWS, args, aten, dtype, is_call, shape, value
from gawscompile.codegen import cpp_attention
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.planning import devices
from gawscompile.planning.targets import CPP, Target, target_of
from gawscompile.runtime import attention

SDPA = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""Their first result is the attention's; the others, which training reads, differ."""


def run(graph: Graph, context: Context) -> None:
    for target in SDPA:
        for node in graph.find_nodes(op="call_function", target=target):
            if context.looks_at(node):
                _attention(context, node)


def _attention(context: Context, node: Node) -> None:
    q, keys, values, mask, scale = _parts(node)
    target = target_of(devices.of(q.meta["val"].device.type))
    causal = bool(_given(node).get("is_causal"))
    why = _refusal(node, q, keys, values, mask, _takes_many(target, q))
    if context.options.transparent and target is not CPP:
        why = "on a GPU it is an op of ours, and the graph is to be transparent"
    if why is not None:
        note = f"{Reason.ATTENTION.value}: {why}"
        if note not in context.record.notes:
            context.record.notes.append(note)
        return
    (item,) = node.users
    if not context.allows(item):
        return
    kernel = cpp_attention.kernel(shape(q)[3], DTYPE_NAMES[dtype(q)], causal)
    with context.graph.inserting_before(node):
        given = (q, keys, values, mask, scale, kernel)
        new = context.insert(attention.ATTEND, given, node, item.meta["val"])
    context.replace(item, new)
    context.erase(item)
    context.matched()
    attention.start(kernel, target)


def _parts(node: Node) -> tuple[Any, ...]:
    """Queries, keys and values before they are repeated, mask, scale."""
    given = _given(node)
    q, k, v, scale = given["query"], given["key"], given["value"], given.get("scale")
    mask = given.get("attn_mask") or given.get("attn_bias")
    if not isinstance(scale, float):
        features = shape(q)[3]
        scale = features**-0.5 if type(features) is int and features else None
    times = [_repeated(one) for one in (k, v)]
    if times[0][1:] == times[1][1:]:
        k, v = times[0][0], times[1][0]
    return q, k, v, _seen(mask), scale


def _given(node: Node) -> dict[str, Any]:
    """A call's arguments by their names."""
    names = [argument.name for argument in cast(Any, node.target)._schema.arguments]
    return {**dict(zip(names, args(node), strict=False)), **node.kwargs}


def _takes_many(target: Target, q: Node) -> bool:
    """Whether kernels take any number of queries, and causal ones."""
    return target is CPP and devices.multiplies_in_fp32(DTYPE_NAMES.get(dtype(q), ""))


def _refusal(node: Node, q: Node, keys: Node, values: Node, mask: Node | None, many: bool) -> str | None:
    """Why the library keeps it, if it does."""
    given = _given(node)
    if len(node.users) != 1 or not is_call(item := next(iter(node.users)), operator.getitem) or args(item)[1] != 0:
        return "something reads its log-sum-exp"
    if any(given.get(name) for name in ("dropout_p", "return_debug_mask")):
        return "it drops out"
    if given.get("is_causal") and not many:
        return "it is causal"
    rows, heads, queries, features = shape(q)
    if not many and (type(queries) is not int or queries > cpp_attention.FEW):
        count = queries if type(queries) is int else "any number of"
        return f"{count} queries; kernels take up to {cpp_attention.FEW}"
    if type(features) is not int or not 0 < features <= cpp_attention.MOST_FEATURES:
        return f"heads of {features} features; kernels take up to {cpp_attention.MOST_FEATURES}"
    if dtype(q) not in DTYPE_NAMES or any(dtype(one) != dtype(q) for one in (keys, values)):
        return f"{dtype(q)}, {dtype(keys)} and {dtype(values)}"
    groups = shape(keys)[1]
    if type(groups) is not int or type(heads) is not int or heads % groups or shape(values) != shape(keys):
        return f"{heads} heads over {groups}"
    if mask is not None:
        sizes, whole = shape(mask), (rows, heads, queries, shape(keys)[2])
        fits = len(sizes) == 4 and all(a == 1 or same_sizes((a,), (b,)) for a, b in zip(sizes, whole, strict=True))
        if not fits or dtype(mask) not in (torch.bool, torch.float32, dtype(q)):
            return f"a mask of {tuple(sizes)}, {dtype(mask)}"
    with q.meta["val"].fake_mode:
        made = torch.empty_like(q.meta["val"])
    mine, theirs = (  # along an axis of one there are no steps
        [step for step, size in zip(one.stride(), shape(q), strict=True) if type(size) is not int or size != 1]
        for one in (made, item.meta["val"])
    )
    return None if same_sizes(mine, theirs) else "its result is laid out otherwise"


def _repeated(node: Node) -> tuple[Node, Any]:
    """The tensor of which `node` has every head several times, and how often; itself and once, where it has not."""
    found: Any = node
    sizes = shape(node)
    seen: list[Node] = []
    while is_call(found, *VIEWS, aten.clone.default) and len(seen) < 4:
        seen.append(found)
        found = args(found)[0]
    if not is_call(found, aten.expand.default) or len(shape(found)) != 5:
        return node, 1
    single = args(found)[0]
    if not is_call(single, aten.unsqueeze.default) or args(single)[1] not in (2, -3):
        return node, 1
    source, times = args(single)[0], shape(found)[2]
    rows, groups, keys, features = shape(source)
    wanted = ((rows, groups, times, keys, features), (rows, groups * times, keys, features))
    if not same_sizes(shape(found), wanted[0]) or not same_sizes(sizes, wanted[1]):
        return node, 1
    if any(not (same_sizes(shape(one), wanted[0]) or same_sizes(shape(one), wanted[1])) for one in seen):
        return node, 1
    return source, times


def _seen(mask: Any) -> Any:
    """What may be seen (bool), where the mask is made of that: 0 there, and -inf elsewhere."""
    if is_call(mask, aten.expand.default) and len(shape(args(mask)[0])) == 4:
        return _seen(args(mask)[0])  # the kernel broadcasts
    if not is_call(mask, aten.where.self):
        return mask
    condition, yes, no = args(mask)
    if value(condition) is None or dtype(condition) != torch.bool:
        return mask
    if (_number(yes), _number(no)) != (0.0, float("-inf")) or not same_sizes(shape(condition), shape(mask)):
        return mask
    return condition


def _number(node: Any) -> float | None:
    """The number that a 0-d tensor was made of."""
    if is_call(node, aten.scalar_tensor.default, aten.full.default) and not shape(node):
        number = args(node)[0] if node.target is aten.scalar_tensor.default else args(node)[1]
        return float(number) if isinstance(number, (int, float)) else None
    return float(node) if isinstance(node, (int, float)) else None
