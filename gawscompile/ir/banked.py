"""How an adapter bank lies in memory, and what it adds to a projection.

The factors of all resident adapters lie in one `pool`, a vector of one dtype, wherever there is room. A `schedule` says
for one forward and one module which of them each row of a batch uses: ``[rows + 1, width, FIELDS]`` of int32, for each
row up to `width` adapters, and before them a header. Kernels read it in every call, so switching, mixing and scaling
adapters changes numbers in it, and nothing that was compiled.

An entry is a `Use`: A ``[ra, k]`` begins at ``a * UNIT`` in the pool and B ``[n, rb]`` at ``b * UNIT``, and

    y += scale * B[:, :ra] (A x) + weight * B[:, ra] + weight * B[:, ra + 1] * (W x)

``rb - ra`` is 0, 1 or 2: how many of the last two summands are there. The second is the adapter's bias. The third is
DoRA's (Liu et al. 2024, eq. 5): its column of B is ``c - 1``, which scales the base's product without the base's bias,
and B's first columns have been multiplied by c.

A row's first entry has besides, as `same`, the first row of the batch that has the same entries, and as `adapters`, how
many these are. The header's first entry has ``(rows, width, room, 0, …)``: `room` is the most numbers ``A x`` of a row,
all its adapters together, rounded up to whole vectors.

For a GPU, whose kernels want sizes that are known, an adapter lies in blocks of `BLOCK` ranks. Each is an entry of its
own, with A ``[BLOCK, k]`` and B ``[n, BLOCK]``, zeros where ranks are missing. So rb is BLOCK there, and the other
summands take the last columns of the last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

FIELDS = 8
UNIT = 32
"""Numbers: all factors begin at a multiple, and so on a cache line."""

BLOCK = 16
"""Ranks of an entry for a GPU: the least edge of a matrix product there."""

PAD = 16
"""`room` is a multiple of a vector of fp32."""

USUAL_RANK = 16
"""What the cost model takes the rank of a row's adapters for: when a graph is compiled nobody knows it."""


def usual_bytes(dtype: torch.dtype, k: int, n: int) -> int:
    """Of one adapter's factors, for the cost model."""
    return dtype.itemsize * USUAL_RANK * (k + n)


class Use(NamedTuple):
    """One adapter of one row, in the order of the fields of an entry."""

    a: int
    b: int
    ra: int
    rb: int
    scale: float
    weight: float
    same: int = 0
    adapters: int = 0


def has_bias(use: Use) -> bool:
    return use.rb - use.ra >= 1


def scales_rows(use: Use) -> bool:
    """Whether it is DoRA."""
    return use.rb - use.ra == 2


def uses(schedule: torch.Tensor, row: int) -> Iterator[Use]:
    """The adapters of a row."""
    entries = schedule[1 + row][: int(schedule[1 + row, 0, -1])].contiguous()
    for whole, real in zip(entries.tolist(), entries.view(torch.float32).tolist(), strict=True):
        yield Use(*whole[:4], *real[4:6], *whole[6:])


def pack(rows: Sequence[Sequence[Use]], width: int) -> torch.Tensor:
    """The schedule of one module: the adapters of each row, whose `same` follows from them."""
    empty = Use(0, 0, 0, 0, 0.0, 0.0)
    first = [list(rows).index(row) for row in rows]
    room = max((sum(use.rb for use in row) for row in rows), default=0)
    found = torch.zeros(len(rows) + 1, width, FIELDS, dtype=torch.int32)
    found[0, 0, :3] = torch.tensor([len(rows), width, -(-room // PAD) * PAD])
    for number, row in enumerate(rows):
        for i, use in enumerate([*row, *[empty] * (width - len(row))]):
            whole = use._replace(scale=0, weight=0, same=first[number], adapters=len(row))
            found[number + 1, i] = torch.tensor(whole, dtype=torch.int32)
            found[number + 1, i, 4:6] = torch.tensor([use.scale, use.weight]).view(torch.int32)
    return found


def drawn(
    rows: int, width: int, k: int, n: int, generator: torch.Generator, blocks: bool = False
) -> tuple[torch.Tensor, int]:
    """A random schedule for a projection of k to n features, and how many numbers the pool needs. There are adapters
    with a DoRA, with a bias and plain; a row of as many as it can have, in this order; others of none, one and several;
    and rows that share. With `blocks`, entries for a GPU."""

    def number(most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=generator))

    known, end = [], 0
    for more in (2, 1, 0):
        ra = BLOCK - more if blocks else number(20)
        rb = ra + more
        b = -(-(end + (BLOCK if blocks else ra) * k) // UNIT)
        weight = number(1) - 0.5
        known.append(Use(end // UNIT, b, ra, rb, number(4) / 2 - 0.75, weight))
        end = -(-(b * UNIT + n * rb) // UNIT) * UNIT
    others = [[known[number(2)] for _ in range(number(width))] for _ in range(1, rows)]
    return pack([[known[i % 3] for i in range(width)], *others][:rows], width), end


def apply(
    x: torch.Tensor, pool: torch.Tensor, schedule: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What the bank adds to `base`, ``W x`` or with a `bias` ``W x + bias``, in plain torch: x ``[..., k]`` and base
    ``[..., n]`` → ``[..., n]`` of the pool's dtype. Tokens are the rows of the batch one after the other. Raises
    `ValueError` where they are no whole rows."""
    rows, k, n = len(schedule) - 1, x.shape[-1], base.shape[-1]
    if rows == 0:
        return pool.new_zeros((*x.shape[:-1], n))
    tokens = x.reshape(-1, k).to(pool.dtype)
    if len(tokens) % rows:
        raise ValueError(f"{len(tokens)} tokens are no {rows} rows of a batch: a bank's adapters are given by row")
    batch = tokens.unflatten(0, (rows, len(tokens) // rows))
    made = base.reshape(*batch.shape[:2], n)
    sums = []
    for row in range(rows):
        total = batch.new_zeros(batch.shape[1], n)
        for use in uses(schedule, row):
            a = pool[use.a * UNIT :][: use.ra * k].view(use.ra, k)
            b = pool[use.b * UNIT :][: n * use.rb].view(n, use.rb)
            total = total + F.linear(F.linear(batch[row], a), b[:, : use.ra]) * use.scale
            if has_bias(use):
                total = total + b[:, use.ra] * use.weight
            if scales_rows(use):
                product = made[row] if bias is None else made[row] - bias
                total = total + product.to(pool.dtype) * b[:, use.ra + 1] * use.weight
        sums.append(total)
    return torch.stack(sums).reshape(*x.shape[:-1], n)
