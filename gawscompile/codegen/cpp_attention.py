"""Attention in C++, one kernel for a dtype and a number of features: ``attend d=64 x=bf16``, or ``… cap=50.0 causal``.

Everything else (rows, heads, how many of them share a key head, queries, keys, strides, mask, sinks) is read in the
call, so one kernel serves a cache of any size. Keys that no query may see are skipped. Few queries read keys where the
cache has them (`attention.cpp`), many share keys that were turned for them (`attention_tiles.cpp`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.types import SpecError

_FOLDER = Path(__file__).parent
MOST_FEATURES = 256
LEAST_CAP = 1e-30
"""Of a soft cap; its inverse is the most."""
FEW = 16
"""Queries of a head that are taken one by one; beyond, tiles of them share turned keys."""


class Kernel(NamedTuple):
    """One kernel. Its text is an argument of the op."""

    features: int
    dtype: str
    """Of queries, keys and values (``bf16``)."""
    causal: bool = False
    """Query i sees keys up to i."""
    cap: float | None = None
    """Scores become cap · tanh(scores / cap) before a mask is added (Gemma 2, arXiv 2408.00118, section 2)."""

    def __str__(self) -> str:
        capped = "" if self.cap is None else f" cap={self.cap!r}"
        return f"attend d={self.features} x={self.dtype}{capped}{' causal' if self.causal else ''}"


def parse(text: str) -> Kernel:
    """The kernel of a text. Raises `SpecError`."""
    match = re.fullmatch(r"attend d=(\d+) x=(f32|bf16|f16)(?: cap=([0-9.e+-]+))?( causal)?", text)
    if match is None or not 0 < int(match[1]) <= MOST_FEATURES:
        raise SpecError(f"no attention kernel: {text!r}")
    cap = float(match[3]) if match[3] else None
    if cap is not None and not LEAST_CAP <= cap <= 1 / LEAST_CAP:
        raise SpecError(f"no attention kernel: {text!r}")
    return Kernel(int(match[1]), match[2], match[4] is not None, cap)


def emit(text: str) -> str:
    """The C++ source of a `Kernel`'s text. Raises `SpecError`."""
    features, dtype, causal, cap = parse(text)
    names = ("headers", "vectors", "prelude", "exp", "turning")
    parts = [(_FOLDER / f"{name}.cpp").read_text().strip() for name in names]
    given = [f"using T = {CPP_TYPES[dtype]};", f"constexpr int D = {features};"]
    given += [f"constexpr bool CAUSAL = {str(causal).lower()};", f"constexpr int64_t FEW = {FEW};"]
    given += [f"constexpr float CAP = {cap or 0.0!r};  // 0: none"]
    constants = "\n".join(["namespace {\n", *given, "\n}  // namespace"])
    bodies = [(_FOLDER / f"{name}.cpp").read_text().strip() for name in ("attention", "attention_tiles")]
    headers, vectors, prelude, exp, turning = parts
    whole = [f"// gawscompile: {text}", headers, vectors, prelude, exp, "}  // namespace", turning, constants, *bodies]
    return "\n\n".join(whole) + "\n"


def result_of(q: torch.Tensor) -> torch.Tensor:
    """A tensor for what the op returns. It lies in memory as `q` does where both have their features side by side, and
    plainly otherwise; `runtime/attention.cpp` has the same rule."""
    out = torch.empty_like(q)
    apart = q.stride(3) != 1 or out.stride(3) != 1
    return torch.empty(q.shape, dtype=q.dtype, device=q.device) if apart else out
