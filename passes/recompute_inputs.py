"""What an adapter's gradient alone reads is computed again in the backward, where that reads little and costs little.

before, of the adapter of `down`, whose x ``[m, k]`` is SwiGLU's product::

    x  = aten.mul(silu, up)                    # forward: the partitioner saves x, as a product in the backward reads it
    dA = aten.mm(aten.permute(v, [1, 0]), x)   # backward

after::

    x  = aten.mul(silu, up)                    # the same, tagged: the backward forms x anew from gate and up

A frozen base needs gate and up for its own gradient, and not x. So x is saved for dA alone, and is as wide as the
layer. The same holds for what a norm gives: its gradient reads what the norm read. Tagged is what elementwise
operations make of values that the backward reads for other ends, and what nothing but products reads there.

The tag is that of activation checkpoints (``torch.utils.checkpoint``). Regions that a user checkpoints are left alone.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from gawscompile.analysis.reading import CASTS, TRANSPOSES, VIEWS, args, aten, is_call, value
from gawscompile.passes.context import Context, backward

NO_REGION = 0
"""The partitioner compares the numbers of checkpointed regions, which begin at one."""

LONGEST = 16
"""Elementwise operations that are computed again for one value, at most."""


def run(graph: Graph, context: Context) -> None:
    if not context.training:
        return
    again: set[Node] = set()
    for node in graph.nodes:
        if node in again or not _for_products(node) or not context.looks_at(node):
            continue
        chain = _chain(context, node, again)
        if chain and context.allows(node):
            for one in chain:
                one.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": NO_REGION}
                context.touch(one)
            again.update(chain)
            context.matched()


def _for_products(node: Node) -> bool:
    """Whether the backward reads `node`, a value of the forward, and does so in products alone."""
    readers = [] if is_call(node, *VIEWS) else _readers(node)
    return bool(readers) and all(is_call(reader, aten.mm.default) for reader in readers)


def _readers(node: Node) -> list[Node]:
    """What reads a value of the forward in the backward, behind views and casts."""
    found: list[Node] = []
    pending = [] if backward(node) else list(node.users)
    while pending:
        user = pending.pop()
        if is_call(user, *VIEWS, *TRANSPOSES, *CASTS):
            pending += user.users
        elif backward(user):
            found.append(user)
    return found


def _chain(context: Context, node: Node, again: set[Node]) -> list[Node]:
    """The operations that make `node` of what the backward has anyway, if there are few and all are elementwise. It has
    what is computed `again`."""
    chain, pending = dict[Node, None](), [node]
    while pending:
        one = pending.pop()
        if one in chain:
            continue
        if not _elementwise(one) or len(chain) == LONGEST:
            return []
        chain[one] = None
        tensors = [read for read in one.all_input_nodes if value(read) is not None]
        pending += [read for read in tensors if read not in again and not _there(context, read)]
    return list(chain)


def _there(context: Context, node: Node) -> bool:
    """Whether the backward has the value anyway: a parameter, or what is read there. Another input may be written
    before the backward comes."""
    while is_call(node, *VIEWS, *TRANSPOSES):
        node = args(node)[0]
    written = any(user.is_impure() for user in node.users)
    return not written and (node in context.stored or bool(_readers(node)))


def _elementwise(node: Node) -> bool:
    if backward(node) or "recompute" in node.meta or value(node) is None:
        return False
    tags = getattr(node.target, "tags", ())
    pure = torch.Tag.nondeterministic_seeded not in tags and not node.is_impure()
    return pure and (torch.Tag.pointwise in tags or is_call(node, *VIEWS, *CASTS))
