"""Projections of one activation become one group.

before::

    q = operators.operator_sum(x, (Dense(Wq), LowRank(Bq, Aq, 2.0)), bfloat16)
    k = operators.operator_sum(x, (Dense(Wk), LowRank(Bk, Ak, 2.0)), bfloat16)

after::

    group = operators.operator_group(x, ((Dense(Wq), LowRank(…)), (Dense(Wk), LowRank(…))), (bfloat16, bfloat16))
    q, k  = group[0], group[1]

The group stands where its first member stood; a member that reads something defined later stays alone. So does one
whose weight has another dtype than its activation, unless tokens are few: the library, which many tokens want, takes
one dtype.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict

from torch.fx import Graph, Node

from gawscompile.operators import Dense, operator_group, operator_sum
from gawscompile.passes.context import Context, args, dtype, leaves, shape


def run(graph: Graph, context: Context) -> None:
    siblings: dict[tuple[Node, bool], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=operator_sum):
        x, terms, _ = args(node)
        (base,) = [term for term in terms if isinstance(term, Dense)]
        mixed = dtype(base.weight) != dtype(x) and not few(shape(x)[:-1])
        siblings[x, mixed].append(node)
    for members in siblings.values():
        while members:
            first = members[0]
            together = [m for m in members if all(leaf < first for leaf in leaves(args(m)[1]))]
            if context.allows(*together):
                _group(graph, context, together)
            members = [m for m in members if m not in together]


FEW = 16
"""Tokens for which the generated kernel is ahead of the library's matmul on every CPU that was measured."""


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
            (x, tuple(args(m)[1] for m in members), tuple(args(m)[2] for m in members)),
            first,
            [m.meta["val"] for m in members],
        )
        new.meta["gaws_entries"] = [entry for m in members for entry in m.meta["gaws_entries"]]
        items = [context.insert(operator.getitem, (new, i), m, m.meta["val"]) for i, m in enumerate(members)]
    for member, item in zip(members, items, strict=True):
        context.replace(member, item)
        context.erase(member)
    context.matched()
