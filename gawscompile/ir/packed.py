"""Weights that are kept as codes of 8 or 4 bits: how they lie in memory, and which numbers they stand for.

    W[i, j] = s[i, j / group] * (level(code[i, j]) - z[i, j / group])

`Coding` says what a code's level is and where codes lie. Scales s (and zeros z, where there are any) come one for each
row, or one for each `group` of a row's columns, rows after each other. They may be coded once more (QLoRA: Dettmers et
al. 2023, "double quantisation"): then they are bytes, and a scale is ``levels[byte] * outer[number / 256] + offset``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat, the quantiles of a normal distribution (QLoRA: Dettmers et al. 2023, appendix E)."""

FP4 = (
    0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip
"""bitsandbytes' numbers of one sign bit and three others."""

OUTER = 256
"""Scales that share one of theirs."""

BLOCK = 32
"""Rows of a block."""

STEP = 32
"""Columns that a kernel takes at a time: a weight's, and those that share a scale, are a multiple."""


@dataclass(frozen=True)
class Coding:
    """What a code stands for, and where codes lie. `levels`: of a code of 4 bits, where it is not the code itself; of
    ``blocks`` they are an operand.

    - ``bytes``: a code each;
    - ``pairs``: a byte has the codes of two columns that follow each other, the first in its upper half (bitsandbytes);
    - ``halves``: a byte has the code of a row in its upper half, that of the row n/2 further down in the other (HQQ);
    - ``blocks``: of 32 rows; for two columns that follow each other 32 bytes, of rows i and i + 16 the first column's
      and the second's, that of row i in the lower half (bitsandbytes, laid out for CPUs). Scales lie by groups then,
      those of all rows after each other.
    """

    name: str
    bits: int
    dtype: str
    layout: Literal["bytes", "pairs", "halves", "blocks"]
    levels: tuple[float, ...] = ()

    @property
    def by_groups(self) -> bool:
        """Whether scales lie ``[groups, n]``, not ``[n, groups]``."""
        return self.layout == "blocks"

    def numbers(self, codes: torch.Tensor, table: Any, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The levels ``[n, k]`` of `codes`, as they lie. `table` has the sixteen that are an operand, or is None."""
        if self.layout == "bytes":
            return codes.reshape(n, k).to(dtype)
        high, low = codes.reshape(-1) >> 4, codes.reshape(-1) & 15
        if self.layout == "blocks":
            sizes = (n // BLOCK, k // 2, BLOCK // 2, 2)
            found = torch.cat([low.reshape(sizes), high.reshape(sizes)], 2).permute(0, 2, 1, 3)
        else:
            found = torch.cat([high, low]) if self.layout == "halves" else torch.stack([high, low], -1)
        found = found.reshape(n, k)
        if table is not None:
            return table.to(dtype)[found.long()]
        if not self.levels:
            return found.to(dtype)
        # tensors that are full of one number: where this is traced, it leaves no constant behind
        levels = [torch.full((), level, dtype=dtype, device=codes.device) for level in self.levels]
        return torch.stack(levels)[found.long()]


CODINGS = {
    coding.name: coding
    for coding in (
        Coding("int8", 8, "i8", "bytes"),
        Coding("uint8", 8, "u8", "bytes"),
        Coding("nf4", 4, "u8", "pairs", NF4),
        Coding("fp4", 4, "u8", "pairs", FP4),
        Coding("table4_blocks", 4, "u8", "blocks"),
        Coding("uint4_halves", 4, "u8", "halves"),
    )
}

READ = {"cpu": ("bytes", "pairs", "halves", "blocks"), "cuda": ("bytes", "pairs")}
"""Layouts that kernels read, by kinds of devices."""


def spread(numbers: torch.Tensor, n: int, k: int, by_groups: bool = False) -> torch.Tensor:
    """Scales or zeros ``[n, 1]``, or ``[n, k]`` where groups of columns have their own."""
    each = numbers.reshape(-1, n).T if by_groups else numbers.reshape(n, -1)
    return each if each.shape[1] == 1 else each.repeat_interleave(k // each.shape[1], 1)


def bytes_of(bits: int, k: int) -> int:
    """Of a row's codes."""
    return k * bits // 8


def plain_scales(scales: torch.Tensor, levels: Any, outer: Any, offset: Any, dtype: torch.dtype) -> torch.Tensor:
    """Scales as numbers, where they are coded."""
    if levels is None:
        return scales.to(dtype)
    found = levels.to(dtype)[scales.reshape(-1).long()]
    return found * outer.to(dtype).reshape(-1).repeat_interleave(OUTER)[: len(found)] + offset.to(dtype)
