"""``gaws::project`` on a GPU: the number of tokens picks the plan, whose generated module launches the kernels.

    gaws::project_traced(Tensor x, Tensor[] operands, str program) -> Tensor[]

is the same for plans that keep nothing between calls (`single_launch` keeps counters) and a number of tokens that is
known. It is a `torch.library.triton_op`, and `inline` puts what it is made of into a graph, for Inductor to launch from
its own code and to export ahead of time: AOTAutograd, which would do so itself, is done when our passes run.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gawscompile.codegen import triton
from gawscompile.codegen.triton_checks import check_schedules
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning.table import Program

BLOCK, LINE = 1 << 18, 32
"""Counters in a block for CUDA graphs, and in a line of the cache: what one call gets is a number of whole lines."""


@dataclass
class _Block:
    """Zeros for the calls of CUDA graphs, which keep what they have taken."""

    zeros: torch.Tensor
    taken: int = 0


_flags: dict[tuple[int, int], list[torch.Tensor]] = {}
"""The counters of each device and stream: the last buffer is in use, launches under way may use those before it."""
_blocks: dict[int, list[_Block]] = {}
"""The blocks of each device; the last is in use."""
_lock = threading.Lock()


def project(x: torch.Tensor, operands: list[torch.Tensor], program: str) -> list[torch.Tensor]:
    """The CUDA kernel of the op. Raises `ValueError`, naming the tensor, where one no longer fits the program, and
    `RuntimeError` where a scale is a number on the CPU and a CUDA graph is being captured: replays would not see it."""
    parsed = Program.parse(program)
    spec = parsed.spec
    m = math.prod(x.shape[:-1])
    if m == 0:
        return _nothing(x, spec)
    plan = triton.Plan.parse(parsed.table.pick(m))
    tensors = [t.contiguous() for t in _flat(m, spec, operands)]
    with torch.cuda.device_of(x):  # Triton launches on the current device and its current stream
        if any(t.device != x.device for t in tensors) and torch.cuda.is_current_stream_capturing():
            there = [o.name for o, t in zip(spec.operands(), tensors, strict=True) if t.device != x.device]
            raise RuntimeError(
                f"gaws: {', '.join(there)} of {spec} on the CPU, while a CUDA graph is captured on {x.device}: make the"
                " scaling a tensor there, or compile with dynamic=False, where it is a constant"
            )
        count = m * triton.flags_per_token(spec, plan)
        flags = counters(x.device, count) if count else None
        outs = triton.launch(spec, plan, x.reshape(m, spec.k).contiguous(), tensors, flags, parsed.tuned)
    return _shaped(x, spec, outs)


def _nothing(x: torch.Tensor, spec: KernelSpec) -> list[torch.Tensor]:
    """The outputs for no tokens."""
    return [x.new_empty((*x.shape[:-1], n), dtype=DTYPES[dtype]) for n, dtype in spec.outputs]


def _flat(m: int, spec: KernelSpec, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """The operands, those with a row for each token as ``[m, …]``."""
    named = zip(spec.operands(), operands, strict=True)
    return [t.reshape(m, int(o.shape[-1])) if o.activation else t for o, t in named]


def _shaped(x: torch.Tensor, spec: KernelSpec, outs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [y.view(*x.shape[:-1], n) for y, (n, _) in zip(outs, spec.outputs, strict=True)]


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` zeros that kernels leave as zeros, which no launch that may run at the same time uses.

    One buffer serves a stream, whose launches follow each other. What a CUDA graph captures may be replayed on any
    stream, so every call in it gets counters of its own for good, from a block that was made before the capture.
    """
    index = device.index or 0
    if torch.cuda.is_current_stream_capturing():
        return _of_a_graph(index, device, count)
    with _lock:
        blocks = _blocks.setdefault(index, [])
        if not blocks or blocks[-1].taken > BLOCK // 2:  # now, since in a capture it would be too late
            blocks.append(_Block(_outside(device, BLOCK)))
        kept = _flags.setdefault((index, torch.cuda.current_stream(device).cuda_stream), [])
        if not kept or kept[-1].numel() < count:
            kept.append(_outside(device, max(count, 1 << 12)))
        return kept[-1]


def _of_a_graph(index: int, device: torch.device, count: int) -> torch.Tensor:
    """Counters that nobody else gets. Where the block is used up, or no call came before the capture, the graph makes
    them and clears them again in every replay, which costs a launch."""
    with _lock:
        size = -(-count // LINE) * LINE
        for block in _blocks.get(index, [])[-1:]:
            if block.taken + size <= BLOCK:
                block.taken += size
                return block.zeros[block.taken - size : block.taken]
    return torch.zeros(count, dtype=torch.int32, device=device)


def _outside(device: torch.device, count: int) -> torch.Tensor:
    """Zeros made in a thread of its own: while CUDA graphs warm up, this thread allocates in their private pool."""

    def make() -> torch.Tensor:
        made = torch.zeros(count, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


@torch.library.triton_op("gaws::project_traced", mutates_args={})
def project_traced(x: torch.Tensor, operands: list[torch.Tensor], program: str) -> list[torch.Tensor]:
    """`project`, for plans without counters and a number of tokens that is known when it is traced."""
    parsed = Program.parse(program)
    spec = parsed.spec
    m = math.prod(x.shape[:-1])
    if m == 0:
        return _nothing(x, spec)
    module = triton.load(spec, triton.Plan.parse(parsed.table.pick(m)), parsed.tuned)
    tensors = [t.contiguous() for t in _flat(m, spec, operands)]
    check_schedules(spec, m, tensors)
    kernels = [torch.library.wrap_triton(kernel) for kernel in module.KERNELS]
    return _shaped(x, spec, module.launch(x.reshape(m, spec.k), tensors, kernels=kernels))


def inline(graph: Graph) -> None:
    """Replace every ``gaws::project_traced`` of `graph` by the Triton launches, allocations and library calls that it
    stands for, spelt as Inductor wants them: it has decomposed the rest of the graph by now."""
    from torch._inductor.decomposition import select_decomp_table

    for node in graph.find_nodes(op="call_function", target=torch.ops.gaws.project_traced.default):
        x, operands, program = cast(tuple[Node, list[Node], str], node.args)

        def call(x: torch.Tensor, *operands: torch.Tensor, program: str = program) -> list[torch.Tensor]:
            return torch.ops.gaws.project_traced(x, list(operands), program)

        reads = [x, *operands]
        fakes = [read.meta["val"] for read in reads]
        with fakes[0].fake_mode:
            traced = make_fx(dispatch_functionalize(call), decomposition_table=select_decomp_table())(*fakes).graph
        with graph.inserting_before(node):
            copied = dict(zip(traced.find_nodes(op="placeholder"), reads, strict=True))
            outputs = cast(list[Node], graph.graph_copy(traced, copied))
        for item in list(node.users):
            item.replace_all_uses_with(outputs[cast(Any, item.args)[1]])
            graph.erase_node(item)
        graph.erase_node(node)
