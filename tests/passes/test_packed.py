"""Weights that are kept as codes: how graphs spell them, what only looks like one, proofs, changes between calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gawscompile.analysis.reading import aten
from gawscompile.ir.operators import Dense, LowRank
from gawscompile.ir.packed import Packed
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import operator_group, operator_sum
from tests.graphs import capture, count
from tests.passes.test_opaque_bases import delta, right, terms_of

N, K, R = 48, 96, 4


def numbers(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def codes(*sizes, dtype=torch.int8, most=256, seed=0):
    found = torch.randint(0, most, sizes, generator=torch.Generator().manual_seed(seed))
    return found.to(torch.uint8).view(dtype)


def scales(*sizes, seed=0):
    return numbers(*sizes, seed=seed).abs() / 64 + 0.01


X, Q, U, S = numbers(2, 3, K), codes(N, K), codes(N, K, dtype=torch.uint8), scales(N, 1)
BY_GROUPS, ZEROS = scales(N, 3, 1), codes(N, 3, 1, dtype=torch.uint8)
FACTORS = numbers(R, K, seed=1) / K**0.5, numbers(N, R, seed=2)


def by_rows(x, q, s):
    return F.linear(x, q.to(x.dtype) * s.to(x.dtype))


def after(x, q, s):
    """torchao's."""
    return ((x.reshape(-1, K) @ q.t().to(x.dtype)) * s.view(-1).to(x.dtype)).reshape(*x.shape[:-1], -1)


def by_groups(x, q, s):
    return F.linear(x, (q.view(N, -1, 32).to(x.dtype) * s.to(x.dtype)).view(N, K))


def with_zeros(x, q, s, z):
    return F.linear(x, ((q.view(N, -1, 32).to(x.dtype) - z.to(x.dtype)) * s.to(x.dtype)).reshape(N, K))


def in_integers(x, q, s, z):
    return F.linear(x, (q.view(N, -1, 32).int() - z.int()).to(x.dtype).mul(s).reshape(N, K))


def unpacked_halves(b, first=slice(None), upper=240, lower=15):
    """HQQ's way to take bytes apart."""
    half = len(b)
    found = torch.empty([2 * half, b.shape[1]], dtype=torch.uint8)
    found[:half] = (b & upper) >> 4
    found[half:] = b & lower
    return found


def halves(x, b, s, z):
    """HQQ: a row has a group."""
    return F.linear(x, ((unpacked_halves(b).to(x.dtype) - z.to(x.dtype)) * s.to(x.dtype)).reshape(N, K))


HALVES = codes(N * K // 64, 32, dtype=torch.uint8), scales(N * K // 32, 1), numbers(N * K // 32, 1) + 7.5

SPELLINGS = {
    "by rows": (by_rows, (Q, S), "int8 g=96 s=f32"),
    "after the product": (after, (Q, S), "int8 g=96 s=f32"),
    "after the product, of one row": (lambda x, q, s: F.linear(x, q.float()) * s, (Q, S.view(1, N)), "int8 g=96 s=f32"),
    "unsigned": (by_rows, (U, S), "uint8 g=96 s=f32"),
    "by a vector": (lambda x, q, s: F.linear(x, q.float() * s[:, None]), (Q, S.view(-1)), "int8 g=96 s=f32"),
    "transposed twice": (lambda x, q, s: F.linear(x, q.t().t().float() * s), (Q, S), "int8 g=96 s=f32"),
    "transposed and back": (lambda x, q, s: F.linear(x, q.t().float().t() * s), (Q, S), "int8 g=96 s=f32"),
    "scales times a number": (lambda x, q, s: F.linear(x, q.float() * (s * 0.5)), (Q, S), "int8 g=96 s=f32 f=0.5"),
    "scales by a number": (lambda x, q, s: F.linear(x, q.float() * (s / 4)), (Q, S), "int8 g=96 s=f32 f=0.25"),
    "the scale first": (lambda x, q, s: F.linear(x, s * q.float()), (Q, S), "int8 g=96 s=f32"),
    "scales of 16 bits": (by_rows, (Q, S.bfloat16()), "int8 g=96 s=bf16"),
    "scales of codes": (by_rows, (Q, codes(N, 1, seed=5)), "int8 g=96 s=i8"),
    "no scales": (lambda x, q: F.linear(x, q.float()), (Q,), "int8 g=96"),
    "by groups": (by_groups, (Q, BY_GROUPS), "int8 g=32 s=f32"),
    "by groups, unsigned": (by_groups, (U, BY_GROUPS), "uint8 g=32 s=f32"),
    "zeros": (with_zeros, (U, BY_GROUPS, ZEROS), "uint8 g=32 s=f32 z=u8"),
    "zeros of floats": (with_zeros, (U, BY_GROUPS, numbers(N, 3, 1) + 128), "uint8 g=32 s=f32 z=f32"),
    "zeros of integers": (in_integers, (U, BY_GROUPS, ZEROS), "uint8 g=32 s=f32 z=u8"),
    "halves": (halves, HALVES, "uint4_halves g=32 s=f32 z=f32"),
    "a matrix product": (lambda x, q, s: x @ (q.float() * s).t(), (Q, S), "int8 g=96 s=f32"),
    "one row": (by_rows, (Q[:1].clone(), S[:1].clone()), "int8 g=96 s=f32"),
}


def found(context):
    return [term for terms in terms_of(context) for term in terms]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    function, operands, text = SPELLINGS[name]
    captured = capture(function, X, *operands)
    (term,) = found(captured.until("recover_operators"))
    n = N if name != "one row" else 1
    assert isinstance(term, Packed) and (term.n, term.k) == (n, K) and term.text() == f"packed({text})"
    context = right(captured)
    assert count(context, torch.ops.gaws.project.default) == 1
    assert count(context, aten.mul.Tensor) == count(context, aten.mm.default) == 0


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "one row"])
def test_an_adapter_joins(name):
    function, operands, text = SPELLINGS[name]
    captured = capture(lambda x, a, b, *rest: function(x, *rest) + delta(x, a, b) * 2.0, X, *FACTORS, *operands)
    (terms,) = terms_of(captured.until("recover_operators"))
    assert [type(term) for term in terms] == [Packed, LowRank]
    assert terms[0].text() == f"packed({text})" and terms[1].scale == 2.0
    right(captured)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["by rows", "after the product", "zeros", "halves"])
def test_narrow_activations(name, dtype):
    function, operands, text = SPELLINGS[name]
    captured = capture(lambda x, a, b, *rest: (function(x, *rest) + delta(x, a, b)).to(dtype), X.to(dtype),
                       *FACTORS, *operands, kernels=True)  # fmt: skip
    (group,) = right(captured, 3e-2).record.groups
    assert group.spec == f"k=96 x={'bf16' if dtype == torch.bfloat16 else 'f16'}; " + (
        f"n=48 packed({text}) out={'bf16' if dtype == torch.bfloat16 else 'f16'} lora(r=4 f32 s=1.0)"
    )


@pytest.mark.parametrize("name", ["by rows", "after the product", "halves"])
def test_any_number_of_tokens(name):
    function, operands, _ = SPELLINGS[name]
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 1)
    captured = capture(function, x, *operands, dynamic=None)
    (term,) = found(captured.until("recover_operators"))
    assert isinstance(term, Packed)
    right(captured)


def test_siblings_of_several_codings_are_one_group():
    def function(x, q, s, u, t, z, b, bs, bz, w, lora_a, lora_b):
        others = halves(x, b, bs, bz), F.linear(x, w)
        return by_rows(x, q, s) + delta(x, lora_a, lora_b), with_zeros(x, u, t, z), *others

    captured = capture(function, X, Q, S, U, BY_GROUPS, ZEROS, *HALVES, numbers(N, K), *FACTORS, kernels=True)
    context = captured.until("group_siblings")
    (group,) = context.graph.find_nodes(op="call_function", target=operator_group)
    assert len(group.args[1]) == 4
    (record,) = right(captured).record.groups
    parts = KernelSpec.parse(record.spec).projections
    assert sorted(p.packed.coding if p.packed else "dense" for p in parts) == ["dense", "int8", "uint4_halves", "uint8"]


def test_a_gate_and_what_it_lets_through():
    def function(x, q, s, p, t):
        return F.silu(by_rows(x, q, s)) * by_rows(x, p, t)

    captured = capture(function, X, Q, S, codes(N, K, seed=3), scales(N, 1, seed=4), kernels=True)
    (record,) = right(captured).record.groups
    assert KernelSpec.parse(record.spec).swiglu


@pytest.mark.parametrize("alike", [True, False])
def test_a_gate_whose_bytes_have_codes_of_two_rows(alike):
    """Its rows are summed up in memory, and so are those of what it lets through."""

    def function(x, b, s, z, other, q, t, lora_a, lora_b):
        up = halves(x, other, s, z) if alike else by_rows(x, q, t)
        return F.silu(halves(x, b, s, z) + delta(x, lora_a, lora_b)) * up

    captured = capture(function, X, *HALVES, HALVES[0].flip(0), Q, S, *FACTORS, kernels=True)
    context = right(captured)
    (record,) = context.record.groups
    assert KernelSpec.parse(record.spec).swiglu is alike
    told = "gate's weight and up's are kept in different ways"
    assert any(told in note for note in context.record.notes) is not alike


BESIDE = {
    "merged into the weight": lambda x, q, s, a, b, v: F.linear(x, q.float() * s + b @ a),
    "bias": lambda x, q, s, a, b, v: F.linear(x, q.float() * s, v) + delta(x, a, b),
    "DoRA": lambda x, q, s, a, b, v: (v / (q.float() * s + b @ a).norm(dim=1)) * (by_rows(x, q, s) + delta(x, a, b)),
    "rows": lambda x, q, s, a, b, v: by_rows(x, q, s) * v,
    "after the product, and rows": lambda x, q, s, a, b, v: after(x, q, s) * v,
    "residual": lambda x, q, s, a, b, v: x[..., :N].sin() + by_rows(x, q, s),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_else_is_in_a_sum(name):
    captured = capture(BESIDE[name], X, Q, S, *FACTORS, numbers(N, seed=6))
    bases = [term for term in found(captured.until("recover_operators")) if isinstance(term, Packed)]
    assert [base.text() for base in bases] == ["packed(int8 g=96 s=f32)"]
    right(captured)


# --- Near misses --------------------------------------------------------------------------------------------------

LEFT = {
    "scales of columns": (lambda x, q, s: F.linear(x, q.float() * s), (Q, scales(1, K))),
    "scales of each number": (lambda x, q, s: F.linear(x, q.float() * s), (Q, scales(N, K))),
    "groups of 16": (lambda x, q, s: F.linear(x, (q.view(N, 6, 16).float() * s).view(N, K)), (Q, scales(N, 6, 1))),
    "groups of 48": (lambda x, q, s: F.linear(x, (q.view(N, 2, 48).float() * s).view(N, K)), (Q, scales(N, 2, 1))),
    "groups that go on in the next row": (
        lambda x, q, s: F.linear(x, (q.view(-1, 64).float() * s).view(N, K)),
        (Q, scales(N * K // 64, 1)),
    ),
    "a zero after the scale": (lambda x, q, s, z: F.linear(x, q.float() * s - z), (Q, S, scales(N, 1, seed=7))),
    "a zero after the scale, in groups": (
        lambda x, q, s, z: F.linear(x, (q.view(N, 3, 32).float() * s - z).view(N, K)),
        (Q, BY_GROUPS, scales(N, 3, 1, seed=7)),
    ),
    "a zero added": (lambda x, q, s, z: F.linear(x, (q.float() + z) * s), (Q, S, numbers(N, 1))),
    "a zero taken twice": (lambda x, q, s, z: F.linear(x, torch.sub(q.float(), z, alpha=2) * s), (Q, S, numbers(N, 1))),
    "taken from the zero": (lambda x, q, s, z: F.linear(x, (z - q.float()) * s), (Q, S, numbers(N, 1))),
    "two zeros": (lambda x, q, s, z: F.linear(x, (q.float() - z - z) * s), (Q, S, numbers(N, 1))),
    "an offset after": (lambda x, q, s: F.linear(x, q.float() * s - 0.25), (Q, S)),
    "two scales": (lambda x, q, s, t: F.linear(x, q.float() * s * t), (Q, S, scales(N, 1, seed=8))),
    "scales of rows and of groups": (
        lambda x, q, s, t: F.linear(x, (q.view(N, 3, 32).float() * s).view(N, K) * t),
        (Q, BY_GROUPS, S),
    ),
    "zeros of groups, scales of rows": (
        lambda x, q, s, z: F.linear(x, (q.view(N, 3, 32).float() - z).view(N, K) * s),
        (Q, S, ZEROS.float()),
    ),
    "one scale": (lambda x, q, s: F.linear(x, q.float() * s), (Q, torch.tensor(0.02))),
    "one scale of one place": (lambda x, q, s: F.linear(x, q.float() * s), (Q, torch.full((1, 1), 0.02))),
    "a number": (lambda x, q: F.linear(x, q.float() * 0.02), (Q,)),
    "codes of 32 bits": (by_rows, (Q.int(), S)),
    "codes of booleans": (by_rows, (Q > 0, S)),
    "scales of the activation": (
        lambda x, q, s: F.linear(x, q.float() * (s * x.mean())),
        (Q, S),
    ),
    "codes of the activation": (
        lambda x, q, s: F.linear(x, (x[0, :1] * 9).to(torch.int8).float().expand(N, K) * s),
        (Q, S),
    ),
    "scales that are computed": (lambda x, q, s: F.linear(x, q.float() * s.exp()), (Q, S)),
    "k of 48": (lambda x, q, s: F.linear(x[..., :48], q.float() * s), (codes(N, 48), S)),
    "bytes as scales": (by_rows, (Q, codes(N, 1, dtype=torch.uint8))),
    "a difference of bytes": (
        lambda x, q, s, z: F.linear(x, (q - z).float() * s),
        (U, S, codes(N, 1, dtype=torch.uint8, seed=9)),
    ),
    "a product of bytes": (lambda x, q, s: F.linear(x, (q * s).float()), (Q, codes(N, 1, seed=9))),
    "cut off to whole numbers": (lambda x, q, s: F.linear(x, (q.float() * s).to(torch.int8).float()), (Q, S * 9)),
    "scales cut off to whole numbers": (lambda x, q, s: F.linear(x, q.float() * (s * 200).int().float()), (Q, S)),
    "signed bytes as unsigned ones": (lambda x, q, s: F.linear(x, q.to(torch.uint8).float() * s), (Q, S)),
    "unsigned bytes as signed ones": (lambda x, q, s: F.linear(x, q.to(torch.int8).float() * s), (U, S)),
    "shuffled groups": (
        lambda x, q, s: F.linear(x, (q.view(N, 3, 32).transpose(1, 2).reshape(N, 3, 32).float() * s).view(N, K)),
        (Q, BY_GROUPS),
    ),
    "the lower half first": (
        lambda x, b, s, z: F.linear(x, ((torch.cat([b & 15, (b & 240) >> 4]).float() - z) * s).view(N, K)),
        HALVES,
    ),
    "only three bits of a half": (
        lambda x, b, s, z: F.linear(x, ((unpacked_halves(b, lower=7).float() - z) * s).view(N, K)),
        HALVES,
    ),
    "only three bits of the other half": (
        lambda x, b, s, z: F.linear(x, ((unpacked_halves(b, upper=112).float() - z) * s).view(N, K)),
        HALVES,
    ),
    "fp64": (lambda x, q, s: F.linear(x.double(), q.double() * s).float(), (Q, S)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_are_no_packed_weights_and_right(name):
    function, operands = LEFT[name]
    captured = capture(function, X, *operands)
    assert not any(isinstance(term, Packed) for term in found(captured.until("recover_operators")))
    right(captured)


@pytest.mark.parametrize("name", LEFT)
def test_near_misses_with_an_adapter_are_right(name):
    function, operands = LEFT[name]
    captured = capture(lambda x, a, b, *rest: function(x, *rest) + delta(x, a, b), X, *FACTORS, *operands)
    assert not any(isinstance(term, Packed) for term in found(captured.until("recover_operators")))
    right(captured)


def test_a_scale_along_as_many_tokens_as_there_are_rows_is_none():
    for tokens in ((N,), (1, N)):
        captured = capture(lambda x, q, s: F.linear(x, q.float()) * s, numbers(*tokens, K), Q, S)
        (term,) = found(captured.until("recover_operators"))
        assert isinstance(term, Packed) and term.scales is None
        right(captured)


def test_an_offset_after_the_product_is_a_bias():
    captured = capture(lambda x, q, s, v: after(x, q, s) - v, X, Q, S, numbers(N))
    right(captured)


def test_a_transposed_packed_weight_keeps_its_own_product():
    captured = capture(lambda x, q, s: F.linear(x, (q.float() * s).t()), numbers(2, 3, N), Q, S)
    context = right(captured)
    assert not any(isinstance(term, Packed) for term in found(captured.until("recover_operators")))
    (entry,) = context.record.linears
    assert (entry.reason, entry.detail) == ("WEIGHT_LAYOUT", "it is kept as codes, and transposed")


def test_codes_that_lie_transposed_in_memory_are_right():
    q = codes(K, N).t()
    captured = capture(by_rows, X, q, S, kernels=True)
    right(captured)


def test_factors_of_adapters_that_are_quantised_are_right():
    def function(x, w, q, s, p, t):
        return F.linear(x, w) + F.linear(F.linear(x, q.float() * s), p.float() * t)

    captured = capture(function, X, numbers(N, K), codes(32, K), scales(32, 1), codes(N, 32), S)
    assert sum(isinstance(term, Packed) for term in found(captured.until("recover_operators"))) == 2
    right(captured)


def test_two_packed_weights_of_one_activation_in_one_sum_are_right():
    captured = capture(lambda x, q, s, p, t: by_rows(x, q, s) + by_rows(x, p, t), X, Q, S, codes(N, K, seed=3), S * 2)
    assert sum(isinstance(term, Packed) for term in found(captured.until("recover_operators"))) == 2
    right(captured)


def test_a_linear_that_widens_its_activation_multiplies_in_that_dtype():
    captured = capture(
        lambda x, q, s: F.linear(x.float(), q.float() * s), X.bfloat16(), codes(N, K), numbers(N, 1).abs()
    )
    (node,) = captured.until("recover_operators").graph.find_nodes(op="call_function", target=operator_sum)
    assert node.args[0].meta["val"].dtype == torch.float32
    right(captured, 1e-5)


def test_a_dense_weight_is_still_dense():
    (term,) = found(capture(F.linear, X, numbers(N, K)).until("recover_operators"))
    assert isinstance(term, Dense)
