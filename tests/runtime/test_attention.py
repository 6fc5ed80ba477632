"""gaws::attend: softmax(s Q Kᵀ + mask) V over keys as a cache has them, against fp64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gawscompile.codegen import build, cpp_attention
from gawscompile.ir.types import DTYPE_NAMES, SpecError
from gawscompile.runtime import attention, ops
from tests.fuzz.calls import VECTORS

BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest error over the largest answer."""

FEW = [(1, 9, 3, 1, 200), (2, 4, 4, 3, 7), (3, 8, 2, 5, 1), (1, 6, 1, 16, 33)]
MANY = [(1, 4, 2, 17, 300), (2, 3, 3, 41, 5), (1, 6, 2, 130, 64), (1, 2, 1, 300, 257), (1, 1, 1, 33, 1)]
SHAPES = [*FEW, *MANY]
"""Rows, heads, heads of keys, queries, keys."""


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded()


def drawn(dtype, features, rows, heads, groups, queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, queries, heads, features, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, rows, groups, keys, features, generator=generator).to(dtype)
    return q, k, v


def masks(q, k):
    """None, bools by row, numbers for all heads, numbers of its own dtype for each, what is past."""
    rows, heads, queries, keys = *q.shape[:3], k.shape[2]
    generator = torch.Generator().manual_seed(1)
    yield None
    yield torch.rand(rows, 1, queries, keys, generator=generator) > 0.4
    yield torch.randn(1, 1, queries, keys, generator=generator)
    yield torch.randn(rows, heads, queries, keys, generator=generator).to(q.dtype)
    yield (torch.arange(keys) <= keys // 2).view(1, 1, 1, keys)
    yield torch.zeros(rows, 1, queries, keys).masked_fill(torch.arange(keys) > keys // 2, float("-inf"))


def error(got, q, k, v, mask, kernel, scale=0.3, sinks=None):
    """The largest against fp64, over the largest answer."""
    exact = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    want = attention.meaning(q.double(), k.double(), v.double(), exact, scale, kernel, sinks)
    assert got.shape == q.shape and got.dtype == q.dtype
    return float((got.double() - want).abs().max() / want.abs().max().clamp(min=1.0))


def check(q, k, v, mask, causal=False, cap=None, sinks=None):
    kernel = str(cpp_attention.Kernel(q.shape[3], DTYPE_NAMES[q.dtype], causal, cap))
    got = torch.ops.gaws.attend(q, k, v, mask, 0.3, kernel, sinks)
    found = error(got, q, k, v, mask, kernel, sinks=sinks)
    assert found <= BOUNDS[q.dtype], (q.shape, k.shape, found)
    return got


KERNELS = [
    *((torch.float32, features) for features in (16, 64, 5, 256)),
    *((torch.bfloat16, features) for features in (64, 80)),
    (torch.float16, 80),
]


@pytest.mark.parametrize(("dtype", "features"), KERNELS)
def test_against_fp64(dtype, features):
    for sizes in SHAPES:
        q, k, v = drawn(dtype, features, *sizes)
        for mask in masks(q, k):
            check(q, k, v, mask)


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 16), (torch.float32, 5), (torch.bfloat16, 80)])
def test_causal(dtype, features):
    """Query i sees keys up to i, however many there are of both, and of these what a mask shows."""
    for sizes in SHAPES:
        q, k, v = drawn(dtype, features, *sizes)
        for mask in masks(q, k):
            check(q, k, v, mask, causal=True)


@pytest.mark.parametrize(
    ("dtype", "features"),
    [(torch.float32, 5), pytest.param(torch.bfloat16, 64, marks=pytest.mark.slow), (torch.float16, 80)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_soft_caps_and_sinks(dtype, features, causal):
    """Scores that a cap bends, and one more for each head: of the queries' dtype, or every other number of fp32."""
    for sizes in SHAPES:
        q, k, v = drawn(dtype, features, *sizes)
        narrow = torch.linspace(-2, 3, sizes[1]).to(dtype)
        wide = torch.linspace(-2, 3, 2 * sizes[1])[::2]
        for number, mask in enumerate(masks(q, k)):
            capped = check(3 * q, k, v, mask, causal, 1.5, (None, narrow, wide)[number % 3])
            plain = torch.ops.gaws.attend(3 * q, k, v, mask, 0.3, f"attend d={features} x={DTYPE_NAMES[dtype]}", narrow)
            assert sizes[4] == 1 or not torch.equal(capped, plain)
            check(q, k, v, mask, causal, None, (narrow, wide)[number % 2])


def test_small_scores_pass_a_cap_as_they_are():
    """tanh of a small number has all its digits: a difference of exponentials would have lost them."""
    q, k, v = drawn(torch.float32, 16, 1, 4, 2, 3, 40)
    for factor in (1e-4, 1e-2):
        kernel = "attend d=16 x=f32 cap=50.0"
        got = torch.ops.gaws.attend(factor * q, k, v, None, 0.3, kernel)
        assert error(got, factor * q, k, v, None, kernel) < 1e-6


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("queries", [2, 40])
def test_masks_of_the_lowest_number(dtype, queries):
    """As transformers writes them for attention that is written out. What they hide need not be read, but a query all
    of whose keys are hidden so weighs all of them alike."""
    q, k, v = drawn(dtype, 16, 1, 4, 2, queries, 30)
    for kind in {dtype, torch.float32}:
        mask = torch.zeros(1, 1, queries, 30, dtype=kind)
        mask[..., :4] = mask[..., 20:] = torch.finfo(kind).min
        mask[:, :, 1] = torch.finfo(kind).min
        got = check(q, k, v, mask)
        want = v.float().mean(2).repeat_interleave(2, 1).to(dtype)
        if dtype != torch.float16 or kind == torch.float32:
            torch.testing.assert_close(got[:, :, 1], want, rtol=2e-2, atol=1e-2)
        sinks = torch.zeros(4)
        check(q, k, v, mask, sinks=sinks)


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 5), (torch.bfloat16, 80)])
def test_narrower_vectors(dtype, features):
    """As a CPU without AVX-512 runs it."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no vectors of x86")
    text, name = str(cpp_attention.Kernel(features, DTYPE_NAMES[dtype], cap=2.0)), f"attend avx2 d={features}"
    library = build.load(VECTORS["AVX2"] + cpp_attention.emit(text))
    ops.ensure_loaded().gaws_register_attention(
        name.encode(), ctypes.cast(library.attend, ctypes.c_void_p), ctypes.c_int64(features),
        ctypes.c_int32(ops.scalar_type(DTYPE_NAMES[dtype])),
    )
    for sizes in SHAPES:
        q, k, v = drawn(dtype, features, *sizes)
        for mask in masks(q, k):
            got = torch.ops.gaws.attend(q, k, v, mask, 0.3, name)
            assert error(got, q, k, v, mask, text) <= BOUNDS[dtype], sizes


def test_scores_far_apart():
    """The softmax is corrected from block to block of keys; what is far below the largest weighs nothing."""
    q, k, v = drawn(torch.float32, 16, 1, 2, 2, 40, 600)
    for order in (torch.linspace(-40, 40, 600), torch.linspace(40, -40, 600)):
        k = order[:, None] + torch.zeros(1, 2, 600, 16)
        got = torch.ops.gaws.attend(q, k, v, None, 0.3, "attend d=16 x=f32")
        library = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        mine, theirs = (error(one, q, k, v, None, "attend d=16 x=f32") for one in (got, library))
        assert mine <= 2 * theirs + 1e-6


@pytest.mark.parametrize("queries", [3, 20])
def test_any_strides(queries):
    q, k, v = drawn(torch.float32, 16, 2, 4, 2, queries, 10)
    want = check(q, k, v, None)
    wide = torch.randn(2, 2, 14, 32)
    wide[:, :, 2:12, :16] = k
    turned = torch.empty(2, 10, 16, 2).permute(0, 3, 1, 2)
    turned.copy_(v)
    for given in (q, q.contiguous(), q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        got = check(given, wide[:, :, 2:12, :16], turned, None)
        assert torch.equal(got, want)
    mask = (torch.rand(2, 1, 10, queries) > 0.3).transpose(2, 3)
    check(q, k, v, mask)


@pytest.mark.parametrize("queries", [2, 40])
def test_a_query_that_sees_nothing_gets_zeros_and_what_is_masked_is_not_read(queries):
    q, k, v = drawn(torch.float32, 16, 1, 4, 2, queries, 30)
    mask = torch.ones(1, 1, queries, 30, dtype=torch.bool)
    mask[:, :, 1:] = False
    mask[:, :, 0, 5:] = False
    k[:, :, 5:], v[:, :, 5:] = float("nan"), float("inf")
    got = torch.ops.gaws.attend(q, k, v, mask, 0.3, "attend d=16 x=f32")
    assert torch.equal(got[:, :, 1:], torch.zeros(1, 4, queries - 1, 16)) and got.isfinite().all()
    k[:, :, 2] = float("nan")
    assert torch.ops.gaws.attend(q, k, v, mask, 0.3, "attend d=16 x=f32")[:, :, 0].isnan().all()


def test_nothing_to_attend_to():
    q, k, v = drawn(torch.float32, 16, 2, 4, 2, 3, 0)
    assert torch.equal(torch.ops.gaws.attend(q, k, v, None, 1.0, "attend d=16 x=f32"), torch.zeros(2, 4, 3, 16))
    q, k, v = drawn(torch.float32, 16, 0, 4, 2, 3, 5)
    assert torch.ops.gaws.attend(q, k, v, None, 1.0, "attend d=16 x=f32").shape == (0, 4, 3, 16)


def test_its_fake_has_its_strides():
    q, k, v = drawn(torch.float32, 16, 2, 4, 2, 3, 10)
    apart, over = torch.randn(2, 4, 16, 3).transpose(2, 3), torch.randn(30).unfold(-1, 16, 1)[:3].expand(2, 4, 3, 16)
    every = torch.randn(2, 4, 3, 32)[..., ::2]
    for given in (q, q.contiguous(), torch.randn(2, 3, 7, 16)[:, :, 1:5].transpose(1, 2), apart, over, every):
        real = torch.ops.gaws.attend(given, k, v, None, 1.0, "attend d=16 x=f32")
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) for one in (given, k, v)]
            fake = torch.ops.gaws.attend(*fakes, None, 1.0, "attend d=16 x=f32")
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert error(real, given, k, v, None, "attend d=16 x=f32", 1.0) <= BOUNDS[torch.float32]


def test_errors_name_what_does_not_fit():
    q, k, v = drawn(torch.float32, 16, 2, 4, 2, 3, 10)

    def call(q=q, k=k, v=v, mask=None, kernel="attend d=16 x=f32", sinks=None):
        return torch.ops.gaws.attend(q, k, v, mask, 1.0, kernel, sinks)

    wrong = [
        ({"k": k.double()}, "k is Double"),
        ({"v": v[..., :8]}, "v is Float"),
        ({"v": v[:, :, 1:]}, "q is"),
        ({"q": q[:, :3]}, "q is"),
        ({"mask": torch.ones(2, 1, 3, 9, dtype=torch.bool)}, "the mask is Bool"),
        ({"mask": torch.ones(1, 1, 3, 10, dtype=torch.int64)}, "the mask is Long"),
        ({"sinks": torch.zeros(3)}, "the sinks are Float"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "the sinks are Double"),
        ({"kernel": "attend d=0 x=f32"}, "no attention kernel"),
        ({"kernel": "attend d=16 x=f32 cap=0.0"}, "no attention kernel"),
    ]
    for settings, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call(**settings)
    for more in ("", " d=257 x=f32", " d=16 x=f64", " d=16 x=f32 cap=-1.0", " d=16 x=f32 cap=1e40"):
        text = f"attend{more}"
        with pytest.raises(SpecError, match="no attention kernel"):
            cpp_attention.emit(text)


def test_more_rows_than_threads_and_the_other_way_round():
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            q, k, v = drawn(torch.float32, 64, 3, 12, 2, 3, 300)
            answers.append(check(q, k, v, None))
        for one, other in itertools.pairwise(answers):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)
