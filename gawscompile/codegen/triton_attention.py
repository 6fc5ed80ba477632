"""Attention of few queries in Triton: softmax(s Q Kᵀ + mask) V over keys as a cache has them, capped and with sinks.

Flash-decoding (Dao et al. 2023): one program takes the queries of all heads that share a head of keys, `BLOCK_M` of
them at most, over one part of the keys. So keys and values are read once, however many heads there are. Where rows and
heads alone do not fill the device, keys are split in parts, and `attend_join` puts their results together. Keys that no
query of a program may see are not loaded.

Sizes are those of `gawscompile.codegen.cpp_attention`: heads of up to 256 features; fp32, bf16 and fp16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gawscompile.codegen.cpp_attention import parse, result_of
from gawscompile.codegen.triton import Variant
from gawscompile.ir.types import DTYPES, SpecError

MASKS = {None: 0, torch.bool: 1}
"""How a kernel reads a mask: not at all, as what may be seen; 2: as what is added to the scores."""


@triton.jit
def capped(scores, cap):
    """cap · tanh(scores / cap). What exp gives for small numbers has lost them: there its series is taken."""
    x = scores / cap
    small = x * x
    series = x * (1.0 + small * (-1.0 / 3.0 + small * (2.0 / 15.0 + small * (-17.0 / 315.0 + small * (62.0 / 2835.0)))))
    power = tl.exp(-2.0 * tl.abs(x))
    whole = (1.0 - power) / (1.0 + power)
    return cap * tl.where(small < 0.04, series, tl.where(x < 0, -whole, whole))


@triton.jit
def attend_part(
    q, k, v, mask, sinks, out, parts, scale, cap, queries, share, groups, keys, part,
    q_row, q_head, q_at, q_d, k_row, k_head, k_at, k_d, v_row, v_head, v_at, v_d,
    mask_row, mask_head, mask_at, mask_d, out_row, out_head, out_at, out_d, sink_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, WHOLE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Keys ``[part · program 1, …)`` of a head of keys. `WHOLE`: these are all, and the result goes to `out`."""
    of = tl.program_id(0)
    row, group = (of // groups).to(tl.int64), of % groups
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, query = group * share + m // queries, m % queries
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    ok_m, ok_d = m < share * queries, d < D
    ok = ok_m[:, None] & ok_d[None, :]
    at_q = q + row * q_row + head[:, None].to(tl.int64) * q_head + query[:, None] * q_at + d[None, :] * q_d
    x = tl.load(at_q, mask=ok, other=0.0)
    first = tl.program_id(1) * part
    end = tl.minimum(first + part, keys)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_N):
        at = (start + n).to(tl.int64)
        ok_n = at < end
        seen = ok_m[:, None] & ok_n[None, :]
        added = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if MASK > 0:
            at_mask = mask + row * mask_row + head[:, None].to(tl.int64) * mask_head + query[:, None] * mask_at
            told = tl.load(at_mask + at[None, :] * mask_d, mask=seen, other=0)
            if MASK == 1:
                seen = seen & (told != 0)
            else:
                added = told.to(tl.float32)
                seen = seen & (added != float("-inf"))
        read = tl.max(seen.to(tl.int32), 0) > 0
        if tl.max(read.to(tl.int32), 0) > 0:
            at_k = k + row * k_row + group.to(tl.int64) * k_head + at[None, :] * k_at + d[:, None] * k_d
            columns = tl.load(at_k, mask=read[None, :] & ok_d[:, None], other=0.0)
            scores = tl.dot(x, columns, input_precision="ieee") * scale
            if CAPPED:
                scores = capped(scores, cap)
            scores = tl.where(seen, scores + added, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - level[:, None])
            before = tl.exp(most - level)
            at_v = v + row * v_row + group.to(tl.int64) * v_head + at[:, None] * v_at + d[None, :] * v_d
            values = tl.load(at_v, mask=read[:, None] & ok_d[None, :], other=0.0)
            total = total * before + tl.sum(weights, 1)
            sums = sums * before[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            most = higher
    if SINKS:  # once, however many parts there are
        ok_sink = ok_m & (m * 0 + tl.program_id(1) == 0)
        extra = tl.load(sinks + head * sink_d, mask=ok_sink, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, extra)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        before = tl.exp(most - level)
        total = total * before + tl.exp(extra - level)
        sums = sums * before[:, None]
        most = higher
    if WHOLE:
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        at_out = out + row * out_row + head[:, None].to(tl.int64) * out_head + query[:, None] * out_at
        tl.store(at_out + d[None, :] * out_d, result.to(out.dtype.element_ty), mask=ok)
    else:
        of_all = (tl.program_id(1) * tl.num_programs(0) + of).to(tl.int64)
        line = parts + (of_all * tl.num_programs(2) * BLOCK_M + m) * (D + 2)
        tl.store(line[:, None] + d[None, :], sums, mask=ok)
        tl.store(line + D, most, mask=ok_m)
        tl.store(line + D + 1, total, mask=ok_m)


@triton.jit
def attend_join(
    parts, out, count, queries, share, groups, out_row, out_head, out_at, out_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`count` parts become one result."""
    of = tl.program_id(0)
    row, group = (of // groups).to(tl.int64), of % groups
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, query = group * share + m // queries, m % queries
    d = tl.arange(0, BLOCK_D)
    ok_m, ok_d = m < share * queries, d < D
    ok = ok_m[:, None] & ok_d[None, :]
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for number in range(count):
        of_all = (number * tl.num_programs(0) + of).to(tl.int64)
        line = parts + (of_all * tl.num_programs(2) * BLOCK_M + m) * (D + 2)
        here = tl.load(line + D, mask=ok_m, other=float("-inf"))
        higher = tl.maximum(most, here)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        before, factor = tl.exp(most - level), tl.exp(here - level)
        total = total * before + tl.load(line + D + 1, mask=ok_m, other=0.0) * factor
        own = tl.load(line[:, None] + d[None, :], mask=ok, other=0.0)
        sums = sums * before[:, None] + own * factor[:, None]
        most = higher
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    at_out = out + row * out_row + head[:, None].to(tl.int64) * out_head + query[:, None] * out_at
    tl.store(at_out + d[None, :] * out_d, result.to(out.dtype.element_ty), mask=ok)


def blocks(features: int, dtype: str, rows: int) -> dict[str, int]:
    """The sizes of a program's blocks, for heads of so many features and `rows` queries of all heads of a group."""
    block_d = max(16, triton.next_power_of_2(features))
    line = block_d * (4 if dtype == "f32" else 2)  # bytes; longer ones leave registers for fewer queries and keys
    return {
        "D": features,
        "BLOCK_D": block_d,
        "BLOCK_M": min(max(16, 64 * 128 // block_d // 2), max(16, triton.next_power_of_2(rows))),
        "BLOCK_N": max(16, min(64, 64 * 128 // line)),
    }


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    kernel: str,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``gaws::attend`` on a GPU (`gawscompile.runtime.attention` has its shapes). Raises `ValueError`, naming the
    tensor, where one does not fit `kernel`."""
    features, dtype, cap = _sizes(kernel)
    _check(q, k, v, mask, sinks, features, DTYPES[dtype])
    rows, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    out = result_of(q)
    if not q.numel():
        return out
    share = heads // groups
    sizes = blocks(features, dtype, share * queries)
    across = triton.cdiv(share * queries, sizes["BLOCK_M"])
    count = _parts(q.device, rows * groups * across, triton.cdiv(keys, sizes["BLOCK_N"]))
    part = triton.cdiv(triton.cdiv(keys, count), sizes["BLOCK_N"]) * sizes["BLOCK_N"]
    count = max(1, triton.cdiv(keys, part)) if keys else 1
    seen = q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    steps = [0] * 4 if mask is None else _broadcast(mask, (rows, heads, queries, keys))
    lines = 0 if count == 1 else count * rows * groups * across * sizes["BLOCK_M"]
    parts = q.new_empty(lines * (features + 2), dtype=torch.float32)
    how = MASKS.get(None if mask is None else mask.dtype, 2)
    strides = [*q.stride(), *k.stride(), *v.stride(), *steps, *out.stride(), 0 if sinks is None else sinks.stride(0)]
    kind = {"MASK": how, "WHOLE": count == 1, "CAPPED": cap is not None, "SINKS": sinks is not None}
    extra = q if sinks is None else sinks
    numbers = (queries, share, groups)
    attend_part[rows * groups, count, across](
        q, k, v, seen, extra, out, parts, scale, cap or 0.0, *numbers, keys, max(part, 1), *strides, **sizes, **kind
    )
    if count > 1:
        del sizes["BLOCK_N"]
        attend_join[rows * groups, 1, across](parts, out, count, *numbers, *out.stride(), **sizes)
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, sinks: Any, features: int, dtype: torch.dtype
) -> None:
    rows, heads, queries, _ = q.shape
    whole = (rows, heads, queries, k.shape[2])
    for name, one in (("q", q), ("k", k), ("v", v)):
        if one.dtype != dtype or one.shape[-1] != features or one.device != q.device:
            raise ValueError(f"{name} is {one.dtype} {tuple(one.shape)} on {one.device}, not {dtype} of {features}")
    if k.shape != v.shape or k.shape[0] != rows or heads % max(k.shape[1], 1):
        raise ValueError(f"q is {tuple(q.shape)}, k is {tuple(k.shape)}, v is {tuple(v.shape)}")
    if mask is not None:
        fits = mask.dim() == 4 and all(one in (1, size) for one, size in zip(mask.shape, whole, strict=True))
        if not fits or mask.dtype not in (torch.bool, torch.float32, dtype):
            raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)} for {whole}")
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype not in (torch.float32, dtype)):
        raise ValueError(f"the sinks are {sinks.dtype} {tuple(sinks.shape)} for {heads} heads")


def _parts(device: torch.device, programs: int, most: int) -> int:
    """In how many parts keys are split: so that there are two programs for each processor, where there are so many."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, 2 * processors // max(programs, 1), 64))


def _sizes(kernel: str) -> tuple[int, str, float | None]:
    """Features, dtype and cap. Raises `SpecError` for a causal kernel, of which there is none for a GPU."""
    features, dtype, causal, cap = parse(kernel)
    if causal:
        raise SpecError(f"no attention kernel for a GPU: {kernel!r}")
    return features, dtype, cap


def _broadcast(mask: torch.Tensor, shape: tuple[int, ...]) -> list[int]:
    return list(mask.expand(shape).stride())


def variants(
    kernel: str, rows: int = 1, keys: int = 1024, masked: bool = True, sinks: bool = False
) -> list[Variant]:
    """What is compiled ahead of time of a `kernel`, for `rows` queries of all heads of a group over a cache of `keys`:
    parts and their join. Strides are constants here; when it is launched, Triton sees which are multiples of 16."""
    features, dtype, cap = _sizes(kernel)
    kind = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}[dtype]
    sizes = blocks(features, dtype, rows)
    of: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out", "sinks"), f"*{kind}") | {"mask": "*u8", "parts": "*fp32"}
    of |= {"scale": "fp32", "cap": "fp32"}
    how = {"MASK": int(masked), "WHOLE": 0, "CAPPED": int(cap is not None), "SINKS": int(sinks)}
    found = []
    for one, more in ((attend_part, how), (attend_join, {})):
        constants = {name: value for name, value in (sizes | more).items() if name in one.arg_names}
        steps = {"d": 1, "at": features, "head": keys * features, "row": rows * keys * features}
        constants |= {name: steps[end] for name in one.arg_names if (end := name.rpartition("_")[2]) in steps}
        signature = {name: "constexpr" if name in constants else of.get(name, "i32") for name in one.arg_names}
        found.append(Variant(one.fn.__name__, signature, constants, {"num_warps": 4}))
    return found
