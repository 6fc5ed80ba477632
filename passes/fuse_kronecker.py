"""A group with Kronecker adapters becomes one grouped Kronecker (GAWS) projection; no ΔW is ever formed.

before::

    group = operators.operator_group(x, ((Dense(Wq), Kronecker((Mode(10, Gq, 1),))), (Dense(Wk), LowRank(…))), (…))

after::

    fused = operators.project(x, [Wq, Gq, Wk, …], "k=2560 x=bf16; n=2560 w=bf16 … kron(10*256x256*1 f32 s=1.0); …")

A last mode product ``I ⊗ G`` acts on x (or on the one before it) and is added inside the base projection's tile: GAWS
costs no stage of its own (Alsuradi et al., Findings of ACL 2026). LoRA siblings and terms ride along as in
`fuse_zflora`.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from gawscompile.ir.operators import Kronecker, Mode, operator_group
from gawscompile.ir.spec import DTYPE_NAMES, KroneckerSpec, ModeSpec, ProjectionSpec
from gawscompile.passes.context import Context, args, dtype, shape
from gawscompile.passes.fuse_zflora import fuse, projection, scale_of


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=operator_group):
        _, sums, outs = args(node)
        if not any(isinstance(term, Kronecker) for terms in sums for term in terms) or not context.allows(node):
            continue
        operands: list[Node] = []
        projections = [_projection(terms, out, operands) for terms, out in zip(sums, outs, strict=True)]
        fuse(graph, context, node, projections, operands)


def _projection(terms: tuple[Any, ...], out: Any, operands: list[Node]) -> ProjectionSpec:
    factors: list[Node] = []
    kronecker = tuple(_kronecker(term, factors) for term in terms if isinstance(term, Kronecker))
    spec = projection(terms, out, operands, kronecker)
    operands += factors
    return spec


def _kronecker(term: Kronecker, operands: list[Node]) -> KroneckerSpec:
    fixed, scale_dtype = scale_of(term.scale)
    operands += [mode.matrix for mode in term.modes]
    operands += [term.scale] if fixed is None else []
    modes = tuple(_mode(mode) for mode in term.modes)
    return KroneckerSpec(modes, DTYPE_NAMES[dtype(term.modes[0].matrix)], fixed, scale_dtype)


def _mode(mode: Mode) -> ModeSpec:
    sizes = [int(size) for size in shape(mode.matrix)]
    return ModeSpec(mode.before, sizes[0] if len(sizes) == 2 else None, sizes[-1], mode.after)
