"""Weights that are kept as codes of 8 or 4 bits: how they lie in memory, and which numbers they stand for.

    W[i, j] = s[i, j / group] * (level(code[i, j]) - z[i, j / group])

`Coding` says what a code's level is and where codes lie. Scales s (and zeros z, where there are any) come one for each
row, or one for each `group` of a row's columns, rows after each other; ``blocks`` and ``tiles`` have them by groups,
and tiles are ``s * level + z``. They may be coded once more (QLoRA: Dettmers et al. 2023, "double quantisation"): then
they are bytes, and a scale is ``levels[byte] * outer[number / 256] + offset``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from gawscompile.ir.places import Leaf, Place, leaves, misfit
from gawscompile.ir.types import dtype_of, shape_of, type_of

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
      those of all rows after each other;
    - ``tiles``: of `rows` rows; for each column half as many bytes, of rows i and i + rows / 2, that of row i in the
      lower half (aten's ``_weight_int4pack_mm_for_cpu``). Scales lie by groups, and each is followed by a number that
      is added: ``W[i, j] = s level(code) + z``.
    """

    name: str
    bits: int
    dtype: str
    layout: Literal["bytes", "pairs", "halves", "blocks", "tiles"]
    levels: tuple[float, ...] = ()
    rows: int = 1
    """That lie together."""

    @property
    def by_groups(self) -> bool:
        """Whether scales lie ``[groups, n]``, not ``[n, groups]``."""
        return self.layout in ("blocks", "tiles")

    @property
    def shifted(self) -> bool:
        """Whether each scale is followed by a number that is added."""
        return self.layout == "tiles"

    def bytes_of(self, count: int) -> int:
        """Of `count` codes."""
        return count * self.bits // 8

    def numbers(self, codes: torch.Tensor, table: Any, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The levels ``[n, k]`` of `codes`, as they lie. `table` has the sixteen that are an operand, or is None."""
        if self.layout == "bytes":
            return codes.reshape(n, k).to(dtype)
        high, low = codes.reshape(-1) >> 4, codes.reshape(-1) & 15
        if self.layout == "blocks":
            pairs = (n // self.rows, k // 2, self.rows // 2, 2)
            found = torch.cat([low.reshape(pairs), high.reshape(pairs)], 2).permute(0, 2, 1, 3)
        elif self.layout == "tiles":
            sizes = (n // self.rows, k, self.rows // 2)
            found = torch.cat([low.reshape(sizes), high.reshape(sizes)], 2).permute(0, 2, 1)
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
        Coding("table4_blocks", 4, "u8", "blocks", rows=32),
        Coding("uint4_halves", 4, "u8", "halves", rows=2),
        Coding("int4_tiles32", 4, "u8", "tiles", tuple(range(-8, 8)), 32),
        Coding("int4_tiles64", 4, "u8", "tiles", tuple(range(-8, 8)), 64),
    )
}

READ = {"cpu": ("bytes", "pairs", "halves", "blocks", "tiles"), "cuda": ("bytes", "pairs")}
"""Layouts that kernels read, by kinds of devices."""


def spread(numbers: torch.Tensor, n: int, k: int, by_groups: bool = False) -> torch.Tensor:
    """Scales or zeros ``[n, 1]``, or ``[n, k]`` where groups of columns have their own."""
    each = numbers.reshape(-1, n).T if by_groups else numbers.reshape(n, -1)
    return each if each.shape[1] == 1 else each.repeat_interleave(k // each.shape[1], 1)


def plain_scales(scales: torch.Tensor, levels: Any, outer: Any, offset: Any, dtype: torch.dtype) -> torch.Tensor:
    """Scales as numbers, where they are coded."""
    if levels is None:
        return scales.to(dtype)
    found = levels.to(dtype)[scales.reshape(-1).long()]
    return found * outer.to(dtype).reshape(-1).repeat_interleave(OUTER)[: len(found)] + offset.to(dtype)


class Packed(NamedTuple):
    """``W x``, W ``[n, k]`` kept as `codes` of the coding of that name. Columns share a scale by `group`, those of a
    whole row where that is k. Without `scales`, W is the codes' levels.

    - `codes`: int8 or uint8, ``n k`` or, of 4 bits, ``n k / 2``;
    - `table`: fp32, the 16 levels of a coding whose levels are an operand;
    - `scales`, ``n k / group``: fp32, bf16, fp16, times the number `factor`; or uint8, which with `levels` (fp32, 256),
      `outer` (fp32, one for `OUTER` scales) and `offset` (fp32, one) stand for numbers; twice as many where the coding
      is `shifted`;
    - `zeros`, as many as scales: fp32, bf16, fp16 or int8;
    - `order`, int32, k, of ``tiles``: the feature of x that a column is multiplied by, where that is not the column's
      own (GPTQ, whose groups may be of columns that are alike: Frantar et al. 2023, "act-order").

    Each may have any shape of as many numbers.
    """

    codes: Annotated[Leaf, Place("weight", "w", "flat", "base")]
    n: int
    k: int
    coding: str
    group: int
    table: Annotated[Leaf | None, Place("table", "wt", "flat", "base")] = None
    scales: Annotated[Leaf | None, Place("scales", "ws", "flat", "base")] = None
    zeros: Annotated[Leaf | None, Place("zeros", "wz", "flat", "base")] = None
    levels: Annotated[Leaf | None, Place("levels", "wl", "flat", "base")] = None
    outer: Annotated[Leaf | None, Place("outer", "wo", "flat", "base")] = None
    offset: Annotated[Leaf | None, Place("offset", "wb", "flat", "base")] = None
    factor: float = 1.0
    order: Annotated[Leaf | None, Place("order", "wi", "flat", "base")] = None

    @property
    def kept(self) -> Coding:
        return CODINGS[self.coding]

    @property
    def sizes(self) -> tuple[int, int]:
        """``(n, k)``."""
        return self.n, self.k

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W ``[n, k]``."""
        w = self.kept.numbers(self.codes, self.table, self.n, self.k, dtype)
        if self.zeros is not None:
            w = w - spread(self.zeros.to(dtype), self.n, self.k)
        if self.kept.shifted:
            each = self.scales.to(dtype).reshape(-1, 2)  # type: ignore[union-attr]
            scale, added = (spread(part, self.n, self.k, True) for part in (each[:, 0], each[:, 1]))
            w = w * scale + added
        elif self.scales is not None:
            scales = plain_scales(self.scales, self.levels, self.outer, self.offset, dtype)
            w = w * spread(scales * self.factor, self.n, self.k, self.kept.by_groups)
        if self.order is not None:
            w = torch.zeros_like(w).index_add(1, self.order.reshape(-1) % self.k, w)
        return w

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def features(self, k: Any) -> int:
        """n. Raises `SpecError` where the parts are no weight on k features."""
        return self.n if self.k == k and self._whole() and self._counted() and self._scaled() else int(misfit(self, k))

    def _whole(self) -> bool:
        """Whether rows are whole groups, and groups and rows what kernels take at a time."""
        return self.group > 0 and self.k % self.group == self.group % STEP == self.n % self.kept.rows == 0

    def _counted(self) -> bool:
        """Whether there are as many numbers of each part as there must be."""
        groups = self.n * self.k // self.group
        wanted = {
            "codes": self.kept.bytes_of(self.n * self.k), "table": 16,
            "scales": groups * (1 + self.kept.shifted), "zeros": groups,
            "levels": 256, "outer": -(-groups // OUTER), "offset": 1, "order": self.k,
        }  # fmt: skip
        parts = {name: getattr(self, name) for name in wanted}
        counted = all(math.prod(shape_of(part)) == wanted[name] for name, part in parts.items() if part is not None)
        coded = [part for part in (self.table, self.levels, self.outer, self.offset) if part is not None]
        counted = counted and (self.order is None or (self.kept.shifted and dtype_of(self.order) == "i32"))
        return counted and dtype_of(self.codes) == self.kept.dtype and all(dtype_of(part) == "f32" for part in coded)

    def _scaled(self) -> bool:
        """Whether parts that belong together are there together, and as the coding has them."""
        coded = {part is not None for part in (self.levels, self.outer, self.offset)}
        if coded != {self.scales is not None and dtype_of(self.scales) == "u8"}:
            return False
        plain = self.zeros is None and self.factor == 1.0
        if self.kept.by_groups and (self.scales is None or not plain or coded == {True}):
            return False
        return (self.table is not None) == (self.kept.layout == "blocks") and (self.scales is not None or plain)

    def multiplications(self, k: int) -> int:
        return self.n * k

    @property
    def summed_apart(self) -> bool:
        """Whether a C++ kernel sums rows up in memory before adapters join: bytes have codes of rows that do not follow
        each other."""
        return self.kept.by_groups or (self.kept.layout == "halves" and self.n % 8 == 0)

    @property
    def bytes(self) -> int:
        """Of codes, scales and zeros."""
        return sum(type_of(leaf).bytes for _, _, leaf in leaves(self))

    def describe(self) -> str:
        """``Packed[nf4/64 576x576]``: a scale for 64 columns each."""
        return f"Packed[{self.coding}{'' if self.group == self.k else f'/{self.group}'} {self.n}x{self.k}]"

    def formula(self, at: str) -> str:
        return f"W{at} x"

    def text(self) -> str:
        words = [self.coding, f"g={self.group}"]
        given = (("s", self.scales), ("z", self.zeros))
        words += [f"{name}={dtype_of(leaf)}" for name, leaf in given if leaf is not None]
        words += [f"f={self.factor!r}"] * (self.factor != 1.0) + ["ordered"] * (self.order is not None)
        return f"packed({' '.join(words)})"

