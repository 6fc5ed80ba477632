"""``gaws::project`` on a GPU: the number of tokens picks the plan, whose generated module launches the kernels.

    gaws::project_traced(Tensor x, Tensor[] operands, str program) -> Tensor[]

is the same for plans that keep nothing between calls (`single_launch` keeps counters) and a number of tokens that is
known. It is a `torch.library.triton_op`, and `inline` puts what it is made of into a graph, for Inductor to launch from
its own code and to export ahead of time: AOTAutograd, which would do so itself, is done when our passes run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gawscompile.codegen import triton
from gawscompile.codegen.spec import DTYPES
from gawscompile.planning.table import Program

_flags: dict[tuple[int, int], torch.Tensor] = {}


def project(x: torch.Tensor, operands: list[torch.Tensor], program: str) -> list[torch.Tensor]:
    """The CUDA kernel of the op. Raises `ValueError`, naming the tensor, where one no longer fits the program."""
    parsed = Program.parse(program)
    spec = parsed.spec
    flat = x.reshape(-1, spec.k).contiguous()
    m = flat.shape[0]
    if m == 0:
        return [x.new_empty((*x.shape[:-1], n), dtype=DTYPES[dtype]) for n, dtype in spec.outputs]
    plan = parsed.triton_plan(m)
    tensors = [
        (t.reshape(m, -1) if o.role == "residual" else t).contiguous()
        for o, t in zip(spec.operands(), operands, strict=True)
    ]
    flags = counters(x.device, m * triton.flags_per_token(spec, plan)) if plan.name == "single_launch" else None
    outs = triton.launch(spec, plan, flat, tensors, flags, parsed.tuned)
    return [y.view(*x.shape[:-1], -1) for y in outs]


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` zeros that kernels leave as zeros, one buffer for each stream.

    A CUDA graph keeps the buffer of the stream that it was captured on: replays of graphs from one stream must not
    overlap. A buffer that is made during a capture is cleared again by every replay, which costs a launch.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    key = (device.index or 0, stream)
    kept = _flags.get(key)
    if kept is None or kept.numel() < count:
        kept = torch.zeros(max(count, 1 << 12), dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _flags[key] = kept
    return kept


@torch.library.triton_op("gaws::project_traced", mutates_args={})
def project_traced(x: torch.Tensor, operands: list[torch.Tensor], program: str) -> list[torch.Tensor]:
    """`project`, for plans without counters and a number of tokens that is known when it is traced."""
    parsed = Program.parse(program)
    spec = parsed.spec
    flat = x.reshape(-1, spec.k)
    module = triton.load(spec, parsed.triton_plan(int(flat.shape[0])), parsed.tuned)
    tensors = [
        (t.reshape(flat.shape[0], -1) if o.role == "residual" else t).contiguous()
        for o, t in zip(spec.operands(), operands, strict=True)
    ]
    kernels = [torch.library.wrap_triton(kernel) for kernel in module.KERNELS]
    return [y.view(*x.shape[:-1], -1) for y in module.launch(flat, tensors, kernels=kernels)]


def inline(graph: Graph) -> None:
    """Replace every ``gaws::project_traced`` of `graph` by the Triton launches and allocations that it stands for."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.gaws.project_traced.default):
        x, operands, program = cast(tuple[Node, list[Node], str], node.args)

        def call(x: torch.Tensor, *operands: torch.Tensor, program: str = program) -> list[torch.Tensor]:
            return torch.ops.gaws.project_traced(x, list(operands), program)

        reads = [x, *operands]
        fakes = [read.meta["val"] for read in reads]
        with fakes[0].fake_mode:
            traced = make_fx(dispatch_functionalize(call))(*fakes).graph
        with graph.inserting_before(node):
            copied = dict(zip(traced.find_nodes(op="placeholder"), reads, strict=True))
            outputs = cast(list[Node], graph.graph_copy(traced, copied))
        for item in list(node.users):
            item.replace_all_uses_with(outputs[cast(Any, item.args)[1]])
            graph.erase_node(item)
        graph.erase_node(node)
