"""Gradients of one activation are added up in an order that keeps each projection together.

before, of the gradient of an x that k and q read::

    a_k, w_k = operators.linear(operators.linear(mul_k, Bk'), Ak'), operators.linear(dk, Wk')
    a_q, w_q = operators.linear(operators.linear(mul_q, Bq'), Aq'), operators.linear(dq, Wq')
    dx       = aten.add(aten.add(aten.add(a_k, w_k), a_q), w_q)

after::

    dx       = aten.add(aten.add(a_k, w_k), aten.add(a_q, w_q))

Autograd adds a gradient to the others when it has it, so that no two of the sum's parts that make one operator sum need
be neighbours. Here they become neighbours: `recover_operators` makes ``Wk' dk + s Ak' (Bk' dk)`` of the first pair, and
`fuse_epilogues` adds it to the second as a residual. What reads no weight comes first. Forwards are left as they are:
their authors wrote the order down.
"""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Graph, Node

from gawscompile.analysis.forms import Form, form_of
from gawscompile.analysis.identity import source_of
from gawscompile.analysis.matrices import scaling_of
from gawscompile.analysis.reading import args, aten, is_call, same_value, value
from gawscompile.passes.context import Context, backward


def run(graph: Graph, context: Context) -> None:
    if not context.training:
        return
    forms: dict[Node, Form] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (form := form_of(node, forms, context.fixed)) is not None:
            forms[node] = form
    for node in reversed(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if backward(node) and not _summand(node) and context.looks_at(node):
            _gather(graph, context, node, forms)


def _adds(node: object) -> bool:
    """Whether it is a plain sum of two gradients of one shape, dtype and layout."""
    if not isinstance(node, Node) or not is_call(node, aten.add.Tensor) or node.kwargs or not backward(node):
        return False
    own = node.meta["val"]
    parts = [value(part) for part in args(node)]
    return all(part is not None and same_value(part, own) and part.stride() == own.stride() for part in parts)


def _summand(node: Node) -> bool:
    """Whether it is itself a part of a sum, and nothing else."""
    return _adds(node) and len(node.users) == 1 and _adds(next(iter(node.users)))


def _parts(node: Node) -> list[Node]:
    """What is added up, in that order."""
    found: list[Node] = []
    for part in args(node):
        found += _parts(part) if _adds(part) and len(part.users) == 1 else [part]
    return found


def _gather(graph: Graph, context: Context, node: Node, forms: dict[Node, Form]) -> None:
    if not _adds(node):
        return
    parts = _parts(node)
    kinds: dict[Node | None, list[Node]] = defaultdict(list)
    for part in parts:
        kinds[_read(part, forms)].append(part)
    together = [part for kind in sorted(kinds, key=lambda kind: kind is not None) for part in kinds[kind]]
    alone = all(len(kinds[kind]) == 1 for kind in kinds if kind is not None)
    if len(kinds) == 1 or alone or not context.allows(node):
        return
    total: Node | None = None
    with graph.inserting_before(node):
        for kind in sorted(kinds, key=lambda kind: -1 if kind is None else together.index(kinds[kind][0])):
            own: Node | None = None
            for part in kinds[kind]:
                own = part if own is None else _sum(context, own, part, node)
            assert own is not None
            total = own if total is None else _sum(context, total, own, node)
    assert total is not None
    context.replace(node, total)
    context.erase(node)
    context.matched()


def _sum(context: Context, a: Node, b: Node, node: Node) -> Node:
    return context.insert(aten.add.Tensor, (a, b), node, node.meta["val"])


def _read(part: Node, forms: dict[Node, Form]) -> Node | None:
    """The activation of which `part` is a linear function, if it is one of a gradient: what scales it is a part of the
    function."""
    form = forms.get(part)
    if form is None or form.regrouped:
        return None
    x = source_of(form.activation)
    while (scaling := scaling_of(x)) is not None:
        x = source_of(scaling[0])
    return x
