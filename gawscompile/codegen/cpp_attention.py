"""Attention in C++, one kernel for a dtype and a number of features: ``attend d=64 x=bf16``, or ``… causal``.

Everything else (rows, heads, how many of them share a key head, queries, keys, strides, mask) is read in the call, so
one kernel serves a cache of any size. Keys that no query may see are skipped. Few queries read keys where the cache has
them (`attention.cpp`), many share keys that were turned for them (`attention_tiles.cpp`).
"""

from __future__ import annotations

import re
from pathlib import Path

from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.types import SpecError

_FOLDER = Path(__file__).parent
MOST_FEATURES = 256
FEW = 16
"""Queries of a head that are taken one by one; beyond, tiles of them share turned keys."""


def kernel(features: int, dtype: str, causal: bool = False) -> str:
    """What a kernel is called: the op's last argument. `dtype` is of queries, keys and values (``bf16``); `causal`, if
    query i sees keys up to i."""
    return f"attend d={features} x={dtype}{' causal' if causal else ''}"


def parse(text: str) -> tuple[int, str, bool]:
    """Features, dtype and whether it is causal, of a `kernel`. Raises `SpecError`."""
    match = re.fullmatch(r"attend d=(\d+) x=(f32|bf16|f16)( causal)?", text)
    if match is None or not 0 < int(match[1]) <= MOST_FEATURES:
        raise SpecError(f"no attention kernel: {text!r}")
    return int(match[1]), match[2], match[3] is not None


def emit(text: str) -> str:
    """The C++ source of a `kernel`. Raises `SpecError`."""
    features, dtype, causal = parse(text)
    parts = [(_FOLDER / f"{name}.cpp").read_text().strip() for name in ("vectors", "prelude", "exp", "turning")]
    given = [f"using T = {CPP_TYPES[dtype]};", f"constexpr int D = {features};"]
    given += [f"constexpr bool CAUSAL = {str(causal).lower()};", f"constexpr int64_t FEW = {FEW};"]
    constants = "\n".join(["namespace {\n", *given, "\n}  // namespace"])
    bodies = [(_FOLDER / f"{name}.cpp").read_text().strip() for name in ("attention", "attention_tiles")]
    vectors, prelude, exp, turning = parts
    whole = [f"// gawscompile: {text}", vectors, prelude, exp, "}  // namespace", turning, constants, *bodies]
    return "\n\n".join(whole) + "\n"
