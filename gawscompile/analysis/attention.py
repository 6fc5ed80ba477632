"""Attention as a traced graph has it: an op of the library, or products around a softmax.

Written out (transformers' ``attn_implementation="eager"``; all that soft caps, sinks and ALiBi can be)::

    scores  = bmm(q, kᵀ) · s                                  # c · tanh(scores / c) with a soft cap (Gemma 2)
    scores  = cat([scores + mask, sinks])                     # with sinks (gpt-oss)
    weights = exp(scores - amax(scores)) / sum(exp(…))        # without the sinks' columns
    made    = view(bmm(weights, v), [rows, heads, queries, features])
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.fx import Node

from gawscompile.analysis.reading import VIEWS, args, aten, dtype, is_call, is_cast, shape, value
from gawscompile.ir.sizes import same_sizes

SDPA = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
"""Their first result is the attention's; the others, which training reads, differ."""


class Attention(NamedTuple):
    """softmax(scale · q kᵀ + masks) v, and who computes it."""

    made: Node
    """Its value, ``[rows, heads, queries, features]``."""
    q: Node
    keys: Node
    """Before they are repeated for all heads; so are the values."""
    values: Node
    scale: float | None
    masks: tuple[Node, ...] = ()
    """What is added to the scores."""
    cap: float | None = None
    """c of c · tanh(scores / c), before masks are added."""
    sinks: Node | None = None
    """One more score for each head, which weighs no value: ``[heads]``."""
    causal: bool = False
    halves: bool = False
    """Masks are added in fp16: a score of less than 16 beside its lowest number, -65504, is lost."""


class Refused(NamedTuple):
    """An attention that is not taken."""

    why: str


# ---- an op of the library -------------------------------------------------------------------------------------


def of_library(node: Node) -> Attention | Refused:
    """The attention that a call of one of `SDPA` is."""
    names = [argument.name for argument in cast(Any, node.target)._schema.arguments]
    given = {**dict(zip(names, args(node), strict=False)), **node.kwargs}
    if len(node.users) != 1 or not is_call(made := next(iter(node.users)), operator.getitem) or args(made)[1] != 0:
        return Refused("something reads its log-sum-exp")
    if any(given.get(name) for name in ("dropout_p", "return_debug_mask")):
        return Refused("it drops out")
    q, scale = given["query"], given.get("scale")
    mask = given.get("attn_mask") or given.get("attn_bias")
    if not isinstance(scale, float):
        features = shape(q)[3]
        scale = features**-0.5 if type(features) is int and features else None
    keys, values = unrepeated(given["key"], given["value"])
    masks = () if mask is None else (mask,)
    return Attention(made, q, keys, values, scale, masks, causal=bool(given.get("is_causal")))


def unrepeated(keys: Node, values: Node) -> tuple[Node, Node]:
    """Keys and values before each head was repeated, where both were, and as often."""
    (key, often), (other, as_often) = _repeated(keys), _repeated(values)
    return (key, other) if often == as_often else (keys, values)


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


# ---- written out ----------------------------------------------------------------------------------------------


class _Scores(NamedTuple):
    """What a softmax is taken of. `inside`: the nodes that compute it of q and keys."""

    q: Node
    turned: Node  # keys, [rows, heads, features, keys]
    inside: list[Node]
    scale: float = 1.0
    masks: tuple[tuple[Node, tuple[Any, ...]], ...] = ()
    """Each with its sizes in four axes."""
    cap: float | None = None
    halves: bool = False
    """Masks are added in fp16."""


Turn = Callable[[Node, tuple[Any, ...], list[int] | None], Node]
"""Inserts a view of a tensor in these sizes, and turned by these axes, if any."""


def written_out(product: Node, turn: Turn) -> Attention | Refused | None:
    """The attention of which `product` is the last one (``aten.bmm``); None where it is of no softmax. Nothing is
    inserted, by `turn`, unless it is an attention."""
    made, *others = product.users or (product,)
    weights, values = args(product)
    keys = shape(weights)[2]
    shaped = not others and is_call(made, *VIEWS) and len(shape(made)) == 4
    if not shaped or not same_sizes(shape(product), (shape(made)[0] * shape(made)[1], *shape(made)[2:])):
        plain = _softmax(_uncast(weights), keys, [])
        return plain and Refused("its result is not split in rows and heads")
    rows, heads, queries, features = shape(made)
    sizes = (rows, heads, queries, keys)
    inside = [product]
    softmax = _softmax(_below(weights, sizes, inside), keys, inside)
    if softmax is None:
        return None
    of, sinks = softmax
    scores = _scores(of, sizes, [])
    if scores is None:
        return Refused("its scores are not a product of queries and keys, capped, and masked by what is added")
    if not same_sizes(shape(scores.q)[2:], (features,)):
        return Refused(f"keys of {shape(scores.q)[2]} features, values of {features}")
    if any(not dtype(mask).is_floating_point for mask, _ in scores.masks):
        return Refused("what is added to its scores are no floating numbers")
    if sinks is not None and (sinks := _by_head(sinks, heads)) is None:
        return Refused("its sinks are not one number for each head, as they are kept")
    inside += scores.inside
    if any(reader not in inside for one in inside for reader in one.users if one is not product):
        return Refused("something reads its scores or weights")
    q = _four(scores.q, (rows, heads, queries, features), turn)
    k = _keys(scores.turned, (rows, heads, features, keys), turn)
    v = _four(values, (rows, heads, keys, features), turn)
    masks = tuple(_four(mask, own, turn) for mask, own in scores.masks)
    return Attention(made, q, *unrepeated(k, v), scores.scale, masks, scores.cap, sinks, halves=scores.halves)


def _below(node: Any, sizes: tuple[Any, ...], inside: list[Node], rounded: bool = True) -> Any:
    """What `node` views or copies, or rounds or widens: `sizes`, or the first two of these in one."""
    folded = (sizes[0] * sizes[1], *sizes[2:])
    while is_call(node, *VIEWS, aten.expand.default, aten.clone.default) or (rounded and is_cast(node)):
        source = args(node)[0]
        if not same_sizes(shape(source), sizes) and not same_sizes(shape(source), folded):
            break
        inside.append(node)
        node = source
    return node


def _uncast(node: Any) -> Any:
    """What `node` views or copies, or rounds or widens, of any sizes."""
    while is_call(node, *VIEWS, aten.expand.default, aten.clone.default) or is_cast(node):
        node = args(node)[0]
    return node


def _softmax(node: Any, keys: Any, inside: list[Node]) -> tuple[Node, Node | None] | None:
    """What a softmax is taken of, and the sinks beside it. `node`: its weights of the keys."""
    cut = is_call(node, aten.slice.Tensor) and args(node)[1:3] in ((3, 0), (-1, 0)) and len(args(node)) == 4
    if cut:
        inside.append(node)
        node = args(node)[0]
        while is_cast(node):
            inside.append(node)
            node = args(node)[0]
    if not is_call(node, aten.div.Tensor) or not is_call(args(node)[0], aten.exp.default):
        return None
    exp, total = args(node)
    shifted = args(exp)[0]
    if not is_call(total, aten.sum.dim_IntList) or args(total)[0] is not exp or not _of_last(total):
        return None
    inside += [node, exp, total]
    found = _shifted(shifted, inside)
    if found is None:
        return None
    if not cut:
        return found, None
    further = _shifted(found, inside)  # gpt-oss takes the largest away once more, before
    both = found if further is None else further
    if not is_call(both, aten.cat.default) or args(both)[1:] not in ((-1,), (3,)) or len(args(both)[0]) != 2:
        return None
    scores, sinks = args(both)[0]
    if not same_sizes((shape(scores)[-1], shape(sinks)[-1]), (keys, 1)):
        return None
    inside.append(both)
    return scores, sinks


def _shifted(node: Any, inside: list[Node]) -> Node | None:
    """x of x - amax(x)."""
    while is_cast(node):
        inside.append(node)
        node = args(node)[0]
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, most = args(node)
    around = [node]
    if is_call(most, operator.getitem) and args(most)[1] == 0:
        around.append(most)
        most = args(most)[0]
    if not is_call(most, aten.amax.default, aten.max.dim) or args(most)[0] is not x or not _of_last(most):
        return None
    inside += [*around, most]
    return x


def _of_last(node: Node) -> bool:
    """Whether a reduction is over the last axis, which it keeps."""
    given = args(node)
    return len(given) == 3 and given[1] in ([-1], [3], -1, 3) and given[2] is True


def _scores(node: Any, sizes: tuple[Any, ...], inside: list[Node]) -> _Scores | None:
    """Scores of `sizes`, whose nodes from the softmax down to here are `inside`."""
    node = _below(node, sizes, inside := list(inside))
    halves = value(node) is not None and dtype(node) == torch.float16
    product = is_call(node, aten.bmm.default, aten.baddbmm.default)
    if product and not same_sizes(shape(node), (sizes[0] * sizes[1], *sizes[2:])):
        return None  # a mask repeats it
    if is_call(node, aten.bmm.default):
        q, turned = args(node)
        return _Scores(q, turned, [*inside, node])
    if is_call(node, aten.baddbmm.default) and node.kwargs.get("beta", 1) == 1:  # ALiBi (Bloom)
        bias, q, turned = args(node)
        own = _broadcast(bias, 3, sizes)
        scale = float(node.kwargs.get("alpha", 1))
        return None if own is None else _Scores(q, turned, [*inside, node], scale, ((bias, own),), None, halves)
    if not is_call(node, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    one, other = args(node)
    inside.append(node)
    if node.target is aten.add.Tensor:
        for first, second in ((one, other), (other, one)):
            found = _scores(first, sizes, inside) if isinstance(second, Node) else None
            own = _broadcast(second, len(shape(node)), sizes) if found is not None else None
            if found is not None and own is not None:
                both = halves and (found.halves or not found.masks)
                return found._replace(masks=(*found.masks, (second, own)), halves=both)
        return None
    factor = number(other)
    if not factor or not math.isfinite(factor):
        return None
    by = factor if node.target is aten.mul.Tensor else 1 / factor
    if is_call(one, aten.tanh.default):
        found = _scores(args(one)[0], sizes, [*inside, one])
        capped = found is not None and not found.masks and found.cap is None and by > 0
        # tanh(scale · q kᵀ / c) · c
        return found._replace(scale=found.scale * by, cap=by) if found is not None and capped else None
    found = _scores(one, sizes, inside)
    return found._replace(scale=found.scale * by) if found and not found.masks and found.cap is None else None


def number(node: Any) -> float | None:
    """The number that a 0-d tensor was made of, or that an argument is."""
    if is_call(node, aten.scalar_tensor.default, aten.full.default) and not shape(node):
        made = args(node)[0] if node.target is aten.scalar_tensor.default else args(node)[1]
        return float(torch.tensor(made, dtype=dtype(node), device="cpu")) if isinstance(made, (int, float)) else None
    return float(node) if isinstance(node, (int, float)) else None


def _four(node: Node, sizes: tuple[Any, ...], turn: Turn) -> Node:
    """`node` in four axes."""
    node = _below_views(node, sizes)
    return node if len(shape(node)) == 4 else turn(node, sizes, None)


def _below_views(node: Node, sizes: tuple[Any, ...]) -> Node:
    """The furthest tensor of four `sizes` that `node` views or copies; itself, where there is none."""
    visited: list[Node] = []
    last = _below(node, sizes, visited, rounded=False)
    found = [one for one in (*visited, last) if value(one) is not None and len(shape(one)) == 4]
    return found[-1] if found else node


def _keys(turned: Node, sizes: tuple[Any, ...], turn: Turn) -> Node:
    """Keys, ``[rows, heads, keys, features]``, of their transpose."""
    rows, heads, features, keys = sizes
    found = _below(turned, sizes, [], rounded=False)
    wanted = (rows, heads, keys, features)
    if is_call(found, aten.permute.default) and args(found)[1] in ([0, 1, 3, 2], [0, 2, 1]):
        return _four(args(found)[0], wanted, turn)
    return turn(_four(turned, sizes, turn), wanted, [0, 1, 3, 2])


def _broadcast(mask: Node, axes: int, sizes: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The sizes in four axes of a mask that is added to scores of `sizes`, whose first two are one if `axes` is 3."""
    own = shape(mask)
    if len(own) > axes:
        return None
    own = (1,) * (axes - len(own)) + own
    if axes == 4:
        return own
    first = (1, 1) if type(own[0]) is int and own[0] == 1 else sizes[:2]
    return (*first, *own[1:]) if same_sizes((own[0],), (first[0] * first[1],)) else None


def _by_head(sinks: Node, heads: Any) -> Node | None:
    """The ``[heads]`` numbers that ``[rows, heads, queries, 1]`` repeat."""
    found: Any = sinks
    while is_call(found, aten.expand.default) or _widens(found):
        found = args(found)[0]
    if not same_sizes(shape(found), (1, heads, 1, 1)):
        return None
    while len(shape(found)) != 1 and (is_call(found, *VIEWS, aten.clone.default) or _widens(found)):
        found = args(found)[0]
    return found if same_sizes(shape(found), (heads,)) else None


def _widens(node: Any) -> bool:
    """Whether a cast keeps every number as it is."""
    return is_cast(node) and dtype(args(node)[0]).itemsize < dtype(node).itemsize
