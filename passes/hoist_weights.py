"""What parameters alone determine leaves the forward: it is computed once per state of what it is made of.

before::

    norm = aten.linalg_vector_norm(aten.add(W, aten.mul(aten.mm(B, A), 2.0)), 2, [1])
    c    = aten.div(magnitude, norm)
    sum  = operators.operator_sum(x, Sum((Dense(W), RowScale(c), LowRank(A, B, 2.0)), 'f32'))

after::

    c    = operators.hoisted("[[\"aten.mm.default\", …", [W, A, B, magnitude])
    sum  = operators.operator_sum(x, Sum((Dense(W), RowScale(c), LowRank(A, B, 2.0)), 'f32'))

DoRA's rescale, LoHa's ΔW, rotations of weights and the like. Only what a projection reads is hoisted: the projection's
op takes a checksum of its sources in every call (`runtime/dispatch.cpp`) and computes it anew where that is another, so
nothing that Inductor might overwrite is handed to it.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from gawscompile.analysis.fixed import cone
from gawscompile.analysis.reading import CASTS, ONES, TRANSPOSES, VIEWS, args, aten, is_call, is_parameter, shape, value
from gawscompile.ir.recipe import RecipeError, hoisted, write
from gawscompile.ir.sums import Sum, operator_sum
from gawscompile.passes.context import Context
from gawscompile.planning.devices import on_cpu
from gawscompile.planning.table import Derived

STEPS = 4096
"""Of one recipe at most: it is text that every call hands on."""


def run(graph: Graph, context: Context) -> None:
    made: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator_sum):
        if not context.looks_at(node):
            continue
        total: Sum = args(node)[1]
        read = [leaf for leaf in total.leaves if leaf is not total.bias]
        for leaf in read:
            if leaf in context.fixed and leaf not in made and worthwhile(leaf) and context.allows(leaf):
                made[leaf] = _hoist(graph, context, leaf)
        if any(leaf in made for leaf in read):
            node.args = map_arg(node.args, lambda n: made.get(n, n))
            context.touch(node)
            for entry in node.meta["gaws_entries"]:
                entry.hoisted = sum(leaf in made for leaf in read)
            context.matched()
    for leaf in made:
        context.erase(leaf)


def hoistable(leaf: Node, context: Context) -> bool:
    """Whether a projection may read `leaf` as if it were a parameter."""
    if leaf not in context.fixed:
        return False
    nodes = cone(leaf)
    if any(_unpacks(node, leaf) for node in nodes):
        return False
    try:
        write(nodes, _sources(nodes), context.holder)
    except RecipeError:
        return False
    return len(nodes) <= STEPS


INDEXING = (aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.embedding.default)


def _unpacks(node: Node, leaf: Node) -> bool:
    """Whether it makes numbers of about as many integers as `leaf` has: kept, they would undo what quantising saves."""
    made = value(node)
    if made is None or not made.is_floating_point() or is_call(node, *INDEXING):
        return False
    read = [value(source) for source in node.all_input_nodes]
    return any(t is not None and _integers(t) and 8 * t.numel() >= leaf.meta["val"].numel() for t in read)


def _integers(t: torch.Tensor) -> bool:
    return not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool


def worthwhile(leaf: Node) -> bool:
    """Whether it is no single number and no bank's schedule, more than a parameter viewed or cast, and on a CPU:
    elsewhere comparing sources would wait for the device, and Inductor computes it in every call."""
    found = value(leaf)
    if found is None or shape(leaf) == () or not on_cpu(leaf) or not found.is_floating_point():
        return False
    return not all(is_call(node, *CASTS, *VIEWS, *ONES, *TRANSPOSES) for node in cone(leaf))


def _sources(nodes: list[Node]) -> list[Node]:
    read = {source for node in nodes for source in node.all_input_nodes if is_parameter(source)}
    return sorted(read.difference(nodes))  # a parameter's view is a step of the recipe


def _hoist(graph: Graph, context: Context, leaf: Node) -> Node:
    nodes = cone(leaf)
    sources = _sources(nodes)
    plain = leaf.meta["val"].contiguous()
    with graph.inserting_after(sources[-1]):
        new = context.insert(hoisted, (write(nodes, sources, context.holder), sources), leaf, plain)
    if (origin := context.original(leaf)) is not None:
        context.stands_for[new] = origin
    return new


def arguments(operands: list[Node]) -> tuple[list[Node], tuple[Derived, ...]]:
    """What the op takes for `operands`: those that are no `hoisted`, then the sources of those that are."""
    if not any(is_call(node, hoisted) for node in operands):
        return operands, ()
    taken = [node for node in operands if not is_call(node, hoisted)]
    found = []
    for at, node in enumerate(operands):
        if not is_call(node, hoisted):
            continue
        recipe, sources = args(node)
        taken += [source for source in sources if source not in taken]
        found.append(Derived(at, tuple(taken.index(source) for source in sources), recipe))
    return taken, tuple(found)
