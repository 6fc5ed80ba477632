"""What a vector stands beside, whose memory a result has, and how wide a sum is: what looks alike and is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.ir.operators import LowRank, RowScale
from gawscompile.ir.sums import operator_sum
from tests.graphs import capture

N, R = 8, 2
"""As many tokens as features: nothing but its side tells a vector along the one from a vector along the other."""


def tensors(dtype=torch.float32):
    """x, w, a, b, p."""
    torch.manual_seed(0)
    sizes = (N, N), (N, N), (R, N), (N, R)
    return *(torch.randn(*s).to(dtype) for s in sizes), torch.rand(N).to(dtype) + 0.5


def terms_of(context):
    sums = [node.args[1].terms for node in context.graph.find_nodes(op="call_function", target=operator_sum)]
    return [type(term) for terms in sums for term in terms]


def right(captured, context, loose=1e-5):
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=loose, atol=loose * want.abs().max().item())


def adapted(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b)


ALONG_TOKENS = {
    "the sum": lambda x, w, a, b, p: adapted(x, w, a, b) * p[:, None],
    "the base": lambda x, w, a, b, p: F.linear(x, w) * p[:, None],
    "the adapter": lambda x, w, a, b, p: F.linear(x, w) + F.linear(F.linear(x, a), b) * p[:, None],
    "the adapter's input": lambda x, w, a, b, p: F.linear(x, w) + F.linear(F.linear(x * p[:, None], a), b),
    "input and sum": lambda x, w, a, b, p: F.linear(x, w) * p.view(-1, 1)
    + F.linear(F.linear(p.unsqueeze(-1) * x, a), b),
    "less one": lambda x, w, a, b, p: adapted(x, w, a, b) * (p[:, None] - 1),
    "in three dimensions": lambda x, w, a, b, p: adapted(x[None], w, a, b) * p[None, :, None],
    "in three dimensions, the first": lambda x, w, a, b, p: adapted(x[:, None], w, a, b) * p[:, None, None],
    "a bias": lambda x, w, a, b, p: adapted(x, w, a, b) + p[:, None],
    "of the transpose": lambda x, w, a, b, p: (w @ F.linear(x, w).T) * p,
    "rows of a weight": lambda x, w, a, b, p: F.linear(x, w) + F.linear(x, (b @ a) * p[:, None]),
}
ALONG_FEATURES = {
    "the sum": lambda x, w, a, b, p: adapted(x, w, a, b) * p,
    "under a size of one": lambda x, w, a, b, p: adapted(x, w, a, b) * p[None],
    "under two": lambda x, w, a, b, p: adapted(x[None], w, a, b) * p[None, None],
    "the adapter's input": lambda x, w, a, b, p: F.linear(x, w) + F.linear(F.linear(x * p[None], a), b),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ALONG_TOKENS)
def test_a_vector_along_the_tokens_scales_no_features(name, dynamic):
    captured = capture(ALONG_TOKENS[name], *tensors(), dynamic=dynamic)
    assert RowScale not in terms_of(captured.until("recover_operators"))
    right(captured, captured.until())


@pytest.mark.parametrize("name", ALONG_FEATURES)
def test_a_vector_along_the_features_does(name):
    captured = capture(ALONG_FEATURES[name], *tensors())
    found = terms_of(captured.until("recover_operators"))
    assert (RowScale in found) == (name != "the adapter's input")
    assert (LowRank in found) == (name != "the adapter's input")  # diag(p) before the factors makes three of them
    right(captured, captured.until())


def test_a_scale_that_widens_the_activation_is_no_scale():
    def function(x, w, a, b, s):
        return F.linear(x, w) + F.linear(F.linear(x * s, a), b)[0]

    x, w, a, b, _ = tensors()
    captured = capture(function, x, w, a, b, torch.full((1, 1, 1), 0.5))
    right(captured, captured.until())


def test_a_column_that_is_expanded_is_no_weight():
    captured = capture(
        lambda x, c: torch.bmm(x, c.expand(2, N, 4)), torch.randn(2, 3, N), torch.randn(N, 1)
    )
    context = captured.until()
    right(captured, context)


ODD = {"int": torch.int64, "bool": torch.bool, "fp64": torch.float64}
SCALED_BY = {
    "a bare linear": lambda x, w, a, b, p: F.linear(x, w) * p,
    "a sum": lambda x, w, a, b, p: adapted(x, w, a, b) * p,
    "an adapter": lambda x, w, a, b, p: F.linear(x, w) + (F.linear(F.linear(x, a), b) * p).to(x.dtype),
    "between the factors": lambda x, w, a, b, p: F.linear(x, w) + F.linear((F.linear(x, a) * p[:R]).to(x.dtype), b),
    "the adapter's input": lambda x, w, a, b, p: F.linear(x, w) + F.linear(F.linear((x * p).to(x.dtype), a), b),
    "a bias": lambda x, w, a, b, p: adapted(x, w, a, b) + p,
}


@pytest.mark.parametrize("odd", ODD)
def test_vectors_that_no_kernel_reads_stay_outside(odd):
    *rest, p = tensors()
    captured = capture(lambda *given: [scaled(*given) for scaled in SCALED_BY.values()], *rest, (p * 2).to(ODD[odd]))
    context = captured.until()
    right(captured, context)
    assert all(entry.status == "fused" for entry in context.record.linears)


@pytest.mark.parametrize("odd", ["int", "bool"])
def test_and_the_reason_is_told(odd):
    *rest, p = tensors()
    record = capture(SCALED_BY["a sum"], *rest, (p * 2).to(ODD[odd])).until().record
    assert [entry.adapters for entry in record.linears] == [1]
    assert any(f"DTYPE: a vector of {ODD[odd]} scales the rows" in note for note in record.notes)


def memory(outputs):
    """Which of them share memory."""
    at = [out.untyped_storage().data_ptr() for out in outputs]
    return [[a == b for b in at] for a in at]


RETURNED = {
    "a clone": lambda y: (y, y.clone()),
    "a clone of a view": lambda y: (y, y.view(-1).clone()),
    "a view of a clone": lambda y: (y, y.clone().view(-1)),
    "two clones": lambda y: (y.clone(), y.clone()),
    "a clone in another layout": lambda y: (y, y.transpose(0, 1).contiguous()),
    "a view": lambda y: (y, y.view(-1)),
    "a cast": lambda y: (y, y.to(torch.bfloat16), y.to(torch.float32, copy=True)),
}
MADE_BY = {
    "a linear": lambda x, w, a, b, p: F.linear(x, w),
    "a narrow one": lambda x, w, a, b, p: F.linear(x, a),
    "of three dimensions": lambda x, w, a, b, p: F.linear(x.view(2, -1, N), w),
    "a batched product": lambda x, w, a, b, p: torch.bmm(x.view(2, -1, N), w.T.expand(2, N, N)),
    "a sum": lambda x, w, a, b, p: adapted(x, w, a, b),
    "a bias": lambda x, w, a, b, p: F.linear(x, w, p),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_copy_that_is_returned_is_one(name):
    def function(*given):
        return [out for make in MADE_BY.values() for out in RETURNED[name](make(*given))]

    captured = capture(function, *tensors(), kernels=True)
    context = captured.until()
    got = captured.run(context)
    right(captured, context)
    assert memory(got) == memory(captured.outputs)
    assert [out.stride() for out in got] == [out.stride() for out in captured.outputs]


WIDENED = {
    "a linear": lambda x, w, a, b, p: F.linear(x.double(), w.double(), p.double()).float(),
    "a sum": lambda x, w, a, b, p: (F.linear(x, w).double() + F.linear(F.linear(x, a), b).double()).float(),
    "an adapter": lambda x, w, a, b, p: F.linear(x, w)
    + F.linear(F.linear(x.double(), a.double()), b.double()).float(),
    "half an adapter": lambda x, w, a, b, p: F.linear(x, w)
    + F.linear(F.linear(x, a).double(), b.double()).float(),
    "an update": lambda x, w, a, b, p: F.linear(x, w) + F.linear(x, (b.double() @ a.double()).float()),
    "a merged weight": lambda x, w, a, b, p: F.linear(x, (w.double() + b.double() @ a.double()).float()),
    "a bias": lambda x, w, a, b, p: (F.linear(x, w) + p.double()).float(),
    "scaled rows": lambda x, w, a, b, p: (F.linear(x, w) * p.double()).float(),
    "a scale": lambda x, w, a, b, p: (F.linear(x, w) * p[:1].double()).float(),
    "slices": lambda x, w, a, b, p: F.linear(x, w)
    + F.linear(x.double().unflatten(-1, (4, 2)), b[:2].double()).flatten(-2).float(),
}


@pytest.mark.parametrize("name", WIDENED)
def test_what_is_summed_in_fp64_stays_so(name, monkeypatch):
    """Sums that cancel: the last digits of fp32 are lost in them, and not in fp64."""
    x, w, a, b, p = tensors()
    x, w, a = x + 3e3, w - w.mean(1, keepdim=True), a - a.mean(1, keepdim=True)
    captured = capture(WIDENED[name], x, w, a, b, p)
    context = captured.until()
    wide = [node for node in context.graph.nodes if getattr(node.meta.get("val"), "dtype", None) == torch.float64]
    assert wide
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        exact = WIDENED[name](*(t.double() for t in (x, w, a, b, p)))
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        assert (got.double() - exact).norm() <= 2 * (want.double() - exact).norm()


@pytest.mark.parametrize("name", ["a linear", "an adapter"])
def test_and_why_is_told(name):
    record = capture(WIDENED[name], *tensors()).until().record
    refused = [entry for entry in record.linears if entry.status == "rejected"]
    assert {entry.reason for entry in refused} == {"DTYPE"} and len(refused) == (1 if name == "a linear" else 2)
    assert all("float64" in entry.detail for entry in refused)


def test_why_a_sum_in_fp64_is_not_fused_is_told():
    record = capture(WIDENED["a sum"], *tensors()).until().record
    assert [entry.adapters for entry in record.linears] == [0, 0, 0]
    assert any("DTYPE" in note and "float64" in note for note in record.notes)


def test_a_scale_of_fp64_is_no_sum_in_fp64():
    """Dynamo makes a 0-d tensor of fp64 of a Python float that changes."""

    def function(x, w, a, b, s):
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * s

    x, w, a, b, _ = tensors()
    captured = capture(function, x, w, a, b, torch.tensor(2.5, dtype=torch.float64))
    context = captured.until()
    right(captured, context)
    assert "lora(r=2 f32 s=tensor.f64)" in context.record.groups[0].spec
