"""The verifier between passes: a node of ours whose operators, operands or values do not fit is named."""

from __future__ import annotations

import pytest
import torch

from gawscompile.ir.operators import Bias, LowRank
from gawscompile.ir.sums import Sum, operator_sum, project
from gawscompile.passes.context import VerifierError, verify
from gawscompile.runtime.ops import OPS
from tests.graphs import llama_graph


@pytest.fixture
def captured():
    return llama_graph(1)


def refused(context, node, says):
    context.touch(node)
    with pytest.raises(VerifierError, match=says):
        verify(context)


def test_operators_of_a_sum(captured):
    context = captured.until("recover_operators")
    nodes = context.graph.find_nodes(op="call_function", target=operator_sum)
    node = next(node for node in nodes if node.args[1].lowrank)
    x, total = node.args
    dense, adapter = total.terms
    wrong = {
        "LowRank": Sum((dense, LowRank(adapter.b, adapter.a, adapter.scale)), total.out),
        "Bias": Sum.of((*total.terms, Bias(adapter.a)), total.out),
        "not in order": Sum((adapter, dense), total.out),
        "its operators make": Sum(total.terms, "f16"),
    }
    for says, broken in wrong.items():
        node.args = (x, broken)
        refused(context, node, says)
    node.args = (x, total)
    context.touch(node)
    verify(context)


def test_values_of_a_group(captured):
    context = captured.until("fuse_epilogues")
    node = next(n for n in context.graph.find_nodes(op="call_function", target=project) if not n.args[2])
    value = node.meta["val"]
    for broken in (value[:-1], [one.to(torch.float16) for one in value], [one[..., :-1] for one in value]):
        node.meta["val"] = broken
        refused(context, node, "its operators make")


def test_operands_of_a_lowered_call(captured):
    context = captured.until()
    node = next(node for target in OPS for node in context.graph.find_nodes(op="call_function", target=target))
    x, operands, program = node.args
    node.args = (x, operands[:-1], program)
    refused(context, node, "operands for")
    node.args = (x, [operands[1], operands[0], *operands[2:]], program)
    refused(context, node, "w0 is")
