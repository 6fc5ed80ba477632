"""Which attention becomes one op over an unexpanded cache, and what stays with the library, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gawscompile.analysis.reading import aten
from gawscompile.ir.records import GraphRecord, Reason
from gawscompile.options import Options
from gawscompile.passes import fuse_attention
from gawscompile.passes.context import Context
from gawscompile.planning import devices
from gawscompile.runtime.attention import ATTEND
from tests.graphs import capture, count

ROWS, HEADS, GROUPS, KEYS, FEATURES = 2, 6, 2, 11, 16
SCALE = 0.3
MASK = torch.arange(KEYS) < 7


def repeated(keys, times=HEADS // GROUPS):
    """As transformers writes `repeat_kv`."""
    rows, groups, length, features = keys.shape
    wide = keys[:, :, None].expand(rows, groups, times, length, features)
    return wide.reshape(rows, groups * times, length, features)


def inputs(queries=1, groups=GROUPS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, queries, HEADS, FEATURES, generator=generator).to(dtype)
    k, v = torch.randn(2, ROWS, groups, KEYS, FEATURES, generator=generator).to(dtype)
    return q, k, v


def attention(q, k, v, mask=None, **settings):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=SCALE, **settings)


def grouped(q, k, v, mask=None, **settings):
    return attention(q, repeated(k), repeated(v), mask, **settings)


def written_out(q, k, v, mask=None, cap=None, sinks=None, keys=None):
    """As transformers writes `eager_attention_forward`, with the soft cap of Gemma 2 and the sinks of gpt-oss."""
    k, v = (one if one.shape[1] == HEADS else repeated(one) for one in (k, v))
    scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3) if keys is None else keys(k)) * SCALE
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    else:
        extra = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
        both = torch.cat([scores, extra], dim=-1)
        weights = torch.softmax(both - both.max(dim=-1, keepdim=True).values, dim=-1)[..., :-1]
    return torch.matmul(torch.dropout(weights, 0.1, False), v)


def lowest(queries):
    return torch.where(seen(queries), 0.0, torch.finfo(torch.float32).min)


def slopes(queries):
    return (torch.arange(HEADS).view(HEADS, 1) / 20 * torch.arange(KEYS)).view(1, HEADS, 1, KEYS)


def folded(q, k, v):
    """As Bloom has it: rows and heads in one, keys turned before, ALiBi added in the first product."""
    q = q.transpose(1, 2).reshape(ROWS * HEADS, -1, FEATURES)
    k, v = (repeated(one) for one in (k, v))
    bias = slopes(1)[0].repeat(ROWS, 1, 1)
    scores = bias.baddbmm(batch1=q, batch2=k.transpose(2, 3).reshape(-1, FEATURES, KEYS), beta=1.0, alpha=SCALE)
    scores = scores.view(ROWS, HEADS, -1, KEYS) + lowest(q.shape[1])
    weights = torch.softmax(scores, dim=-1).view(ROWS * HEADS, -1, KEYS)
    return torch.bmm(weights, v.reshape(-1, KEYS, FEATURES)).view(ROWS, HEADS, -1, FEATURES)


def seen(queries):
    return (MASK & (torch.arange(KEYS) != 2)).expand(ROWS, 1, queries, KEYS).clone()


TAKEN = {
    "grouped": lambda q, k, v: grouped(q, k, v),
    "what may be seen": lambda q, k, v: grouped(q, k, v, seen(q.shape[1])),
    "added": lambda q, k, v: grouped(q, k, v, torch.arange(HEADS * KEYS).view(1, HEADS, 1, KEYS) / 20 - 2),
    "as many key heads": lambda q, k, v: attention(q, repeated(k) + 1, repeated(v) * 2),
    "torch's grouped queries": lambda q, k, v: attention(q, k, v, enable_gqa=True),
    "causal": lambda q, k, v: grouped(q, k, v, is_causal=True),
    "written out": lambda q, k, v: written_out(q, k, v, lowest(q.shape[1])),
    "written out for each head": lambda q, k, v: written_out(q, repeated(k) + 1, repeated(v) * 2),
    "written out, -infinity": lambda q, k, v: written_out(q, k, v, torch.where(seen(q.shape[1]), 0.0, -torch.inf)),
    "keys that lie turned": lambda q, k, v: written_out(q, k, v, keys=lambda k: k.permute(0, 1, 3, 2).contiguous()),
    "soft cap": lambda q, k, v: written_out(q, k, v, lowest(q.shape[1]), cap=0.7),
    "sinks": lambda q, k, v: written_out(q, k, v, lowest(q.shape[1]), sinks=torch.arange(HEADS) / 2 - 1),
    "soft cap and sinks": lambda q, k, v: written_out(q, k, v, cap=0.7, sinks=torch.arange(HEADS) / 2 - 1),
    "slopes": lambda q, k, v: written_out(q, k, v, slopes(1)),
    "slopes and a mask": lambda q, k, v: written_out(q, k, v, slopes(1) + lowest(q.shape[1])),
    "rows and heads in one": folded,
    "features to the end": lambda q, k, v: grouped(q, k, v).transpose(1, 2).reshape(ROWS, -1, HEADS * FEATURES),
}


def strides(tensor):
    """Where there are steps."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def taken(captured):
    """The context, if one op stands for the attention; and its numbers are those of the traced graph."""
    context = captured.until()
    for one, other in zip(captured.run(context), captured.outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert strides(one) == strides(other)
    return context if count(context, ATTEND) == 1 else None


@pytest.mark.parametrize("queries", [1, 3, 17])
@pytest.mark.parametrize("name", TAKEN)
def test_taken(name, queries):
    context = taken(capture(TAKEN[name], *inputs(queries), kernels=True))
    assert context is not None and context.record.passes["fuse_attention"] == 1


@pytest.mark.parametrize("name", ["grouped", "what may be seen", "torch's grouped queries", "written out, -infinity"])
def test_the_cache_is_read_unexpanded(name):
    context = taken(capture(TAKEN[name], *inputs(), kernels=True))
    (node,) = context.graph.find_nodes(op="call_function", target=ATTEND)
    _, k, v, mask, scale, kernel, sinks = node.args
    assert sinks is None and not count(context, aten.bmm.default)
    assert [one.op for one in (k, v)] == ["placeholder"] * 2 and k.meta["val"].shape[1] == GROUPS
    assert (scale, kernel) == (SCALE, "attend d=16 x=f32")
    assert not count(context, torch.ops.aten.expand.default) or mask is not None
    assert mask is None or mask.meta["val"].dtype == torch.bool


def test_heads_in_another_order_are_not_a_repetition():
    """As often as there are key heads, so that sizes tell nothing: `repeat` goes around all of them."""

    def around(keys):
        return keys[:, None].expand(ROWS, GROUPS, GROUPS, KEYS, FEATURES).reshape(ROWS, GROUPS**2, KEYS, FEATURES)

    q, k, v = inputs(3)
    captured = capture(lambda q, k, v: attention(q, around(k), around(v)), q[:, :, : GROUPS**2], k, v, kernels=True)
    context = taken(captured)
    (node,) = context.graph.find_nodes(op="call_function", target=ATTEND)
    assert node.args[1].meta["val"].shape[1] == GROUPS**2


def test_one_of_two_that_is_repeated_stays_so():
    q, k, _ = inputs()
    wide = torch.randn(ROWS, HEADS, KEYS, FEATURES)
    context = taken(capture(lambda q, k, v: attention(q, repeated(k), v), q, k, wide, kernels=True))
    (node,) = context.graph.find_nodes(op="call_function", target=ATTEND)
    assert [one.meta["val"].shape[1] for one in node.args[1:3]] == [HEADS, HEADS]


def heads_of(features, queries=1):
    return [torch.randn(ROWS, *sizes, features) for sizes in ((queries, HEADS), (HEADS, KEYS), (HEADS, KEYS))]


MANY = {
    "17 queries": (grouped, inputs(17)),
    "causal": (lambda q, k, v: attention(q, k, v, is_causal=True), heads_of(16, 3)),
}

REFUSED = {
    "heads of 264 features": (attention, heads_of(264)),
    "torch.float64": (attention, [one.double() for one in heads_of(16)]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_with_a_reason(why):
    function, given = REFUSED[why]
    captured = capture(function, *given, kernels=True)
    assert taken(captured) is None
    (note,) = captured.until().record.notes
    assert note.startswith(Reason.ATTENTION.value) and why in note


def weights_too(q, k, v):
    scores = torch.matmul(q.transpose(1, 2), repeated(k).transpose(2, 3)) * SCALE
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, repeated(v)), weights


def capped_with_the_mask(q, k, v):
    scores = torch.matmul(q.transpose(1, 2), repeated(k).transpose(2, 3)) * SCALE + lowest(1)
    return torch.matmul(torch.softmax(torch.tanh(scores / 0.7) * 0.7, dim=-1), repeated(v))


def sinks_by_query(q, k, v):
    scores = torch.matmul(q.transpose(1, 2), repeated(k).transpose(2, 3)) * SCALE
    both = torch.cat([scores, q.transpose(1, 2)[..., :1]], dim=-1)
    return torch.matmul(torch.softmax(both, dim=-1)[..., :-1], repeated(v))


def narrower_values(q, k, v):
    """As DeepSeek-V3's."""
    return written_out(q, k, v[..., :8].contiguous())


def without_heads(q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q[:, :, 0], k[:, 0].mT) * SCALE, dim=-1), v[:, 0])


def what_may_be_seen_added(q, k, v):
    return written_out(q, k, v, seen(1))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (weights_too, "something reads its scores or weights"),
        (capped_with_the_mask, "its scores are not a product of queries and keys, capped, and masked"),
        (sinks_by_query, "its sinks are not one number for each head"),
        (without_heads, "its result is not split in rows and heads"),
        (narrower_values, "keys of 16 features, values of 8"),
        (what_may_be_seen_added, "what is added to its scores are no floating numbers"),
    ],
)
def test_what_is_written_out_otherwise_stays_so(function, why):
    captured = capture(function, *inputs(), kernels=True)
    assert taken(captured) is None
    context = captured.until()
    (note,) = context.record.notes
    assert note.startswith(Reason.ATTENTION.value) and why in note
    assert count(context, aten.bmm.default) == 2


def around(change, of="scores"):
    """Attention with one step of it changed."""

    def function(q, k, v, mask):
        q = q.transpose(1, 2)
        k, v, mask = repeated(k), repeated(v), mask
        q, k, v, mask = (change(one) if of == name else one for name, one in zip("qkvm", (q, k, v, mask), strict=True))
        turned = k.transpose(2, 3)
        scores = torch.matmul(q, change(turned) if of == "turned" else turned) * SCALE
        scores = (change(scores) if of == "scores" else scores) + mask
        weights = torch.softmax(scores, dim=-1)
        return torch.matmul(change(weights) if of == "weights" else weights, v)

    return function


@pytest.mark.parametrize("of", ["q", "k", "v", "m", "turned", "scores", "weights"])
@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn, torch.float16], ids=str)
def test_a_cast_that_loses_something_is_kept(of, kind):
    """To whole numbers and to float8 for all, to fp16 for what attention is given: its own scores may be more exact."""
    q, k, v = inputs(3)
    bound = 3e-3 if kind == torch.float16 and of in ("scores", "weights") else 1e-5
    captured = capture(around(lambda one: (4 * one).to(kind).float(), of), 2 * q, k, v, slopes(3), kernels=True)
    context = captured.until()
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_a_factor_has_its_dtypes_value(dtype):
    function = around(lambda scores: scores * torch.full((), 2.7, dtype=dtype))
    assert taken(capture(function, *inputs(3), slopes(3), kernels=True)) is not None


def test_scores_that_a_mask_repeats_are_not_those_of_all_rows():
    def function(q, k, v, mask):
        scores = torch.bmm(q, k.transpose(1, 2)) + mask
        return torch.matmul(torch.softmax(scores, dim=-1), v)

    sizes = ((HEADS, 3, FEATURES), (HEADS, KEYS, FEATURES), (ROWS, HEADS, KEYS, FEATURES), (ROWS, 1, 3, KEYS))
    assert taken(capture(function, *map(torch.randn, sizes), kernels=True)) is None


@pytest.mark.parametrize("queries", [3, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_with_sinks_and_rows_that_hide_all(dtype, queries, monkeypatch):
    """gpt-oss is kept in bf16. A query all of whose keys are hidden by the lowest number weighs all alike."""
    monkeypatch.setattr(devices, "multiplies_in_fp32", lambda dtype: True)  # also where the library has many queries
    mask = lowest(queries)[:, :, :queries].clamp(min=torch.finfo(dtype).min).to(dtype)
    mask[:, :, 0] = torch.finfo(dtype).min
    q, k, v = inputs(queries, dtype=dtype)
    for sinks in (None, torch.arange(HEADS).to(dtype) / 2 - 1):

        def function(q, k, v, m, s=sinks):
            return written_out(q, k, v, m if s is None else m.expand(ROWS, HEADS, queries, KEYS), sinks=s)

        captured = capture(function, q, k, v, mask[:1], kernels=True)
        context = captured.until()
        assert count(context, ATTEND) == 1
        torch.testing.assert_close(captured.run(context), captured.outputs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_the_lowest_number_of_fp16_is_lost_on_scores_of_fp32(wide, repeats):
    def function(q, k, v, m):
        scores = torch.matmul(q.transpose(1, 2), repeated(k).transpose(2, 3)) * SCALE
        scores = (scores.float() if wide else scores) + (m.expand(ROWS, HEADS, 3, KEYS) if repeats else m)
        return torch.matmul(torch.softmax(scores, dim=-1).half(), repeated(v))

    q, k, v = inputs(3, dtype=torch.float16)
    mask = torch.zeros(1, 1, 3, KEYS, dtype=torch.float16)
    mask[:, :, 1] = torch.finfo(torch.float16).min
    captured = capture(function, 3 * q, k, v, mask, kernels=True)
    context = captured.until()
    assert count(context, ATTEND) == 1
    torch.testing.assert_close(captured.run(context), captured.outputs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("why", MANY)
def test_the_library_keeps_many_queries_where_it_multiplies_16_bits_itself(why, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_in_fp32", lambda dtype: False)
    function, given = MANY[why]
    captured = capture(function, *given, kernels=True)
    assert taken(captured) is None
    (note,) = captured.until().record.notes
    assert note.startswith(Reason.ATTENTION.value) and why in note


@pytest.mark.parametrize("many", [True, False])
def test_any_number_of_rows_and_keys_and_of_queries_where_there_may_be_many(many, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_in_fp32", lambda dtype: many)
    q, k, v = inputs()
    torch._dynamo.mark_dynamic(k, 2)
    torch._dynamo.mark_dynamic(v, 2)
    assert taken(capture(TAKEN["grouped"], q, k, v, kernels=True, dynamic=None)) is not None
    q, k, v = inputs(5)
    torch._dynamo.mark_dynamic(q, 1)
    captured = capture(TAKEN["grouped"], q, k, v, kernels=True, dynamic=None)
    assert (taken(captured) is not None) == many
    assert many or "any number of queries" in captured.until().record.notes[0]


CUDA = {
    "flash": lambda q, k, v, _: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=SCALE),
    "efficient": lambda q, k, v, bias: aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=SCALE),
    "cudnn": lambda q, k, v, bias: aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, scale=SCALE),
    "causal": lambda q, k, v, _: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=SCALE),
}


@pytest.mark.parametrize("name", CUDA)
@pytest.mark.parametrize("transparent", [False, True])
def test_what_torch_calls_on_a_gpu(name, transparent):
    """Traced without one, on fake tensors: the bias is taken as what may be seen, and causal stays the library's."""
    with FakeTensorMode() as mode, torch.device("cuda"):
        q, k, v = (torch.empty(ROWS, HEADS, length, FEATURES) for length in (1, KEYS, KEYS))
        mask = torch.empty(ROWS, 1, 1, KEYS, dtype=torch.bool)

    def function(q, k, v, mask):
        bias = torch.where(mask, 0.0, float("-inf")).expand(ROWS, HEADS, 1, KEYS)
        return CUDA[name](q, k, v, bias)[0]

    with mode:
        traced = make_fx(function)(q, k, v, mask)
    traced.graph.eliminate_dead_code()  # results that nobody reads, as AOTAutograd does
    record = GraphRecord("test")
    context = Context.of(traced.graph, Options(transparent=transparent), record, frozenset(), holder=traced)
    with devices.planning_for(devices.GPUS["H100"]):
        fuse_attention.run(context.graph, context)
    if transparent or name == "causal":
        (note,) = record.notes
        assert not count(context, ATTEND) and ("transparent" if transparent else "causal") in note
        return
    (node,) = context.graph.find_nodes(op="call_function", target=ATTEND)
    assert node.args[4:] == (SCALE, "attend d=16 x=f32", None)
    assert node.args[3] is None if name == "flash" else node.args[3].meta["val"].dtype == torch.bool
