"""A group with Kronecker adapters becomes one grouped Kronecker (GAWS) projection; no ΔW is ever formed.

before::

    group = operators.operator_group(x, (Sum((Dense(Wq), Kronecker((Mode(10, Gq, 1),))), 'bf16'), …))

after::

    fused = operators.project(x, (Sum((Dense(Wq), Kronecker((Mode(10, Gq, 1),))), 'bf16'), …))

A last mode product ``I ⊗ G`` acts on x (or on the one before it) and is added inside the base projection's tile: GAWS
costs no stage of its own (Alsuradi et al., Findings of ACL 2026). LoRA siblings and terms ride along as in
`fuse_zflora`.
"""

from __future__ import annotations

from torch.fx import Graph

from gawscompile.ir.sums import operator_group
from gawscompile.passes.context import Context
from gawscompile.passes.fuse_zflora import fuse, has_kronecker


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=operator_group):
        if has_kronecker(node) and context.allows(node):
            fuse(graph, context, node)
