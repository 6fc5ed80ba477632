"""Packed weights that bitsandbytes' operators multiply by, and proofs of what was made of packed weights."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch

from gawscompile.analysis import packed as analysis
from gawscompile.backend import GawsPass
from gawscompile.ir.places import rebuilt
from gawscompile.options import Options
from tests.graphs import capture
from tests.passes.test_opaque_bases import delta, right, terms_of
from tests.passes.test_packed import FACTORS, SPELLINGS, K, N, R, X, numbers

# --- bitsandbytes -------------------------------------------------------------------------------------------------


def weight(captured):
    """W of the one packed base, and what else is in its sum."""
    context = captured.until("recover_operators")
    (terms,) = terms_of(context)
    held = dict(zip(context.graph.find_nodes(op="placeholder"), captured.inputs, strict=True))
    return rebuilt(terms[0], lambda _, node: held[node]).dense(torch.float64), terms


def library():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def same(w, want):
    torch.testing.assert_close(w, want.double(), rtol=1e-6, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_in_pairs(kind, group, twice, caplog):
    functional = library().functional
    n, k = 160, 128  # with more scales than share one of theirs
    packed, state = functional.quantize_4bit(
        numbers(n, k), blocksize=group, quant_type=kind, compress_statistics=twice
    )
    bias = numbers(n, seed=1)
    more = (state.absmax, state.state2.code, state.offset) if twice else ()
    absmax = state.state2.absmax if twice else state.absmax

    def function(x, packed, absmax, bias, a, b, *more):
        given = dict(zip(("absmax_8bit", "absmax_code", "absmax_offset"), more, strict=False))
        made = torch.ops.bitsandbytes.gemm_4bit(x, packed, [n, k], absmax, group, kind, bias=bias, **given)
        return made + delta(x, a, b)

    factors = numbers(R, k, seed=2) / k**0.5, numbers(n, R, seed=3)
    captured = capture(function, numbers(2, 3, k), packed, absmax, bias, *factors, *more, kernels=True)
    w, terms = weight(captured)
    same(w, functional.dequantize_4bit(packed, state))
    assert [type(term).__name__ for term in terms] == ["Packed", "Bias", "LowRank"]
    assert terms[0].text() == f"packed({kind} g={group} s={'u8' if twice else 'f32'})"
    right(captured)
    error, refused = verified(captured, caplog)
    assert error < 1e-5 and not refused


ALIKE = ("as it is", "turned", "in bf16")
OTHERS = ("scaled", "turned once", "viewed", "blocks of two rows")
TWICE = ("scales in bf16", "more of an offset", "other blocks of scales")
CASES = [(how, twice) for how in (*ALIKE, *OTHERS, *TWICE) for twice in (False, True) if twice or how not in TWICE]


@pytest.mark.parametrize("how, twice", CASES)
def test_4_bits_made_a_matrix_first(how, twice, caplog):
    """As versions up to 0.49 multiply several tokens on a GPU; and what is another matrix than its codes say."""
    functional = library().functional
    kind, made = "fp4" if how == "in bf16" else "nf4", torch.bfloat16 if how == "in bf16" else torch.float32
    n, k = (128, 128) if how == "turned once" else (160, 96) if how == "blocks of two rows" else (160, 128)
    sizes = [n // 2, 2 * k] if how == "viewed" else [n, k]
    packed, state = functional.quantize_4bit(numbers(n, k), blocksize=64, quant_type=kind)
    absmax, more = state.absmax, ()
    each = 128 if how == "other blocks of scales" else 256
    inner = torch.bfloat16 if how == "scales in bf16" else torch.float32
    if twice:
        offset = absmax.mean()
        absmax, shared = functional.quantize_blockwise(absmax - offset, blocksize=each)
        more = shared.absmax, shared.code, offset.reshape(1)

    def function(x, packed, absmax, a, b, *more):
        if twice:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, *more[:2], each, inner)
            absmax = torch.add(absmax, more[2], alpha=2 if how == "more of an offset" else 1).float()
        codes = packed.t() if how == "turned" else packed
        w = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, kind, sizes, made)
        w = w.t().to(x.dtype).t() if how == "turned" else w.to(x.dtype).view(n, k)
        if how == "scaled":
            w = w * b[:, :1]
        return x @ (w if how == "turned once" else w.t()) + delta(x, a, b)

    factors = numbers(R, k, seed=2) / k**0.5, numbers(n, R, seed=3)
    captured = capture(function, numbers(2, 3, k), packed, absmax, *factors, *more, kernels=True)
    if how in ALIKE:
        w, terms = weight(captured)
        state.absmax = absmax
        if twice:
            state.absmax, state.offset, state.state2, state.nested = absmax, offset, shared, True
        state.dtype = torch.float32
        same(w, functional.dequantize_4bit(packed, state))
        assert terms[0].text() == f"packed({kind} g=64 s={'u8' if twice else 'f32'})"
    else:
        (linear,) = captured.until().record.linears
        assert (linear.status, linear.operators) == ("fused", f"Opaque[{n}] + 1·LowRank(r={R})")
    right(captured, 1e-2 if how == "in bf16" else 1e-5)
    error, refused = verified(captured, caplog)
    assert error < (1e-2 if how == "in bf16" else 1e-5) and not refused


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_laid_out_for_the_cpu(kind, caplog):
    bnb = library()
    n, k, group = 64, 128, 64
    packed, state = bnb.functional.quantize_4bit(numbers(n, k), blocksize=group, quant_type=kind)
    want = bnb.functional.dequantize_4bit(packed, state)
    if not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes lays nothing out for CPUs")
    exact = state.absmax.reshape(n, k // group).T.contiguous()
    laid, state = bnb.functional._convert_weight_packed_for_cpu(packed, state)

    def function(x, laid, absmax, code):
        return torch.ops.bitsandbytes.gemv_4bit(x, laid, [n, k], absmax, code, group)

    captured = capture(function, numbers(2, 3, k), laid, state.absmax, state.code, kernels=True)
    w, (term,) = weight(captured)
    assert term.text() == f"packed(table4_blocks g={group} s=bf16)"
    torch.testing.assert_close(w, want.double(), rtol=2**-8, atol=1e-6)  # its scales were rounded
    torch.testing.assert_close(*captured.run(captured.until()), numbers(2, 3, k) @ want.T, rtol=1e-2, atol=0.1)
    error, refused = verified(captured, caplog)
    if bnb.functional.has_avx512bf16():  # elsewhere its operator reads this layout as if it were the plain one
        assert error < 2e-2  # it rounds x to bf16
    assert not refused
    w, _ = weight(capture(function, numbers(2, 3, k), laid, exact, state.code))
    same(w, want)


def tiled(n, k, group, dtype):
    """A weight as aten's product for CPUs takes it, and its numbers."""
    levels = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    scales = numbers(k // group, n, 2).to(dtype)
    spread = scales.double().repeat_interleave(group, 0).movedim(0, 1)
    laid = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    return laid, scales, (levels - 8) * spread[..., 0] + spread[..., 1]


def tiles(x, laid, group, scales):
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    made = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, laid, group, scales)
    return made.reshape(*x.shape[:-1], -1)


in_tiles = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in analysis.TILES, reason="aten's tiles are for AVX2 and AVX-512"
)


@in_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_in_tiles(dtype, caplog):
    """torchao's, and gptqmodel's."""
    rows = analysis.TILES[torch.backends.cpu.get_cpu_capability()]
    n, k, group = 128, 192, 64
    laid, scales, want = tiled(n, k, group, dtype)

    def function(x, laid, scales, bias, a, b):
        return tiles(x, laid, group, scales) + bias + delta(x, a, b)

    others = numbers(n, seed=1), numbers(R, k, seed=2) / k**0.5, numbers(n, R, seed=3)
    others = [other.to(dtype) for other in others]
    captured = capture(function, numbers(2, 3, k).to(dtype), laid, scales, *others, kernels=True)
    w, terms = weight(captured)
    same(w, want)
    assert [type(term).__name__ for term in terms] == ["Packed", "Bias", "LowRank"]
    word = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    assert terms[0].text() == f"packed(int4_tiles{rows} g={group} s={word})"
    close = 1e-4 if dtype == torch.float32 else 1e-2
    right(captured, close)
    error, refused = verified(captured, caplog)
    assert error < close and not refused


@in_tiles
@pytest.mark.parametrize("index", ["int32", "int64", "of the activation", "of rows"])
def test_features_in_another_order(index, caplog):
    """gptqmodel's GPTQ: x is in bf16, its features in the order of groups. Adapters read x as it is."""
    n, k, group = 128, 96, 32
    laid, scales, want = tiled(n, k, group, torch.bfloat16)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1))
    order = order if index == "int64" else order.int()

    def function(x, order, laid, scales, a, b):
        flat = x.reshape(-1, k)
        if index == "of the activation":
            order = order + (flat[0, 0] > 9).int()
        at = flat[order % 3][:, order % 3] if index == "of rows" else flat[:, order]
        made = tiles(at.contiguous().to(torch.bfloat16), laid, group, scales).to(x.dtype)
        return made if index == "of rows" else made.reshape(*x.shape[:-1], n) + delta(x, a, b)

    factors = [factor.half() for factor in (numbers(R, k, seed=2) / k**0.5, numbers(n, R, seed=3))]
    captured = capture(function, numbers(2, 3, k).half(), order, laid, scales, *factors, kernels=True)
    if index == "int32":
        w, terms = weight(captured)
        assert [type(term).__name__ for term in terms] == ["Packed", "LowRank"]
        ordered = torch.zeros(n, k, dtype=torch.float64)
        ordered[:, order.long()] = want
        same(w, ordered)
    right(captured, 1e-2)
    error, refused = verified(captured, caplog)
    assert error < 1e-2 and not refused


@in_tiles
@pytest.mark.parametrize("wrong", ["order", "tiles"])
def test_a_wrong_reading_of_tiles_is_refused(wrong, caplog):
    """A proof reads aten's product by aten's own kernel."""
    n, k, group = 128, 96, 32
    laid, scales, _ = tiled(n, k, group, torch.float32)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1)).int()

    def function(x, order, laid, scales):
        return tiles(x.reshape(-1, k)[:, order], laid, group, scales)

    captured = capture(function, numbers(6, k), order, laid, scales)
    reordered, swapped = analysis._reordered, {kind: 96 - rows for kind, rows in analysis.TILES.items()}
    faults = {
        "order": mock.patch.object(analysis, "_reordered", lambda node: (reordered(node)[0], None)),
        "tiles": mock.patch.object(analysis, "TILES", swapped),
    }
    with faults[wrong]:
        error, refused = verified(captured, caplog)
    assert len(refused) == 1 and error < 1e-5


def test_4_bits_of_rows_that_are_no_whole_tiles_stay_the_library_s():
    """The last rows lie in another way."""
    n, group = 48, 32
    laid, scales, _ = tiled(n, 64, group, torch.float32)

    def function(x, laid, scales, a, b):
        return tiles(x, laid, group, scales) + delta(x, a, b)

    factors = numbers(R, 64, seed=2) / 8, numbers(n, R, seed=3)
    captured = capture(function, numbers(2, 3, 64), laid, scales, *factors, kernels=True)
    (terms,) = terms_of(captured.until("recover_operators"))
    assert [type(term).__name__ for term in terms] == ["Opaque", "LowRank"]
    right(captured)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_8_bits_by_rows(mixed, biased, caplog):
    """The mixed operator returns as many columns as there are large ones: Dynamo must be told to go on there."""
    library()
    cb, scb, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(numbers(N, K).half(), 0.0)

    def function(x, cb, scb, bias, a, b):
        given = bias if biased else None
        flat = x.reshape(-1, K)
        ca, sca, large = torch.ops.bitsandbytes.int8_vectorwise_quant(flat.half(), 2.0 if mixed else 0.0)
        if mixed:
            made = torch.ops.bitsandbytes.int8_mixed_scaled_mm(flat, ca, cb, sca, scb, large, given)[0]
        else:
            made = torch.ops.bitsandbytes.int8_scaled_mm(ca, cb, sca, scb, bias=given, dtype=x.dtype)
        return made.reshape(*x.shape[:-1], N) + delta(x, a, b)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(function, X, cb, scb, numbers(N, seed=1), *FACTORS, kernels=True)
    right(captured, 2e-2)  # its operator rounds x to 8 bits
    w, terms = weight(captured)
    same(w, cb.double() * scb.double()[:, None] / 127)
    assert [type(term).__name__ for term in terms] == ["Packed", *["Bias"] * biased, "LowRank"]
    error, refused = verified(captured, caplog)
    assert error < 2e-2 and not refused


NOT_X = {
    "rounded to integers first": lambda x: (x.to(torch.int32).half(), 1.0),
    "rounded to float8 first": lambda x: (x.to(torch.float8_e5m2).half(), 1.0),
    "scales of x doubled": lambda x: (x.half(), 2.0),
}


@pytest.mark.parametrize("name", NOT_X)
def test_a_product_of_8_bits_with_other_codes_than_those_of_x_stays_the_library_s(name):
    library()
    cb, scb, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(numbers(N, K).half(), 0.0)

    def function(x, cb, scb):
        h, by = NOT_X[name](x.reshape(-1, K))
        ca, sca, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(h, 0.0)
        return torch.ops.bitsandbytes.int8_scaled_mm(ca, cb, sca * by if by != 1 else sca, scb, dtype=torch.float16)

    captured = capture(function, X, cb, scb)
    right(captured, 1e-2)


# --- Proofs -------------------------------------------------------------------------------------------------------


def verified(captured, caplog):
    """Errors of a graph that our passes rewrote under ``verify``, and what it refused."""
    module = torch.fx.GraphModule(captured.module, captured.graph)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gawscompile"), torch.no_grad():
        gaws = GawsPass(Options(verify=True), "test", stored=captured.stored)
        gaws(module.graph)
        module.recompile()
        got = module(*captured.inputs)
    errors = [((g - w).norm() / w.norm()).item() for g, w in zip(got, captured.outputs, strict=True)]
    said = [record.getMessage() for record in caplog.records]
    return max(errors), [message for message in said if "verify refused the rewrite of" in message]


@pytest.mark.parametrize("name", ["after the product", "scales times a number", "zeros", "halves"])
def test_proofs_hold(name, caplog):
    function, operands, _ = SPELLINGS[name]
    error, refused = verified(capture(function, X, *operands), caplog)
    assert error < 1e-5 and not refused


def test_a_wrong_scale_is_refused(caplog):
    function, operands, _ = SPELLINGS["by groups"]
    scaled = analysis._scaled

    def wrong(node):
        leaf, factor = scaled(node)
        return leaf, factor * 1.01

    with mock.patch.object(analysis, "_scaled", wrong):
        error, refused = verified(capture(function, X, *operands), caplog)
    assert len(refused) == 1 and error < 1e-5
