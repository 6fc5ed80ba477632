"""canonicalize: every spelling of a linear becomes one."""

import pytest
import torch
import torch.nn.functional as F

from gawscompile.analysis.reading import aten, shape
from gawscompile.ir.sums import linear
from tests.graphs import bert_graph, capture, count, llama_graph


def test_mm_between_views_becomes_a_linear_on_the_unflattened_activation():
    w = torch.randn(5, 8)
    captured = capture(lambda x, w: F.linear(x, w).relu(), torch.randn(2, 3, 8), w)
    context = captured.until("canonicalize")
    (node,) = context.graph.find_nodes(op="call_function", target=linear)
    assert shape(node) == (2, 3, 5)
    assert node.args[0].op == "placeholder"
    assert (
        count(context, aten.mm.default)
        == count(context, aten.view.default)
        == count(context, aten.permute.default)
        == 0
    )
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_addmm_keeps_its_bias():
    captured = capture(lambda x, w, b: F.linear(x, w, b), torch.randn(3, 8), torch.randn(5, 8), torch.randn(5))
    context = captured.until("canonicalize")
    (node,) = context.graph.find_nodes(op="call_function", target=linear)
    assert len(node.args) == 3
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_scaled_addmm_is_the_sum_that_it_is():
    function = lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2.0)  # noqa: E731
    captured = capture(function, torch.randn(3, 8), torch.randn(5, 8), torch.randn(5))
    context = captured.until("canonicalize")
    assert count(context, linear) == 1 and count(context, aten.addmm.default) == 0
    torch.testing.assert_close(captured.run(captured.until()), captured.outputs)


def test_product_of_two_activations_comes_out_as_it_was():
    captured = capture(lambda x: x.sin() @ x.cos().t(), torch.randn(4, 6))
    context = captured.until()
    assert count(context, aten.mm.default) == 1
    assert [entry.reason for entry in context.record.linears] == ["WEIGHT_COMPUTED"]
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_weight_kept_in_out_is_taken_as_it_is():
    captured = capture(lambda x, w, b: torch.addmm(b, x, w), torch.randn(3, 8), torch.randn(8, 5), torch.randn(5))
    context = captured.until()
    (entry,) = context.record.linears
    assert (entry.status, entry.shape) == ("fused", (5, 8))
    assert "wt=f32" in context.record.groups[0].spec
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_a_turned_product_keeps_the_weight_that_it_alone_reads():
    function = lambda x, v, w: (w.t() @ F.linear(x.sin(), v).t()).t()  # noqa: E731
    captured = capture(function, torch.randn(3, 8), torch.randn(6, 8), torch.randn(6, 5))
    context = captured.until("canonicalize")
    assert count(context, linear) == 2
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_strided_weight_is_reported():
    captured = capture(lambda x, w: F.linear(x, w[:, ::2]), torch.randn(3, 4), torch.randn(5, 8))
    (entry,) = captured.until("recover_operators").record.linears
    assert (entry.status, entry.reason) == ("rejected", "WEIGHT_COMPUTED")


def test_counts_follow_from_the_model_and_a_second_run_matches_nothing():
    layers = 2
    for captured, per_layer, rest in ((llama_graph(layers), 7, 1), (bert_graph(layers), 6, 1)):
        context = captured.until("canonicalize")
        adapters = 2 * (per_layer * layers + (rest if per_layer == 6 else 0))
        assert context.record.passes["canonicalize"] == per_layer * layers + rest + adapters
        from gawscompile.passes import canonicalize

        canonicalize.run(context.graph, context)
        assert context.record.passes["canonicalize"] == per_layer * layers + rest + adapters


@pytest.mark.slow  # test_lower has one graph for any number
def test_values_with_a_symbolic_number_of_tokens():
    captured = llama_graph(1, dynamic=True)
    context = captured.until("canonicalize")
    torch.testing.assert_close(captured.run(context), captured.outputs)
