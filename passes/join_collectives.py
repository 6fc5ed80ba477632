"""A sum of all-reduces is one all-reduce of the sum.

before, a row-parallel projection with PEFT's LoRA, whose A is sharded as W is::

    p = aten.mm(x, permute(W_i))            # this rank's part of x, and of W
    u = aten.mm(x, permute(A_i))
    y = aten.add(wait(all_reduce(p)), aten.mul(aten.mm(wait(all_reduce(u)), permute(B)), s))

after::

    q = aten.mul(aten.mm(u, permute(B)), s)
    y = wait(all_reduce(aten.add(p, q)))

One collective where there were two, and what is left of the adapter is ``W_i x + s B (A_i x)``, which the passes behind
this one recover as any LoRA. B, s and what else comes between an all-reduce and the sum is linear, and the same on all
ranks of the group: tensor parallelism takes whatever is not sharded to be so. A shard of B would not make a term of the
shape that what was reduced and no more has, which one of the terms must be. Terms that were not reduced (a bias, the
residual) are added afterwards, once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.reading import VIEWS, args, aten, dtype, is_call, is_cast, shape, value
from gawscompile.ir.sizes import same_sizes
from gawscompile.passes.context import Context

SUMS = ("sum", "avg")
"""What reduces linearly."""


class Reduced(NamedTuple):
    """A term that is linear in what was reduced."""

    term: Node
    what: tuple[Any, ...]  # the operation, and the group
    source: Node  # what each rank gives
    path: list[tuple[Node, int]]  # from the reduced value to the term: (node, which argument is that value)


def run(graph: Graph, context: Context) -> None:
    if not torch.distributed.is_available() or not graph.find_nodes(op="call_function", target=_all_reduce()):
        return
    for node in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node._erased or _inside(node) or not context.looks_at(node):
            continue
        terms = _terms(node)
        found = [reduced for term in terms if _fits(term, node) and (reduced := _reduced(context, term))]
        alike = [one for one in found if one.what == found[0].what]
        # what was reduced and no more is whole on every rank: no shard of a factor makes a term of its shape
        whole = any(not _factors(one) for one in alike)
        if whole and len({one.source for one in alike}) > 1 and context.allows(node):
            _join(context, node, terms, alike)


def _all_reduce() -> Any:
    return torch.ops._c10d_functional.all_reduce.default


def _wait() -> Any:
    return torch.ops._c10d_functional.wait_tensor.default


def _inside(node: Node) -> bool:
    """Whether `node` is a term of another sum that is looked at."""
    return len(node.users) == 1 and any(_adds(user) and _fits(node, user) for user in node.users)


def _adds(node: Node) -> bool:
    return is_call(node, aten.add.Tensor) and not node.kwargs and all(value(arg) is not None for arg in args(node))


def _fits(term: Node, whole: Node) -> bool:
    return same_sizes(shape(term), shape(whole)) and dtype(term) == dtype(whole)


def _terms(node: Node) -> list[Node]:
    """What `node` is the sum of, first first."""
    if not _adds(node):
        return [node]
    found: list[Node] = []
    for term in args(node):
        inner = _adds(term) and len(term.users) == 1 and _fits(term, node)
        found += _terms(term) if inner else [term]
    return found


def _factors(parts: Reduced) -> bool:
    """Whether more than views, casts and numbers comes between the reduced value and the term."""
    return any(len(node.all_input_nodes) > 1 and not is_call(node, aten.copy.default) for node, _ in parts.path)


def _reduced(context: Context, term: Node) -> Reduced | None:
    """`term` as what is linear in one reduced value that nobody else reads."""
    path: list[tuple[Node, int]] = []
    node = term
    while len(node.users) == 1:
        if is_call(node, _wait()):
            made = args(node)[0]
            if not is_call(made, _all_reduce()) or len(made.users) != 1 or args(made)[1] not in SUMS:
                return None
            return Reduced(term, tuple(args(made)[1:]), args(made)[0], path[::-1])
        at = _linear_in(context, node)
        if at is None:
            return None
        path.append((node, at))
        node = args(node)[at]
    return None


def _linear_in(context: Context, node: Node) -> int | None:
    """Which argument `node` is linear in, all others being the same on every rank."""
    if is_call(node, *VIEWS):
        return 0
    if is_cast(node):  # a part of a sum may not fit in fp16 where the sum does
        return 0 if dtype(node) != torch.float16 or dtype(args(node)[0]) == torch.float16 else None
    if is_call(node, aten.copy.default):  # an all-reduce in place: the value is the second argument's
        return 1 if _fits(args(node)[1], node) else None
    if is_call(node, aten.mm.default):
        return 0 if args(node)[1] in context.fixed else None
    if is_call(node, aten.mul.Tensor):
        same = [not isinstance(arg, Node) or arg in context.fixed for arg in args(node)]
        return same.index(False) if same.count(False) == 1 else None
    if is_call(node, aten.div.Tensor):
        return 0 if not isinstance(args(node)[1], Node) or args(node)[1] in context.fixed else None
    return None


def _join(context: Context, node: Node, terms: list[Node], reduced: list[Reduced]) -> None:
    """`node` is the reduced sum of what makes terms, one of which may stand twice, and the other terms."""
    fake = node.meta["val"]
    with context.graph.inserting_before(node):
        total: Node | None = None
        for parts in reduced:
            inner = _unreduced(context, parts)
            total = inner if total is None else context.insert(aten.add.Tensor, (total, inner), node, fake)
        assert total is not None
        made = context.insert(_all_reduce(), (total, *reduced[0].what), node, fake)
        result = context.insert(_wait(), (made,), node, fake)
        for term in terms:
            if all(term is not parts.term for parts in reduced):
                result = context.insert(aten.add.Tensor, (result, term), node, fake)
    context.replace(node, result)
    context.erase(node)
    context.matched()


def _unreduced(context: Context, parts: Reduced) -> Node:
    """The term, of what one rank gives alone."""
    inner = parts.source
    node: Any
    for node, at in parts.path:
        if is_call(node, aten.copy.default):
            continue
        given = list(args(node))
        given[at] = inner
        new = context.insert(node.target, tuple(given), node, node.meta["val"])
        new.kwargs = node.kwargs
        inner = new
    return inner
