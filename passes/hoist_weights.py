"""What parameters alone determine leaves the forward: it is computed once per state of what it is made of.

before::

    norm = aten.linalg_vector_norm(aten.add(W, aten.mul(aten.mm(B, A), 2.0)), 2, [1])
    c    = aten.div(magnitude, norm)
    sum  = operators.operator_sum(x, (Dense(W), LowRank(B, A, 2.0), RowScale(c)), float32)

after::

    c    = operators.hoisted("[[\"aten.mm.default\", …", [W, A, B, magnitude])
    sum  = operators.operator_sum(x, (Dense(W), LowRank(B, A, 2.0), RowScale(c)), float32)

DoRA's rescale, LoHa's ΔW, rotations of weights and the like. Only what a projection reads is hoisted: the projection's
op takes a checksum of its sources in every call (`runtime/dispatch.cpp`) and computes it anew where that is another, so
nothing that Inductor might overwrite is handed to it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from gawscompile.ir.operators import Bias, operator_sum
from gawscompile.ir.recipe import RecipeError, hoisted, write
from gawscompile.passes.context import (
    CASTS,
    ONES,
    TRANSPOSES,
    VIEWS,
    Context,
    args,
    aten,
    is_call,
    is_parameter,
    leaves,
    shape,
    value,
)
from gawscompile.planning.table import Derived

STEPS = 4096
"""Of one recipe at most: it is text that every call hands on."""


def run(graph: Graph, context: Context) -> None:
    fixed = fixed_nodes(graph, context.stored)
    made: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=operator_sum):
        if not context.looks_at(node):
            continue
        x, terms, out = args(node)
        read = leaves(tuple(term for term in terms if not isinstance(term, Bias)))
        for leaf in read:
            if leaf in fixed and leaf not in made and worthwhile(leaf) and context.allows(leaf):
                made[leaf] = _hoist(graph, context, leaf)
        if any(leaf in made for leaf in read):
            node.args = map_arg((x, terms, out), lambda n: made.get(n, n))
            context.touch(node)
            for entry in node.meta["gaws_entries"]:
                entry.hoisted = sum(leaf in made for leaf in read)
            context.matched()
    for leaf in made:
        context.erase(leaf)


def fixed_nodes(graph: Graph, stored: Container[Node]) -> set[Node]:
    """The nodes that are computed from stored tensors (parameters and buffers) alone, the same in every call."""
    fixed: set[Node] = set()
    constant: set[Node] = set()  # an eye, say
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr":
            constant.add(node)
        if node.op != "call_function" or not all(n in stored or n in fixed or n in constant for n in sources):
            continue
        if not _pure(node.target) or not _static(node.meta.get("val")):
            continue
        (constant if all(n in constant for n in sources) else fixed).add(node)
    return fixed


def _pure(target: Any) -> bool:
    """Whether the same is computed of the same: nothing random, nothing that was never written."""
    tags = getattr(target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags and "empty" not in str(target)


def _static(found: Any) -> bool:
    """Whether all its sizes are known."""
    tensors = found if isinstance(found, (list, tuple)) else [found]
    return all(isinstance(t, torch.Tensor) and all(isinstance(n, int) for n in t.shape) for t in tensors)


def cone(leaf: Node) -> list[Node]:
    """The nodes that a fixed one is computed by, itself last."""
    inside: set[Node] = set()
    pending = [leaf]
    while pending:
        node = pending.pop()
        if node not in inside and not is_parameter(node):
            inside.add(node)
            pending += node.all_input_nodes
    return sorted(inside)


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
    """Whether it is no single number, more than a parameter viewed or cast, and on a CPU: elsewhere comparing sources
    would wait for the device, and Inductor computes it in every call."""
    found = value(leaf)
    if found is None or shape(leaf) == () or found.device.type != "cpu":
        return False
    return not all(is_call(node, *CASTS, *VIEWS, *ONES, *TRANSPOSES) for node in cone(leaf))


def _sources(nodes: list[Node]) -> list[Node]:
    return sorted({source for node in nodes for source in node.all_input_nodes if is_parameter(source)})


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
