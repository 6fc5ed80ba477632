"""A sum of all-reduces is one all-reduce of the sum.

before, a row-parallel projection with PEFT's LoRA, whose A is sharded as W is::

    p = linear(x, W_i)                      # this rank's part of x, and of W
    u = linear(x, A_i)
    y = aten.add(wait(all_reduce(p)), aten.mul(linear(wait(all_reduce(u)), B), s))

after::

    q = aten.mul(linear(u, B), s)
    y = wait(all_reduce(aten.add(p, q)))

The same goes for reduce-scatters, in which sequence parallelism's row-parallel projections end.

One collective where there were two, and what is left of the adapter is ``W_i x + s B (A_i x)``, which the passes behind
this one recover as any LoRA. B, s and what else comes between an all-reduce and the sum is linear, and the same on all
ranks of the group: tensor parallelism takes whatever is not sharded to be so. A shard of B would not make a term of the
shape that what was reduced and no more has, which one of the terms must be. Terms that were not reduced (a bias, the
residual) are added afterwards, once.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gawscompile.analysis.collectives import ADDING, rearranged, reduce_scatters, reduction, waits
from gawscompile.analysis.identity import reinterpreted
from gawscompile.analysis.matrices import scaling_of
from gawscompile.analysis.reading import (
    ROUNDING,
    args,
    aten,
    dtype,
    empty_like,
    is_call,
    is_cast,
    prims,
    shape,
    value,
)
from gawscompile.ir.records import Reason
from gawscompile.ir.sizes import same_sizes
from gawscompile.ir.sums import linear
from gawscompile.passes.context import Context


class Reduced(NamedTuple):
    """A term that is linear in what was reduced."""

    term: Node
    what: tuple[Any, ...]  # the collective, its operation, its group, and how a reduce-scatter splits tokens
    made: Node  # the collective
    source: Node  # what each rank gives
    split: Node | None  # of `source`, whose parts come one after the other before they are reduced
    path: list[tuple[Node, int]]  # from the reduced value to the term: (node, which argument is that value)

    @property
    def whole(self) -> bool:
        """Whether it is what was reduced, and at most scaled: no shard of a factor makes a term of its shape."""
        return not any(is_call(node, linear) for node, _ in self.path)


def run(graph: Graph, context: Context) -> None:
    if not torch.distributed.is_available() or not any(reduction(node) for node in graph.nodes):
        return
    for node in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node._erased or _inside(node) or not context.looks_at(node):
            continue
        terms = _terms(node)
        found = [_reduced(context, term) for term in terms if _widens(term, node)]
        whole = next((one for one in found if isinstance(one, Reduced) and one.whole), None)
        if whole is None:
            continue
        for one in found:
            if isinstance(one, Reduced) and one.what != whole.what:
                _note(context, node, f"{one.what} is not {whole.what}, the operation and the group of another term")
            elif isinstance(one, str):
                _note(context, node, one)
        alike = [one for one in found if isinstance(one, Reduced) and one.what == whole.what]
        if len({one.source for one in alike}) > 1 and context.allows(node):
            _join(context, node, terms, alike, whole)


def _note(context: Context, node: Node, why: str) -> None:
    context.record.notes.append(f"{context.module_path(node)}: {Reason.COLLECTIVE.value}: {why}")


def _adds(node: Node) -> bool:
    return is_call(node, aten.add.Tensor) and not node.kwargs and all(value(arg) is not None for arg in args(node))


def _fits(term: Node, whole: Node) -> bool:
    return same_sizes(shape(term), shape(whole)) and dtype(term) == dtype(whole)


def _widens(term: Node, whole: Node) -> bool:
    """Whether `term` may be a part of the sum `whole`, which may be wider: fp32 factors beside a bf16 base."""
    return same_sizes(shape(term), shape(whole)) and {dtype(term), dtype(whole)} <= ROUNDING


def _folds(node: Node, reader: Node) -> bool:
    """Whether the sum `node` is a part of the sum `reader`."""
    return _adds(node) and _adds(reader) and len(node.users) == 1 and _fits(node, reader)


def _inside(node: Node) -> bool:
    return any(_folds(node, user) for user in node.users)


def _terms(node: Node) -> list[Node]:
    """What `node` is the sum of, first first."""
    found: list[Node] = []
    pending = [node]
    while pending:  # a sum may be as deep as the model: no recursion
        one = pending.pop()
        if (one is node and _adds(one)) or any(_folds(one, user) for user in one.users if one is not node):
            pending += reversed(args(one))
        else:
            found.append(one)
    return found


def _reduced(context: Context, term: Node) -> Reduced | str | None:
    """`term` as what is linear in one reduced value that nobody else reads; or why it is not, if it reads one."""
    path: list[tuple[Node, int]] = []
    node = term
    while (made := reduction(node)) is None:
        if not path and len(node.users) > 1:  # the residual, which nobody expects to be joined
            return None
        at = _linear_in(context, node) if len(node.users) == 1 else None
        if at is None:
            return f"{node.name} is not linear, or read by others" if _reads_reduced(node) else None
        path.append((node, at))
        node = args(node)[at]
    if len(node.users) > 1 or len(made.users) > 1:
        return f"others read {node.name}" if path else None
    if args(made)[1] not in ADDING:
        return f"{made.name} is no sum over ranks"
    source, split = args(made)[0], None
    if is_call(made, reduce_scatters()):
        if any(reinterpreted(one) is not None for one, _ in path):
            return f"{term.name} has other sizes than what was reduced"
        source, split = rearranged(source) or (source, None)
    how = () if split is None else args(split)[1:]
    return Reduced(term, (made.target, *args(made)[1:], *how), made, source, split, path[::-1])


def _reads_reduced(node: Node) -> bool:
    """Whether it is made of something reduced, by nodes that nobody else reads."""
    pending = node.all_input_nodes
    while pending:
        one = pending.pop()
        if reduction(one) is not None:
            return True
        if len(one.users) == 1:
            pending += one.all_input_nodes
    return False


def _copied(node: Node) -> Node | None:
    """What an all-reduce in place writes over `node`."""
    return args(node)[1] if is_call(node, aten.copy.default) and _fits(args(node)[1], node) else None


def _linear_in(context: Context, node: Node) -> int | None:
    """Which argument `node` is linear in, all others being parameters or numbers."""
    if reinterpreted(node) is not None:
        return 0
    if is_cast(node):  # a part of a sum may not fit in fp16 where the sum does
        return 0 if dtype(node) != torch.float16 or dtype(args(node)[0]) == torch.float16 else None
    if _copied(node) is not None:
        return 1
    if is_call(node, linear):
        return 0 if len(args(node)) == 2 and context.of_stored(args(node)[1]) else None
    if (scaling := scaling_of(node)) is not None:
        inner, _ = scaling
        others = [source for source in node.all_input_nodes if source is not inner]
        return args(node).index(inner) if all(map(context.of_stored, others)) else None
    return None


def _join(context: Context, node: Node, terms: list[Node], reduced: list[Reduced], whole: Reduced) -> None:
    """`node` is the reduced sum of what makes terms, one of which may stand twice, and the other terms. What goes to
    other ranks has the dtype of the `whole`, so no more bytes do than without the others; but a part of a sum may not
    fit in fp16 where the sum does."""
    narrow = dtype(whole.term) if dtype(whole.term) != torch.float16 else dtype(node)
    with context.graph.inserting_before(node):
        total = _sum(context, [_unreduced(context, parts) for parts in reduced], node)
        total = _cast(context, total, narrow, node)
        if whole.split is not None:
            total = _rearranged(context, total, whole.split, node)
        fake = node.meta["val"].to(narrow)
        made = context.insert(whole.made.target, (total, *args(whole.made)[1:]), node, fake)  # type: ignore[arg-type]
        result = _cast(context, context.insert(waits(), (made,), node, fake), dtype(node), node)
        rest = [term for term in terms if all(term is not parts.term for parts in reduced)]
        result = _sum(context, [result, *rest], node)
    context.replace(node, result)
    context.erase(node)
    context.matched()


def _sum(context: Context, terms: list[Node], like: Node) -> Node:
    total, *rest = terms
    for term in rest:
        wide = torch.promote_types(dtype(total), dtype(term))
        total = context.insert(aten.add.Tensor, (total, term), like, empty_like(like, shape(total), wide))
    return total


def _rearranged(context: Context, node: Node, split: Node, like: Node) -> Node:
    """``cat(split(node))``: the parts that ranks get, one after the other."""
    values = node.meta["val"].split(*args(split)[1:])
    parts = context.insert(split.target, (node, *args(split)[1:]), like, list(values))  # type: ignore[arg-type]
    pieces = [context.insert(operator.getitem, (parts, i), like, one) for i, one in enumerate(values)]
    first, *rest = shape(pieces[0])
    fake = empty_like(like, (first * len(pieces), *rest), values[0].dtype)
    return context.insert(aten.cat.default, (pieces,), like, fake)


def _cast(context: Context, node: Node, to: Any, like: Node) -> Node:
    if dtype(node) == to:
        return node
    return context.insert(prims.convert_element_type.default, (node, to), like, empty_like(like, shape(node), to))


def _unreduced(context: Context, parts: Reduced) -> Node:
    """The term, of what one rank gives alone."""
    inner = parts.source
    node: Any
    for node, at in parts.path:
        if _copied(node) is not None:
            continue
        given = list(args(node))
        given[at] = inner
        fake = node.meta["val"]
        if reinterpreted(node) is None:  # a reduce-scatter leaves fewer tokens than it is given
            fake = empty_like(node, (*shape(inner)[:-1], shape(node)[-1]), fake.dtype)
        new = context.insert(node.target, tuple(given), node, fake)
        new.kwargs = node.kwargs
        inner = new
    return inner
