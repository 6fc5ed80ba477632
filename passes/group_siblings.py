"""Projections of one activation become one group.

before::

    q = operators.operator_sum(x, (Dense(Wq), LowRank(Bq, Aq, 2.0)), bfloat16)
    k = operators.operator_sum(x, (Dense(Wk), LowRank(Bk, Ak, 2.0)), bfloat16)

after::

    group = operators.operator_group(x, ((Dense(Wq), LowRank(…)), (Dense(Wk), LowRank(…))), (bfloat16, bfloat16))
    q, k  = group[0], group[1]

The group stands where its first member stood; a member that reads something defined later stays alone.
"""

from __future__ import annotations

import operator
from collections import defaultdict

from torch.fx import Graph, Node

from gawscompile.operators import operator_group, operator_sum
from gawscompile.passes.context import Context, leaves


def run(graph: Graph, context: Context) -> None:
    siblings: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=operator_sum):
        siblings[node.args[0]].append(node)
    for members in siblings.values():
        first = members[0]
        x = first.args[0]  # not the key: if that was a member of an earlier group, it has been replaced
        group = [m for m in members if all(leaf < first for leaf in leaves(m.args[1]))]
        with graph.inserting_before(first):
            new = context.insert(
                operator_group,
                (x, tuple(m.args[1] for m in group), tuple(m.args[2] for m in group)),
                first,
                [m.meta["val"] for m in group],
            )
            new.meta["gaws_entries"] = [entry for m in group for entry in m.meta["gaws_entries"]]
            for i, member in enumerate(group):
                item = context.insert(operator.getitem, (new, i), member, member.meta["val"])
                context.replace(member, item)
        for member in group:
            context.erase(member)
        context.matched()
