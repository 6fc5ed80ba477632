"""Projections of one activation become one group.

before::

    q = operators.operator_sum(x, Sum((Dense(Wq), LowRank(Aq, Bq, 2.0)), 'bf16'))
    k = operators.operator_sum(x, Sum((Dense(Wk), LowRank(Ak, Bk, 2.0)), 'bf16'))

after::

    group = operators.operator_group(x, (Sum((Dense(Wq), …), 'bf16'), Sum((Dense(Wk), …), 'bf16')))
    q, k  = group[0], group[1]

The group stands where its first member stood; a member that reads something defined later stays alone. What an opaque
base makes of x, another activation that is given, and views of parameters are brought before the group. A forward's
members and its backward's are groups of their own, and so are those that a checkpoint computes again. A member whose
weight has another dtype than its activation stays alone too, unless tokens are few: the library, which many tokens
want, takes one dtype.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from typing import Any

from torch.fx import Graph, Node

from gawscompile.analysis.reading import args, dtype, is_view, shape
from gawscompile.ir.sums import Sum, operator_group, operator_sum
from gawscompile.passes.context import Context


def run(graph: Graph, context: Context) -> None:
    siblings: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=operator_sum):
        x, total = args(node)
        mixed = total.dense is not None and dtype(total.weight) != dtype(x) and not few(shape(x)[:-1])
        siblings[(x, mixed, *(str(node.meta.get(tag)) for tag in TAGS))].append(node)
    for members in siblings.values():
        while members:
            first = members[0]
            if not context.looks_at(first):
                members.remove(first)
                continue
            ahead = {m: _ahead(m, first) for m in members}
            together = [m for m in members if ahead[m] is not None]
            if context.allows(*together):
                for node in sorted({node for m in together for node in ahead[m] or ()}):
                    first.prepend(node)
                    context.touch(node)
                _group(graph, context, together)
            members = [m for m in members if m not in together]


TAGS = ("partitioner_tag", "recompute", "ac_graph_id")
"""What says where a node goes when a forward and its backward are taken apart."""

STEPS = 32
"""Nodes of an opaque base at most that are brought before its group."""


def _ahead(member: Node, first: Node) -> list[Node] | None:
    """The nodes to be brought before `first` so that `member` can be computed there, if it can."""
    total: Sum = args(member)[1]
    later = [leaf for leaf in total.leaves if not leaf < first]
    made = [total.opaque, *(term.z for term in total.given)]
    if any(leaf not in made and not is_view(leaf) for leaf in later):
        return None
    found: dict[Node, None] = {}
    while later:
        node = later.pop()
        if node in found:
            continue
        if node.op != "call_function" or node.target is operator_sum or node.is_impure() or len(found) == STEPS:
            return None  # a sum may be of this group, and comes after what is brought before it
        found[node] = None
        later += [source for source in node.all_input_nodes if not source < first]
    return list(found)


FEW = 16
"""Tokens for which the generated kernel is ahead of the library's matmul on every CPU that was measured but those with
AMX, where the library is ahead from about as many on."""


def few(leading: tuple[object, ...]) -> bool:
    """Whether an activation's leading sizes are known and come to few tokens."""
    sizes = [size for size in leading if isinstance(size, int)]
    return len(sizes) == len(leading) and math.prod(sizes) <= FEW


def _group(graph: Graph, context: Context, members: list[Node]) -> None:
    first = members[0]
    x = args(first)[0]  # read now: a member of an earlier group has been replaced by then
    with graph.inserting_before(first):
        new = context.insert(
            operator_group,
            (x, tuple(args(m)[1] for m in members)),
            first,
            [m.meta["val"] for m in members],
        )
        new.meta["gaws_entries"] = [entry for m in members for entry in m.meta["gaws_entries"]]
        items = [context.insert(operator.getitem, (new, i), m, m.meta["val"]) for i, m in enumerate(members)]
    for member, item in zip(members, items, strict=True):
        context.replace(member, item)
        context.erase(member)
    context.matched()
