"""recover_operators: the algebra of an adapter, however it was written; near misses stay as they were."""

import peft
import pytest
import torch
import torch.nn.functional as F

from gawscompile.analysis.reading import aten
from gawscompile.ir.operators import Dense, LowRank
from gawscompile.ir.sums import linear, operator_sum
from tests.graphs import bert_graph, capture, count, llama_graph, randomise, tokens

K, N, R = 32, 24, 4


def tensors(dtype=torch.float32, factors=torch.float32):
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, K).to(dtype), torch.randn(N, K).to(dtype)
    return x, w, torch.randn(R, K).to(factors), torch.randn(N, R).to(factors)


def terms_of(context):
    return [node.args[1].terms for node in context.graph.find_nodes(op="call_function", target=operator_sum)]


SPELLINGS = {
    "scale last": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0,
    "scale between": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a) * 2.0, b),
    "scale split": lambda x, w, a, b: F.linear(x, w) + 4.0 * F.linear(F.linear(x, a) * 0.5, b),
    "adapter first": lambda x, w, a, b: 2.0 * (x @ a.T @ b.T) + x @ w.T,
    "sum in place": lambda x, w, a, b: F.linear(x, w).add_(F.linear(F.linear(x, a), b).mul_(2.0)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_adapter(name):
    captured = capture(SPELLINGS[name], *tensors())
    context = captured.until("recover_operators")
    (terms,) = terms_of(context)
    assert [type(term) for term in terms] == [Dense, LowRank] and terms[1].scale == 2.0
    assert count(context, linear) == 0
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-5, atol=1e-4)


def test_fp32_adapter_on_a_bf16_base_takes_the_narrow_activation():
    def peft_forward(x, w, a, b):
        return (F.linear(x, w) + F.linear(F.linear(x.float(), a), b) * 2.0).to(x.dtype)

    captured = capture(peft_forward, *tensors(torch.bfloat16))
    context = captured.until("recover_operators")
    (node,) = context.graph.find_nodes(op="call_function", target=operator_sum)
    assert node.args[0].op == "placeholder" and node.args[1].out == "bf16"
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_several_adapters_add_up():
    def two(x, w, a, b, c, d):
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0 + F.linear(F.linear(x, c), d) * 3.0

    captured = capture(two, *tensors(), torch.randn(5, K), torch.randn(N, 5))
    context = captured.until("recover_operators")
    (terms,) = terms_of(context)
    assert [term.scale for term in terms[1:]] == [2.0, 3.0]
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-5, atol=1e-4)


def test_scale_as_an_input():
    def scaled(x, w, a, b, s):
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * s

    captured = capture(scaled, *tensors(), torch.tensor(1.5))
    context = captured.until("recover_operators")
    (terms,) = terms_of(context)
    assert isinstance(terms[1].scale, torch.fx.Node)
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-5, atol=1e-4)


NEAR_MISSES = {
    "nonlinearity between": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a).relu(), b),
    "scale per row": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * b[:, 0],
    "other activation": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x.sin(), a), b),
    "gate from the activation": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * x.mean(),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_recover_no_wrong_adapter(name):
    captured = capture(NEAR_MISSES[name], *tensors())
    context = captured.until("recover_operators")
    adapted = [terms for terms in terms_of(context) if any(isinstance(term, LowRank) for term in terms)]
    if name == "gate from the activation":
        assert len(adapted) == 1  # a 0-d scale is a scale, wherever it comes from
    else:
        assert not adapted
    torch.testing.assert_close(captured.run(captured.until()), captured.outputs, rtol=1e-5, atol=1e-4)


def test_intermediate_that_is_read_elsewhere_is_computed_for_both():
    def escaping(x, w, a, b):
        u = F.linear(x, a)
        return F.linear(x, w) + F.linear(u, b), u

    captured = capture(escaping, *tensors())
    context = captured.until("recover_operators")
    assert [[type(term) for term in terms] for terms in terms_of(context)] == [[Dense], [Dense, LowRank]]
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-5, atol=1e-4)


def test_an_adapter_of_an_embedding():
    """Its A is looked up, and B projects what was found; the linear behind it has the adapter of its own."""
    net = torch.nn.Sequential(torch.nn.Embedding(50, K), torch.nn.Tanh(), torch.nn.Linear(K, N))
    model = peft.get_peft_model(net.eval(), peft.LoraConfig(r=R, lora_alpha=8, target_modules=["0", "2"]))
    captured = capture(randomise(model).eval(), tokens(2, 3) % 50, kernels=True)
    context = captured.until()
    torch.testing.assert_close(captured.run(context)[0], captured.outputs[0], rtol=1e-5, atol=1e-5)
    found = [entry.operators for entry in context.record.linears if entry.status == "fused"]
    assert found == [f"Dense[{K}x{R}]", f"Dense[{N}x{K}] + Bias[{N}] + 2·LowRank(r={R})"]


def test_factors_wider_than_the_projection_are_refused():
    captured = capture(
        SPELLINGS["scale last"], torch.randn(3, K), torch.randn(N, K), torch.randn(40, K), torch.randn(N, 40)
    )
    context = captured.until()
    assert any("FACTOR_SHAPE: rank 40" in note for note in context.record.notes)
    assert [entry.adapters for entry in context.record.linears] == [0, 0, 0]  # each a projection of its own
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=1e-4, atol=1e-4)


def test_a_chain_without_a_base_stays_two_linears():
    captured = capture(
        lambda x, a, b: F.linear(F.linear(x, a), b), torch.randn(3, K), torch.randn(R, K), torch.randn(N, R)
    )
    context = captured.until("recover_operators")
    assert [[type(term) for term in terms] for terms in terms_of(context)] == [[Dense], [Dense]]


def test_two_bases_of_one_activation_stay_two():
    captured = capture(
        lambda x, v, w: F.linear(x, v) + F.linear(x, w), torch.randn(3, K), torch.randn(N, K), torch.randn(N, K)
    )
    assert len(terms_of(captured.until("recover_operators"))) == 2


def test_weight_computed_in_the_graph_is_refused_with_its_reason():
    def quantised(x, q, s):
        return F.linear(x, q.to(x.dtype) * s + 0.5)  # with an offset that no kernel knows

    captured = capture(quantised, torch.randn(3, K), torch.randint(-5, 5, (N, K), dtype=torch.int8), torch.rand(N, 1))
    context = captured.until()
    (entry,) = context.record.linears
    assert (entry.status, entry.reason, entry.stage) == ("rejected", "WEIGHT_COMPUTED", "recover_operators")
    assert count(context, aten.mm.default) == 1
    torch.testing.assert_close(captured.run(context), captured.outputs)


def test_fp64_is_refused():
    captured = capture(SPELLINGS["scale last"], *tensors(torch.float64, torch.float64))
    entries = captured.until("recover_operators").record.linears
    assert {(entry.status, entry.reason) for entry in entries} == {("rejected", "DTYPE")}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_every_adapter_of_a_model_is_recovered(dtype):
    layers = 2
    for captured, adapted in ((llama_graph(layers, dtype), 7 * layers), (bert_graph(layers, dtype), 6 * layers + 1)):
        context = captured.until("recover_operators")
        with_adapters = [terms for terms in terms_of(context) if any(isinstance(term, LowRank) for term in terms)]
        assert len(with_adapters) == adapted
        assert sum(entry.adapters for entry in context.record.linears) == adapted
        torch.testing.assert_close(captured.run(context), captured.outputs)
