"""``gaws::attend`` in Triton: against fp64, keys in parts, what is masked and never read, a model that decodes."""

from __future__ import annotations

import pytest
import torch

from gawscompile.codegen import triton_attention
from tests.gpu.conftest import STAND_IN
from tests.runtime.test_attention import BOUNDS, SHAPES, drawn, error, masks

SHAPES = [*SHAPES, (1, 70, 1, 2, 40)]  # more queries of one head of keys than a program takes
KERNELS = [
    *(("f32", torch.float32, 64), ("bf16", torch.bfloat16, 80)),
    *(("f16", torch.float16, 64), ("f32", torch.float32, 5)),
]


def check(q, k, v, mask, kernel, device, sinks=None):
    *moved, there = (None if one is None else one.to(device) for one in (q, k, v, mask, sinks))
    found = error(torch.ops.gaws.attend(*moved, 0.3, kernel, there).cpu(), q, k, v, mask, kernel, sinks=sinks)
    assert found <= 2 * BOUNDS[q.dtype], (q.shape, k.shape, None if mask is None else mask.dtype, found)


@pytest.mark.parametrize(("name", "dtype", "features"), KERNELS[: 2 if STAND_IN else None])
@pytest.mark.parametrize("parts", [None, 3])
def test_against_fp64(name, dtype, features, parts, device, monkeypatch):
    if parts:
        monkeypatch.setattr(triton_attention, "_parts", lambda *_: parts)
    for sizes in SHAPES:
        q, k, v = drawn(dtype, features, *sizes)
        for mask in masks(q, k):
            check(q, k, v, mask, f"attend d={features} x={name}", device)
        sinks = torch.linspace(-2, 3, sizes[1])
        check(q, k, v, mask, f"attend d={features} x={name} cap=1.5", device, sinks)


def test_any_strides_and_a_mask_that_is_broadcast(device):
    q, k, v = drawn(torch.float32, 16, 2, 4, 2, 3, 10)
    wide = torch.randn(2, 2, 14, 32)
    wide[:, :, 2:12, :16] = k
    mask = (torch.rand(2, 1, 10, 3) > 0.3).transpose(2, 3)
    for given in (q.contiguous(), q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        arguments = [one.to(device) for one in (given, k, v)]
        assert torch.ops.gaws.attend(*arguments, None, 1.0, "attend d=16 x=f32").is_contiguous()
        check(given, wide[:, :, 2:12, :16], v, mask, "attend d=16 x=f32", device)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_masked_is_not_read(parts, device, monkeypatch):
    monkeypatch.setattr(triton_attention, "_parts", lambda *_: parts)
    q, k, v = drawn(torch.float32, 16, 1, 4, 2, 2, 150)
    mask = torch.ones(1, 1, 2, 150, dtype=torch.bool)
    mask[:, :, 1] = False
    mask[:, :, 0, 5:] = False
    k[:, :, 5:], v[:, :, 5:] = float("nan"), float("inf")
    for given in (mask, torch.zeros(1, 1, 2, 150).masked_fill(~mask, float("-inf"))):
        arguments = [one.to(device) for one in (q, k, v, given)]
        got = torch.ops.gaws.attend(*arguments, 0.3, "attend d=16 x=f32").cpu()
        assert torch.equal(got[:, :, 1], torch.zeros(1, 4, 16)) and got.isfinite().all() and got[:, :, 0].any()


def test_nothing_to_attend_to_and_what_does_not_fit(device):
    q, k, v = (one.to(device) for one in drawn(torch.float32, 16, 2, 4, 2, 3, 0))
    got = torch.ops.gaws.attend(q, k, v, None, 1.0, "attend d=16 x=f32")
    assert torch.equal(got.cpu(), torch.zeros(2, 4, 3, 16))
    q, k, v = (one.to(device) for one in drawn(torch.float32, 16, 2, 4, 2, 3, 10))
    wrong = [
        ({"k": k.double()}, "k is torch.float64"),
        ({"v": v[:, :, 1:]}, "q is"),
        ({"q": q[:, :3]}, "q is"),
        ({"mask": torch.ones(2, 1, 3, 9, dtype=torch.bool, device=device)}, "the mask is torch.bool"),
        ({"kernel": "attend d=0 x=f32"}, "no attention kernel"),
    ]
    for changed, message in wrong:
        given = {"q": q, "k": k, "v": v, "mask": None, "scale": 1.0, "kernel": "attend d=16 x=f32"} | changed
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.gaws.attend(*given.values())


def test_a_model_decodes_by_it(device):
    from gawscompile.observe.store import RECORDS
    from tests.graphs import small_llama, tokens

    model = small_llama(layers=1).to(device)
    mark = len(RECORDS)
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    with torch.no_grad():
        ids = tokens(1, 3).to(device)
        past = [model(ids, use_cache=True).past_key_values for _ in range(2)]
        step = tokens(1, 1).to(device)
        want = model(step, past_key_values=past[0]).logits
        got = compiled(step, past_key_values=past[1]).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert any(record.passes.get("fuse_attention") for record in RECORDS.since(mark))
