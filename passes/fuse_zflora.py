"""A group of base projections and low-rank adapters becomes one fused (zFLoRA) projection.

before::

    group = operators.operator_group(x, ((Dense(Wq), LowRank(Bq, Aq, 2.0)), (Dense(Wk), Bias(bk))), (…))

after::

    fused = operators.project(x, [Wq, Aq, Bq, Wk, bk], "k=576 x=bf16; n=576 w=bf16 … lora(r=16 f32 s=2.0); n=192 …")

The A's of the group ride in the base projection and the B's are its epilogue (zFLoRA: Gowda et al. 2025, used here as
an exact rewrite of plain LoRA). What another, narrow activation brings (z of a stream that zFLoRA widens) joins the
epilogue likewise: ``[W | B]`` on (x, z) without a copy of W. Where a base keeps its own matmul, what that makes of x
is the residual of a projection without W. From here on a group is a `KernelSpec` and the tensors that it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.ir.operators import Bias, Dense, Given, Kept, Kronecker, LowRank, RowScale, operator_group
from gawscompile.ir.project import project
from gawscompile.ir.spec import DTYPE_NAMES, GivenSpec, KernelSpec, KroneckerSpec, LowRankSpec, ProjectionSpec
from gawscompile.passes.context import Context, args, dtype, shape


def run(graph: Graph, context: Context) -> None:
    for node in graph.find_nodes(op="call_function", target=operator_group):
        _, sums, outs = args(node)
        if any(isinstance(term, Kronecker) for terms in sums for term in terms):
            continue  # fuse_kronecker's
        if not context.allows(node):
            continue
        operands: list[Node] = []
        projections = [projection(terms, out, operands) for terms, out in zip(sums, outs, strict=True)]
        fuse(graph, context, node, projections, operands)


def fuse(
    graph: Graph, context: Context, node: Node, projections: list[ProjectionSpec], operands: list[Node]
) -> None:
    """The group `node` becomes a fused projection."""
    x = args(node)[0]
    spec = KernelSpec(int(shape(x)[-1]), DTYPE_NAMES[dtype(x)], tuple(projections))
    with graph.inserting_before(node):
        new = context.insert(project, (x, operands, str(spec)), node, node.meta["val"])
    new.meta["gaws_entries"] = node.meta["gaws_entries"]
    node.replace_all_uses_with(new)
    context.touch(*new.users)
    context.erase(node)
    context.matched()


def scale_of(scale: Any) -> tuple[float | None, str]:
    """A spec's `scale` and `scale_dtype` for a term's."""
    if isinstance(scale, (int, float)):
        return float(scale), "f32"
    return None, "f64" if dtype(scale) == torch.float64 else "f32"


def projection(
    terms: tuple[Any, ...], out: Any, operands: list[Node], kronecker: tuple[KroneckerSpec, ...] = ()
) -> ProjectionSpec:
    """The spec of one sum; its tensors are appended to `operands` in the order of ``KernelSpec.operands``, but for
    those of its Kronecker terms, which come last. `kronecker`: the specs of these."""
    dense = next((term for term in terms if isinstance(term, Dense)), None)
    kept: Any = next((term.product for term in terms if isinstance(term, Kept)), None)
    biases = [term.vector for term in terms if isinstance(term, Bias)]
    lowrank = [term for term in terms if isinstance(term, LowRank)]
    operands += [dense.weight] if dense else []
    operands += biases
    operands += [kept] if kept is not None else []
    rowscales = [term.vector for term in terms if isinstance(term, RowScale)]
    operands += rowscales
    specs = []
    for term in lowrank:
        fixed, scale_dtype = scale_of(term.scale)
        operands += [term.a, term.b] if fixed is not None else [term.a, term.b, term.scale]
        specs.append(LowRankSpec(int(shape(term.a)[0]), DTYPE_NAMES[dtype(term.a)], fixed, scale_dtype))
    given = [term for term in terms if isinstance(term, Given)]
    for beside in given:
        operands += [beside.b, beside.z]
    bias = DTYPE_NAMES[dtype(biases[0])] if biases else None
    return ProjectionSpec(
        n=int(dense.sizes[0] if dense else shape(kept)[-1]),
        dtype=DTYPE_NAMES[dtype(dense.weight)] if dense else None,
        out=DTYPE_NAMES[out],
        bias=bias,
        lowrank=tuple(specs),
        residual=DTYPE_NAMES[dtype(kept)] if kept is not None else None,
        transposed=bool(dense and dense.transposed),
        kronecker=kronecker,
        rowscale=DTYPE_NAMES[dtype(rowscales[0])] if rowscales else None,
        given=tuple(GivenSpec(int(shape(g.b)[1]), DTYPE_NAMES[dtype(g.b)], DTYPE_NAMES[dtype(g.z)]) for g in given),
    )
