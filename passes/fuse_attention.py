"""Attention of few queries reads keys and values where the cache has them.

before::

    where  = aten.where(mask, 0.0, -inf)
    k      = aten.view(aten.clone(aten.expand(aten.unsqueeze(keys, 2), [B, G, H // G, L, D])), [B, H, L, D])
    v      = …                                                             # the same of the cache's values
    sdpa   = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=where, scale=s)
    out    = sdpa[0]                               # or bmm(softmax(bmm(q, kᵀ) · s + where), v): `analysis.attention`

after::

    out    = torch.ops.gaws.attend(q, keys, values, mask, s, "attend d=64 x=bf16", None)

With grouped queries, Inductor writes every key and value out once for each head that reads it, in every step, and a
mask of the activation's dtype beside them. The kernel does not need them (`codegen/attention.cpp`; on a GPU
flash-decoding, `codegen/triton_attention.py`). Many queries share turned keys on a CPU
(`codegen/attention_tiles.cpp`); the library keeps them on a GPU, and where it has instructions for products of 16 bits.
Where attention is written out, its scores and weights, ``[rows, heads, queries, keys]``, are not written at all.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.attention import SDPA, Attention, Refused, number, of_library, written_out
from gawscompile.analysis.reading import args, aten, dtype, is_call, prims, shape, value
from gawscompile.codegen import cpp_attention
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.passes.context import Context
from gawscompile.planning import devices
from gawscompile.planning.targets import CPP, Target, target_of
from gawscompile.runtime import attention


def run(graph: Graph, context: Context) -> None:
    for target in (*SDPA, aten.bmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if context.looks_at(node):
                _attention(context, node)


def _attention(context: Context, node: Node) -> None:
    views: list[Node] = []

    def turn(one: Node, sizes: tuple[Any, ...], axes: list[int] | None) -> Node:
        fake = one.meta["val"]
        with fake.fake_mode:
            made = fake.view(sizes) if axes is None else fake.permute(axes)
        target, given = (aten.view.default, list(sizes)) if axes is None else (aten.permute.default, axes)
        views.append(context.insert(target, (one, given), node, made))
        return views[-1]

    with context.graph.inserting_before(node):
        found = written_out(node, turn) if node.target is aten.bmm.default else of_library(node)
        if found is None:
            return
        target = target_of(devices.of(args(node)[0].meta["val"].device.type))
        why = found.why if isinstance(found, Refused) else _refusal(found, target)
        if context.options.transparent and target is not CPP:
            why = "on a GPU it is an op of ours, and the graph is to be transparent"
        if why is None and not isinstance(found, Refused) and context.allows(found.made):
            _rewrite(context, found, node, target)
    for one in reversed(views):
        context.erase(one)  # unless it is read
    note = f"{Reason.ATTENTION.value}: {why}"
    if why is not None and note not in context.record.notes:
        context.record.notes.append(note)


def _rewrite(context: Context, found: Attention, node: Node, target: Target) -> None:
    q, made = found.q, found.made
    kernel = cpp_attention.Kernel(shape(q)[3], DTYPE_NAMES[dtype(q)], found.causal, found.cap)
    mask = _mask(context, found, node)
    given = (q, found.keys, found.values, mask, found.scale, str(kernel), found.sinks)
    as_q = _like(q)
    new = context.insert(attention.ATTEND, given, node, as_q)
    if not _laid_alike(as_q, made):
        new = context.contiguous(new, node)
    context.replace(made, new)
    context.erase(made)
    context.matched()
    attention.start(str(kernel), target)


def _takes_many(target: Target, q: Node) -> bool:
    """Whether kernels take any number of queries, and causal ones."""
    return target is CPP and devices.multiplies_in_fp32(DTYPE_NAMES.get(dtype(q), ""))


def _refusal(found: Attention, target: Target) -> str | None:
    """Why the library keeps it, if it does."""
    q, keys, values, made = found.q, found.keys, found.values, found.made
    many = _takes_many(target, q)
    if found.causal and not many:
        return "it is causal"
    rows, heads, queries, features = shape(q)
    if not many and (type(queries) is not int or queries > cpp_attention.FEW):
        count = queries if type(queries) is int else "any number of"
        return f"{count} queries; kernels take up to {cpp_attention.FEW}"
    if type(features) is not int or not 0 < features <= cpp_attention.MOST_FEATURES:
        return f"heads of {features} features; kernels take up to {cpp_attention.MOST_FEATURES}"
    if dtype(q) not in DTYPE_NAMES or any(dtype(one) != dtype(q) for one in (keys, values, made)):
        return f"{dtype(q)}, {dtype(keys)} and {dtype(values)}"
    groups = shape(keys)[1]
    counted = type(groups) is int and type(heads) is int
    if not counted or not groups or heads % groups or shape(values) != shape(keys):
        return f"{heads} heads over {groups}"
    whole = (rows, heads, queries, shape(keys)[2])
    for mask in found.masks:
        sizes = shape(mask)
        fits = len(sizes) == 4 and all(a == 1 or same_sizes((a,), (b,)) for a, b in zip(sizes, whole, strict=True))
        kinds = (torch.float32, dtype(q)) if len(found.masks) > 1 else (torch.bool, torch.float32, dtype(q))
        if not fits or dtype(mask) not in kinds:
            return f"a mask of {tuple(sizes)}, {dtype(mask)}"
    if found.cap is not None and not cpp_attention.LEAST_CAP <= found.cap <= 1 / cpp_attention.LEAST_CAP:
        return f"a soft cap of {found.cap}"
    if found.sinks is not None and dtype(found.sinks) not in (torch.float32, dtype(q)):
        return f"sinks of {dtype(found.sinks)}"
    # who reads the library's result may count on how it lies in memory; what is written out is plain, or copied to be
    library = is_call(made, operator.getitem)
    return "its result is laid out otherwise" if library and not _laid_alike(_like(q), made) else None


def _like(q: Node) -> torch.Tensor:
    fake: torch.Tensor = q.meta["val"]
    with cast(Any, fake).fake_mode:
        return cpp_attention.result_of(fake)


def _laid_alike(one: torch.Tensor, other: Node) -> bool:
    """Whether two of the same sizes have the same strides, but along an axis of one, where there are no steps."""
    mine, theirs = (
        [step for step, size in zip(given.stride(), shape(other), strict=True) if type(size) is not int or size != 1]
        for given in (one, other.meta["val"])
    )
    return same_sizes(mine, theirs)


def _mask(context: Context, found: Attention, node: Node) -> Node | None:
    """One mask for all that are added."""
    masks = list(map(_unexpanded, found.masks))
    if not masks:
        return None
    if len(masks) == 1 and dtype(seen := _seen(masks[0])) == torch.bool:
        return seen
    if found.halves:
        masks = [_absorbing(context, mask, node) for mask in masks]
    made, *rest = masks
    for other in rest:
        with made.meta["val"].fake_mode:
            both = made.meta["val"] + other.meta["val"]
        made = context.insert(aten.add.Tensor, (made, other), node, both)
    return made


def _absorbing(context: Context, mask: Node, node: Node) -> Node:
    """A mask in fp32 for one in fp16: the lowest number of either is so large that a score beside it is lost, but the
    kernel adds in fp32. So a query all of whose keys are hidden weighs them alike, as it does in fp16."""
    if dtype(mask) != torch.float16:
        return mask
    fake, lowest = mask.meta["val"], torch.finfo(torch.float16).min
    with fake.fake_mode:
        values = [fake.float(), fake == lowest, torch.empty((), dtype=torch.float32, device=fake.device)]
    wide = context.insert(prims.convert_element_type.default, (mask, torch.float32), node, values[0])
    hidden = context.insert(aten.eq.Scalar, (mask, lowest), node, values[1])
    least = context.insert(aten.full.default, ([], torch.finfo(torch.float32).min), node, values[2])
    least.kwargs = {"dtype": torch.float32, "device": fake.device}
    return context.insert(aten.where.self, (hidden, least, wide), node, values[0])


def _unexpanded(mask: Node) -> Node:
    """A mask before it was repeated: the kernel broadcasts."""
    while is_call(mask, aten.expand.default) and len(shape(args(mask)[0])) == 4:
        mask = args(mask)[0]
    return mask


def _seen(mask: Node) -> Node:
    """What may be seen (bool), where the mask is made of that: 0 there, and -inf elsewhere."""
    if not is_call(mask, aten.where.self):
        return mask
    condition, yes, no = args(mask)
    if value(condition) is None or dtype(condition) != torch.bool:
        return mask
    if (number(yes), number(no)) != (0.0, float("-inf")) or not same_sizes(shape(condition), shape(mask)):
        return mask
    return condition
