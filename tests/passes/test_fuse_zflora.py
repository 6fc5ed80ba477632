"""fuse_zflora: a group becomes one fused projection with a spec."""

import torch
import torch.nn.functional as F

from gawscompile.ir.operators import LowRank
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum, operands_of, operator_group, project
from tests.graphs import bert_graph, capture, count, llama_graph


def specs(context):
    return [KernelSpec.of(*n.args[:3]) for n in context.graph.find_nodes(op="call_function", target=project)]


def test_specs_say_what_the_model_has():
    context = llama_graph(1).until("fuse_zflora")
    assert count(context, operator_group) == 0
    qkv, o, gate_up, down, head = specs(context)
    assert [p.n for p in qkv.projections] == [64, 32, 32] and {p.rank for p in qkv.projections} == {8}
    assert {term.scale for p in qkv.projections for term in p.lowrank} == {2.0}
    assert (o.k, gate_up.k, down.k, head.k) == (64, 64, 96, 64)
    assert head.projections[0].lowrank == ()


def test_operands_come_in_the_order_of_the_spec():
    captured = bert_graph(dtype=torch.bfloat16)
    context = captured.until("fuse_zflora")
    for node in context.graph.find_nodes(op="call_function", target=project):
        spec = KernelSpec.of(*node.args[:3])
        for operand, given in zip(spec.operands(), operands_of(node.args[1]), strict=True):
            assert tuple(given.meta["val"].shape) == operand.shape, operand.name
        assert all(p.bias.dtype == "bf16" for p in spec.projections)
    torch.testing.assert_close(captured.run(context), captured.outputs)


@torch.no_grad()
def test_each_adapter_brings_factors_of_its_own():
    """Of one rank, so that only numbers tell them apart."""
    w, x = torch.randn(24, 64), torch.randn(5, 64)
    factors = [(torch.randn(4, 64), torch.randn(24, 4)) for _ in range(2)]

    def function(x):
        one, two = (F.linear(F.linear(x, a), b) for a, b in factors)
        return F.linear(x, w) + 2 * one + two

    captured = capture(function, x)
    context = captured.until("fuse_zflora")
    (node,) = context.graph.find_nodes(op="call_function", target=project)
    assert len(set(operands_of(node.args[1]))) == 5
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_dropping_an_adapter_from_the_spec_changes_the_values():
    """The guard of the tests above: they would see a lost adapter."""
    captured = llama_graph(1)
    context = captured.until("fuse_zflora")
    node = context.graph.find_nodes(op="call_function", target=project)[0]
    x, sums, *rest = node.args
    lost = [Sum(tuple(t._replace(scale=0.0) if isinstance(t, LowRank) else t for t in s.terms), s.out) for s in sums]
    node.args = (x, tuple(lost), *rest)
    got = captured.run(context)
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, captured.outputs, strict=True))
