"""Packed bases on a GPU, traced without one: which codings become part of a group there, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gawscompile.ir.sums import operator_sum, project
from gawscompile.planning import devices
from tests.graphs import Captured

aten = torch.ops.aten
N, K, RANK, GROUP = 64, 128, 4, 32


def grouped(x, codes, scales, a, b):
    w = (codes.view(N, -1, GROUP).to(x.dtype) * scales.view(N, -1, 1)).view(N, K)
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


def scaled_after(x, codes, scales, a, b):
    return F.linear(x, codes.to(x.dtype)) * scales + F.linear(F.linear(x, a), b)


def halves(x, codes, scales, a, b):
    """As HQQ takes bytes apart, with what writes to slices of a new tensor made functional."""
    new = torch.empty(N, K, dtype=torch.uint8, device=x.device)
    high = torch.slice_scatter(new, aten.copy(aten.slice(new, 0, 0, N // 2), (codes & 0b11110000) >> 4), 0, 0, N // 2)
    w = torch.slice_scatter(high, aten.copy(aten.slice(high, 0, N // 2, N), codes & 0b00001111), 0, N // 2, N)
    w = (w.view(N, -1, GROUP).to(x.dtype) * scales.view(N, -1, 1)).view(N, K)
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


def rewritten(function, codes, scales, tokens, device="cuda", stage="choose_plan"):
    """The context after `stage`, planned for an H100."""
    with FakeTensorMode() as mode, torch.device(device):
        x = torch.empty(tokens, K, dtype=torch.bfloat16)
        parameters = [
            torch.empty(codes, dtype=torch.int8 if function is not halves else torch.uint8),
            torch.empty(scales, dtype=torch.bfloat16),
            torch.empty(RANK, K, dtype=torch.bfloat16),
            torch.empty(N, RANK, dtype=torch.bfloat16),
        ]
    with mode:
        traced = make_fx(function, decomposition_table=select_decomp_table())(x, *parameters)
    with devices.planning_for(devices.GPUS["H100"]):
        return Captured(traced.graph, traced, [], [], frozenset(range(1, 5))).until(stage)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize(
    ("function", "scales", "text"),
    [(grouped, (N, K // GROUP), "packed(int8 g=32 s=bf16)"), (scaled_after, (N,), "packed(int8 g=128 s=bf16)")],
)
def test_bytes_are_read_as_they_are(function, scales, text, tokens):
    context = rewritten(function, (N, K), scales, tokens)
    (node,) = context.graph.find_nodes(op="call_function", target=project)
    assert text in str(node.args[3]) and "lora(r=4 bf16" in str(node.args[3])
    assert "gemm_accumulate" not in str(node.args[3].table)


@pytest.mark.parametrize(("device", "kept"), [("cpu", ["uint4_halves"]), ("cuda", [])])
def test_codes_that_no_kernel_reads_are_left_alone(device, kept):
    context = rewritten(halves, (N // 2, K), (N, K // GROUP), 1, device, "recover_operators")
    sums = [node.args[1] for node in context.graph.find_nodes(op="call_function", target=operator_sum)]
    assert [total.packed.coding for total in sums if total.packed] == kept


def test_what_is_left_alone_is_planned():
    context = rewritten(halves, (N // 2, K), (N, K // GROUP), 1)
    nodes = context.graph.find_nodes(op="call_function", target=project)
    assert not any("packed" in str(node.args[3]) for node in nodes)
