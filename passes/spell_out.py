"""De-lowering: one of our nodes becomes the aten operations that its meaning consists of.

Between any two rewrites the graph is a program: `linear`, `operator_sum`, `operator_group`, `project` and `hoisted` are
functions with a meaning. Tracing that meaning, as AOTAutograd traced the model, gives what Inductor compiles.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental import _config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from gawscompile.analysis.reading import PRODUCTS, args, is_call
from gawscompile.ir.sums import operator_group, project
from gawscompile.passes.context import Context


def spell_out(context: Context, node: Node, seen: bool = False) -> None:
    """Replace `node` by its meaning in aten. `seen`: the products of weights in it need no entries of their own."""
    reads = node.all_input_nodes
    meaning = _meaning(context, node, reads)
    with context.graph.inserting_before(node):
        copied = dict(zip(meaning.find_nodes(op="placeholder"), reads, strict=True))
        results = cast(Any, context.graph.graph_copy(meaning, copied))
    for new in set(copied.values()) - set(reads):
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        context.touch(new)
        if seen and is_call(new, *PRODUCTS):
            context.seen.add(new)
    if node.target in (operator_group, project):
        for item in list(node.users):
            assert item.target is operator.getitem
            context.replace(item, results[args(item)[1]])
            context.erase(item)
    else:
        context.replace(node, results)
    context.erase(node)


def _meaning(context: Context, node: Node, reads: list[Node]) -> Graph:
    """The graph of what `node` computes of `reads`. Nodes of the same operators and types share it."""
    numbers = {read: f"%{i} {_type(read)}" for i, read in enumerate(reads)}
    key = f"{node.target} {map_arg(node.args, numbers.__getitem__)}"
    if key not in context.meanings:
        inputs: Any = node.args

        def run(*tensors: Any) -> Any:
            return cast(Any, node.target)(*map_arg(inputs, dict(zip(reads, tensors, strict=True)).__getitem__))

        values = [read.meta["val"] for read in reads]
        # decompositions choose by symbolic sizes where they can: they must take the general way, and add no guard
        general = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
        with values[0].fake_mode, torch.no_grad(), general:
            # not the nodes' own: passes give several nodes one, and the trace would take those for the same tensor
            fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
            context.meanings[key] = make_fx(run, decomposition_table=select_decomp_table())(*fakes).graph
    return context.meanings[key]


def _type(node: Node) -> str:
    found = node.meta["val"]
    return f"{tuple(found.shape)} {found.stride()} {found.dtype} {found.device}"
