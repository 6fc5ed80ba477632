"""The op of attention over an unexpanded cache, ``gaws::attend``.

    gaws::attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kernel, Tensor? sinks=None) -> Tensor

`q` is ``[rows, heads, queries, features]``; `k` and `v` are ``[rows, groups, keys, features]``, each of their heads for
``heads / groups`` of q's. `mask` broadcasts to ``[rows, heads, queries, keys]``: what may be seen (bool), or what is
added to the scores (fp32, or q's dtype). `sinks` is one more score for each head, which weighs no value: ``[heads]``,
fp32 or q's dtype (gpt-oss; arXiv 2309.17453). The result has q's shape and lies in memory as q does, where q's features
lie side by side. `kernel` is the text of the generated kernel (`codegen.cpp_attention.Kernel`). On CPUs it is C++, on
GPUs Triton (`codegen/triton_attention.py`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from gawscompile.codegen import build, cpp_attention
from gawscompile.planning.targets import CPP, Target
from gawscompile.runtime import ops

ops.LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kernel, Tensor? sinks=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return cpp_attention.result_of(q)


torch.library.register_fake("gaws::attend", _fake, lib=ops.LIBRARY)
ATTEND = torch.ops.gaws.attend.default


def meaning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    kernel: str,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the op computes, in plain torch, in the dtype that it is given. A query that sees no key gets zeros."""
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    _, _, causal, cap = cpp_attention.parse(kernel)
    scores = scale * (q @ k.transpose(-1, -2))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sink), -1).softmax(-1)[..., :-1] @ v
    whole = scores.amax(-1, keepdim=True)
    return torch.where(whole == float("-inf"), 0.0, scores.softmax(-1)) @ v


def on_gpu(q: torch.Tensor, *others: Any) -> torch.Tensor:
    """The CUDA kernel of the op. Raises `ValueError`, naming the tensor, where one does not fit `kernel`."""
    from gawscompile.codegen import triton_attention

    with torch.cuda.device_of(q):  # Triton launches on the current device and its current stream
        return triton_attention.launch(q, *others)


ops.LIBRARY.impl("attend", on_gpu, "CUDA")


def start(kernel: str, target: Target) -> None:
    """Begin to build a kernel in the background. Triton's are compiled when they are first called."""
    if target is CPP:
        build.start(cpp_attention.emit(kernel))


def register(kernel: str) -> None:
    """Build a kernel and hand it to the op."""
    features, dtype, *_ = cpp_attention.parse(kernel)
    library = build.load(cpp_attention.emit(kernel))
    ops.ensure_loaded().gaws_register_attention(
        kernel.encode(),
        ctypes.cast(library.attend, ctypes.c_void_p),
        ctypes.c_int64(features),
        ctypes.c_int32(ops.scalar_type(dtype)),
    )


ops.REGISTERS["attend "] = register
