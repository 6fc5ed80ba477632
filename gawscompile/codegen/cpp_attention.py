"""Attention of few queries in C++, one kernel for a dtype and a number of features: ``attend d=64 x=bf16``.

Everything else (rows, heads, how many of them share a key head, queries, keys, strides, mask) is read in the call, so
one kernel serves a cache of any size. Keys are read where the cache has them, those that no query may see are skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.types import SpecError

_FOLDER = Path(__file__).parent
MOST_FEATURES = 256


def kernel(features: int, dtype: str) -> str:
    """What a kernel is called: the op's last argument. `dtype` is of queries, keys and values (``bf16``)."""
    return f"attend d={features} x={dtype}"


def parse(text: str) -> tuple[int, str]:
    """Features and dtype of a `kernel`. Raises `SpecError`."""
    match = re.fullmatch(r"attend d=(\d+) x=(f32|bf16|f16)", text)
    if match is None or not 0 < int(match[1]) <= MOST_FEATURES:
        raise SpecError(f"no attention kernel: {text!r}")
    return int(match[1]), match[2]


def emit(text: str) -> str:
    """The C++ source of a `kernel`. Raises `SpecError`."""
    features, dtype = parse(text)
    parts = [(_FOLDER / f"{name}.cpp").read_text().strip() for name in ("vectors", "prelude")]
    constants = f"namespace {{\n\nusing T = {CPP_TYPES[dtype]};\nconstexpr int D = {features};\n\n}}  // namespace"
    body = (_FOLDER / "attention.cpp").read_text().strip()
    return "\n\n".join([f"// gawscompile: {text}", *parts, "}  // namespace", constants, body]) + "\n"
