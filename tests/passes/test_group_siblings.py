"""group_siblings: projections of one activation become one group."""

import torch
import torch.nn.functional as F

from gawscompile.ir.sums import operator_group, operator_sum
from gawscompile.passes import group_siblings
from tests.graphs import bert_graph, capture, count, llama_graph, small_llama, tokens


def sizes(context):
    groups = context.graph.find_nodes(op="call_function", target=operator_group)
    return sorted(len(node.args[1]) for node in groups)


def test_counts_follow_from_the_model():
    layers = 2
    context = llama_graph(layers).until("group_siblings")
    # q/k/v, o, gate/up, down in every layer, and the head
    assert sizes(context) == sorted([3, 1, 2, 1] * layers + [1])
    context = bert_graph(layers).until("group_siblings")
    assert sizes(context) == sorted([3, 1, 1, 1] * layers + [1])
    assert count(context, operator_sum) == 0


def test_groups_keep_their_values_and_a_second_run_matches_nothing():
    captured = llama_graph()
    context = captured.until("group_siblings")
    torch.testing.assert_close(captured.run(context), captured.outputs)
    before = context.record.passes["group_siblings"]
    group_siblings.run(context.graph, context)
    assert context.record.passes["group_siblings"] == before


def test_adapted_and_plain_siblings_share_a_group():
    from peft import LoraConfig

    model = small_llama(layers=1, lora=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    captured = capture(model, tokens(1, 4), use_cache=False)
    context = captured.until("group_siblings")
    assert sizes(context) == [1, 1, 1, 2, 3]
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_member_that_reads_something_later_gets_a_group_of_its_own():
    def function(x, w, v, a, b):
        y = F.linear(x, w)
        scale = y.sum()
        return y, F.linear(x, v) + F.linear(F.linear(x, a), b) * scale

    captured = capture(
        function, torch.randn(3, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    )
    context = captured.until("group_siblings")
    assert sizes(context) == [1, 1]
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-5, atol=1e-4)


def test_autocast_siblings_are_seen_to_read_one_activation():
    def function(x, w, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w), F.linear(x, v)

    captured = capture(function, torch.randn(3, 8), torch.randn(6, 8), torch.randn(4, 8))
    context = captured.until("group_siblings")
    groups = context.graph.find_nodes(op="call_function", target=operator_group)
    # the bf16 copies of fp32 weights are not formed: weights are read as they are stored, which is no less exact
    assert len(groups) == 1 and len(groups[0].args[1]) == 2


def test_views_of_parameters_are_brought_before_the_group():
    """Scales of torchao's int8 are viewed as a matrix beside each projection."""

    def function(x, *weights):
        return tuple(F.linear(x, codes.to(x.dtype) * scales.view(6, 1)) for codes, scales in (weights[:2], weights[2:]))

    weights = [torch.randint(-9, 9, (6, 32), dtype=torch.int8), torch.rand(6)]
    captured = capture(function, torch.randn(3, 32), *weights, *weights)
    context = captured.until("group_siblings")
    assert sizes(context) == [2]
    torch.testing.assert_close(captured.run(context), captured.outputs)
