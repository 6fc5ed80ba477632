"""The parsers of operators' texts: what each ``text()`` of `ir.operators` prints, as an operator over types."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from gawscompile.ir.operators import (
    Banked,
    Bias,
    Dense,
    Given,
    Kronecker,
    LowRank,
    Mode,
    Opaque,
    Operator,
    Residual,
    RowScale,
)
from gawscompile.ir.packed import CODINGS, OUTER, Packed
from gawscompile.ir.types import ANY, DTYPES, SpecError, TensorType


def known(dtype: str) -> str:
    """`dtype`, if kernels know it."""
    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return dtype


_MODE = re.compile(r"(\d+)\*(?:(\d+)of(?!diag))?(?:(\d+)x|diag)(\d+)\*(\d+)")


def _words(name: str, pattern: str, text: str) -> re.Match[str]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise SpecError(f"not a projection spec: {name}({text})")
    return match


def _scale(text: str) -> float | TensorType:
    dtype = text.removeprefix("tensor.")
    if dtype == text:
        try:
            return float(text)
        except ValueError:
            raise SpecError(f"not a scale: {text!r}") from None
    if dtype not in ("f32", "f64"):
        raise SpecError(f"a scale is a number, tensor.f32 or tensor.f64, not {text!r}")
    return TensorType((), dtype)


def _lora(text: str, n: int, k: int) -> LowRank:
    rank, dtype, scale = _words("lora", r"r=(\d+) (\w+) s=(\S+)", text).groups()
    return LowRank(TensorType((int(rank), k), known(dtype)), TensorType((n, int(rank)), dtype), _scale(scale))


def _given(text: str, n: int, k: int) -> Given:
    rank, dtype, z = _words("given", r"r=(\d+) (\w+) z=(\w+)", text).groups()
    return Given(TensorType((n, int(rank)), known(dtype)), TensorType(("m", int(rank)), known(z)))


def _kron(text: str, n: int, k: int) -> Kronecker:
    chain, dtype, scale = _words("kron", rf"((?:{_MODE.pattern} )+)(\w+) s=(\S+)", text).group(1, 7, 8)
    found = [(int(b), tuple(int(size) for size in sizes if size), int(a)) for b, *sizes, a in _MODE.findall(chain)]
    modes = tuple(Mode(before, TensorType(shape, known(dtype)), after) for before, shape, after in found)
    return Kronecker(modes, _scale(scale))


def _bank(text: str, n: int, k: int) -> Banked:
    dtype, width, modes = _words("bank", r"(\w+)(?: x(\d+))?(?: modes=(\d+))?", text).groups()
    pool, schedule = TensorType((ANY,), known(dtype)), TensorType((ANY, ANY, ANY), "i32")
    return Banked(pool, schedule, n, int(width) if width else None, int(modes or 0))


def _packed(text: str, n: int, k: int) -> Packed:
    found = _words("packed", r"(\w+) g=(\d+)(?: s=(\w+))?(?: z=(\w+))?(?: f=(\S+))?( ordered)?", text)
    coding, group, scales, zeros, factor, ordered = found.groups()
    try:
        times = 1.0 if factor is None else float(factor)
    except ValueError:
        times = math.nan
    if coding not in CODINGS or not int(group) or not math.isfinite(times):
        raise SpecError(f"not a projection spec: packed({text})")
    groups = n * k // int(group)

    def flat(dtype: str | None, count: int) -> TensorType | None:
        return None if dtype is None else TensorType((count,), dtype if dtype in ("u8", "i8") else known(dtype))

    coded = scales == "u8"
    codes = TensorType((CODINGS[coding].bytes_of(n * k),), CODINGS[coding].dtype)
    return Packed(
        codes, n, k, coding, int(group), flat("f32" if CODINGS[coding].layout == "blocks" else None, 16),
        flat(scales, groups * (1 + CODINGS[coding].shifted)), flat(zeros, groups),
        flat("f32" if coded else None, 256), flat("f32" if coded else None, -(-groups // OUTER)),
        flat("f32" if coded else None, 1), times, TensorType((k,), "i32") if ordered else None,
    )  # fmt: skip


PARSERS: dict[str, Callable[[str, int, int], Operator]] = {
    "w": lambda dtype, n, k: Dense(TensorType((n, k), known(dtype))),
    "wt": lambda dtype, n, k: Dense(TensorType((k, n), known(dtype)), True),
    "packed": _packed,
    "opaque": lambda dtype, n, k: Opaque(TensorType(("m", n), known(dtype))),
    "bias": lambda dtype, n, k: Bias(TensorType((n,), known(dtype))),
    "residual": lambda dtype, n, k: Residual(TensorType(("m", n), known(dtype))),
    "rowscale": lambda dtype, n, k: RowScale(TensorType((n,), known(dtype))),
    "lora": _lora,
    "given": _given,
    "kron": _kron,
    "bank": _bank,
}
