"""Bases that keep their own matmul: what adapters add to them is one sum, grouped, and accumulated on their result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gawscompile.analysis.reading import aten
from gawscompile.ir.operators import Dense, LowRank, Opaque
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_group, operator_sum
from tests.graphs import capture, count

K, N, R = 32, 24, 4


@torch.library.custom_op("gaws_test::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """As bitsandbytes writes its own: nobody but the operator knows what the bytes mean."""
    low, high = (packed & 15).to(torch.float64) - 8, (packed >> 4).to(torch.float64) - 8
    weight = torch.stack([low, high], -1).flatten(1) * scale.double()
    return F.linear(x.double(), weight).to(x.dtype)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def dequantised(x, q, s):
    """With an offset after the scale, which no kernel of ours knows."""
    return F.linear(x, q.to(x.dtype) * s.to(x.dtype) - 0.25)


def scaled_after(x, q, s):
    """The way torchao writes its int8, again with an offset."""
    return ((x.reshape(-1, K) @ (q.t().to(x.dtype) - 0.25)) * s.view(-1).to(x.dtype)).reshape(*x.shape[:-1], -1)


def packed(x, q, s):
    return packed_linear(x, q[:, : K // 2].to(torch.uint8), s)


BASES = {"dequantised": dequantised, "scaled after": scaled_after, "packed": packed}


def tensors(n=N, dtype=torch.float32, factors=torch.float32):
    """x, q, s, a, b."""
    torch.manual_seed(n)
    q, s = torch.randint(-127, 127, (n, K), dtype=torch.int8), torch.rand(n, 1) / 64
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, q, s, torch.randn(R, K).to(factors), torch.randn(n, R).to(factors)


def delta(x, a, b):
    return F.linear(F.linear(x.to(a.dtype), a), b)


def terms_of(context):
    return [node.args[1].terms for node in context.graph.find_nodes(op="call_function", target=operator_sum)]


def right(captured, tolerance=1e-5):
    """The answers of the whole pipeline."""
    context = captured.until()
    for got, want in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
    return context


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_an_adapter_is_added_to_what_the_base_made(name, dynamic):
    def function(x, q, s, a, b):
        return BASES[name](x, q, s) + delta(x, a, b) * 2.0

    x, *rest = tensors()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    captured = capture(function, x, *rest, dynamic=None)
    context = captured.until("recover_operators")
    (terms,) = terms_of(context)
    assert [type(term) for term in terms] == [Opaque, LowRank] and terms[1].scale == 2.0
    (entry,) = context.record.linears
    assert (entry.shape, entry.adapters) == ((N, K), 1)
    context = right(captured)
    assert entry.operators == "Opaque[24] + 2·LowRank(r=4)"
    assert count(context, torch.ops.gaws.project.default) == 1
    assert count(context, aten.mm.default) == (name != "packed")  # the base's own


def test_peft_over_a_narrow_base():
    def function(x, q, s, a, b):
        return (scaled_after(x, q, s) + delta(x, a, b) * 2.0).to(x.dtype)

    captured = capture(function, *tensors(dtype=torch.bfloat16), kernels=True)
    (group,) = right(captured, 1e-2).record.groups
    assert group.spec == "k=32 x=bf16; n=24 opaque=bf16 out=bf16 lora(r=4 f32 s=2.0)"


SUMS = {
    "two adapters": lambda y, d, e, c: y + d * 2.0 + e,
    "adapters first": lambda y, d, e, c: e * 3.0 + y,
    "taken away": lambda y, d, e, c: y - d,
    "both ways": lambda y, d, e, c: y + d - e,
    "alpha": lambda y, d, e, c: torch.add(y, d, alpha=3),
    "bias after": lambda y, d, e, c: y + d + c,
    "bias before": lambda y, d, e, c: (y + c) + d,
    "bias on the adapter": lambda y, d, e, c: y + (d + c),
}
LEFT = {
    "from an adapter": lambda y, d, e, c: d - y,
    "scaled as a whole": lambda y, d, e, c: (y + d) * 2.0,
    "alpha of the base": lambda y, d, e, c: torch.add(d, y, alpha=3),
    "sign of all": lambda y, d, e, c: c - (y + d),
    "read twice": lambda y, d, e, c: ((y + d).tanh(), (y + d) * 2.0),
    "base read twice": lambda y, d, e, c: (y + d, y.tanh()),
    "product": lambda y, d, e, c: y * d,
    "broadcast": lambda y, d, e, c: y + d[:, :1],
    "delta of other tokens": lambda y, d, e, c: y + d.roll(1, 1),
}


def summed(how):
    def function(x, q, s, a, b, a2, b2, c):
        return how(scaled_after(x, q, s), delta(x, a, b), delta(x, a2, b2), c)

    return capture(function, *tensors(), torch.randn(R, K), torch.randn(N, R), torch.randn(N))


@pytest.mark.parametrize("name", SUMS)
def test_sums(name):
    captured = summed(SUMS[name])
    (terms,) = terms_of(captured.until("recover_operators"))
    assert Opaque in map(type, terms) and Dense not in map(type, terms)
    right(captured)


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_right(name):
    right(summed(LEFT[name]))


def test_what_is_no_base_is_not_added_to():
    def function(x, w, a, b, q):
        ungated = F.linear(x, w).sigmoid() + delta(x, a, b)  # W may be read by a kernel
        itself = x[..., :N] + delta(x.sin(), a, b)  # made of another activation
        return ungated, itself, q.to(torch.float32) + delta(x, a, b)

    x, _, _, a, b = tensors()
    captured = capture(function, x, torch.randn(N, K), a, b, torch.randint(-9, 9, (2, 3, N), dtype=torch.int8))
    found = [term for terms in terms_of(captured.until("recover_operators")) for term in terms]
    assert not any(isinstance(term, Opaque) for term in found)
    right(captured)


def test_siblings_are_one_group_and_their_bases_come_first():
    sizes = (24, 8, 40)

    def function(x, *rest):
        outputs = []
        for i in range(len(sizes)):
            q, s, a, b = rest[4 * i : 4 * i + 4]
            # the next sibling's base stands after this one's reader
            outputs.append((scaled_after(x, q, s) + delta(x, a, b)).view(2, 3, -1, 4).transpose(1, 2).exp())
        return outputs

    x = tensors()[0]
    captured = capture(function, x, *(t for n in sizes for t in tensors(n)[1:]), kernels=True)
    context = captured.until("group_siblings")
    (group,) = context.graph.find_nodes(op="call_function", target=operator_group)
    assert len(group.args[1]) == 3
    (record,) = right(captured).record.groups
    spec = KernelSpec.parse(record.spec)
    assert [(p.n, p.dense, p.opaque.dtype, p.rank) for p in spec.projections] == [(n, None, "f32", R) for n in sizes]


def test_a_sibling_whose_base_reads_the_first_stays_alone():
    def function(x, q, s, a, b, q2, s2, a2, b2):
        first = scaled_after(x, q, s) + delta(x, a, b)
        return scaled_after(x * first.mean(), q2, s2) + delta(x, a2, b2), first

    x = tensors()[0]
    captured = capture(function, x, *tensors(24)[1:], *tensors(8)[1:])
    assert len(right(captured).record.groups) == 2


def test_beside_a_sibling_with_a_weight():
    def function(x, w, q, s, a, b):
        return F.linear(x, w) + delta(x, a, torch.flip(b, [0])[:8]), scaled_after(x, q, s) + delta(x, a, b)

    x, *rest = tensors()
    captured = capture(function, x, torch.randn(8, K), *rest)
    right(captured)


def test_a_residual_of_the_stream_stays_outside():
    """The base's result is the residual already."""

    def function(x, h, q, s, a, b):
        return h + (scaled_after(x, q, s) + delta(x, a, b))

    x, *rest = tensors()
    captured = capture(function, x, torch.randn(2, 3, N), *rest)
    context = right(captured)
    assert count(context, aten.add.Tensor) == 1 and count(context, torch.ops.gaws.project.default) == 1


@pytest.mark.parametrize("what", ["fp64", "rank", "computed factor"])
def test_refusals_have_reasons_and_the_parts_stay_fused(what):
    def function(x, q, s, a, b):
        a = a.softmax(-1) if what == "computed factor" else a
        return scaled_after(x, q, s) + delta(x, a, b)

    x, q, s, a, b = tensors(dtype=torch.float64 if what == "fp64" else torch.float32)
    if what == "fp64":
        a, b = a.double(), b.double()
    if what == "rank":
        a, b = torch.randn(K + 1, K), torch.randn(N, K + 1)
    captured = capture(function, x, q, s, a, b)
    context = right(captured)
    if what == "fp64":  # its sums are left alone, part by part
        assert {entry.reason for entry in context.record.linears} == {"DTYPE", "WEIGHT_COMPUTED"}
        return
    wanted = {"rank": "FACTOR_SHAPE", "computed factor": "WEIGHT_COMPUTED"}[what]
    (note,) = [note for note in context.record.notes if "not fused with what is added to it" in note]
    assert wanted in note
    base = next(entry for entry in context.record.linears if entry.shape == (N, K))
    assert base.reason == "WEIGHT_COMPUTED"
