"""A group of base projections and low-rank adapters becomes one fused (zFLoRA) projection.

before::

    group = operators.operator_group(x, (Sum((Dense(Wq), LowRank(Aq, Bq, 2.0)), 'bf16'), Sum((Dense(Wk), …), 'bf16')))

after::

    fused = operators.project(x, (Sum((Dense(Wq), LowRank(Aq, Bq, 2.0)), 'bf16'), Sum((Dense(Wk), …), 'bf16')), …)

The A's of the group ride in the base projection and the B's are its epilogue (zFLoRA: Gowda et al. 2025, used here as
an exact rewrite of plain LoRA). What another, narrow activation brings (z of a stream that zFLoRA widens) joins the
epilogue likewise: ``[W | B]`` on (x, z) without a copy of W. To what an opaque base makes of x, the adapters are added
in a kernel without W. From here on the passes add epilogues and choose a plan; `lower` prints the `KernelSpec`.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from gawscompile.analysis.reading import args
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_group, project
from gawscompile.passes.context import Context


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=operator_group):
        if not has_kronecker(node) and context.allows(node):
            fuse(graph, context, node)


def has_kronecker(group: Node) -> bool:
    return any(total.kronecker for total in args(group)[1])


def fuse(graph: Graph, context: Context, node: Node) -> None:
    """The group `node` is to run in generated kernels. Raises `SpecError` where none can be described."""
    x, sums = args(node)
    KernelSpec.of(x, sums)
    with graph.inserting_before(node):
        new = context.insert(project, (x, sums, False, None), node, node.meta["val"])
    new.meta["gaws_entries"] = node.meta["gaws_entries"]
    node.replace_all_uses_with(new)
    context.touch(*new.users)
    context.erase(node)
    context.matched()
