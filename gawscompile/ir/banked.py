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

An entry of a negative `ra` is a mode product, ``I_before ⊗ G ⊗ I_after`` (`operators.Mode`): G ``[-ra, rb]`` begins at
``a * UNIT``, `b` is before, and `weight` has after, as a whole number. A Kronecker adapter (GAWS, LoKr) is a chain of
such entries, ``y += scale * M_p … M_1 x`` with the scale of the last. In the others after is negated: the next entry
takes what they make.

A row's first entry has besides, as `same`, the first row of the batch that has the same entries, and as `adapters`, how
many these are. The header's first entry has ``(rows, width, room, 0, …)``: `room` is the most numbers ``A x`` of a row,
all its adapters together, rounded up to whole vectors. What modes make is not in it.

For a GPU, whose kernels want sizes that are known, an adapter lies in blocks of `BLOCK` ranks. Each is an entry of its
own, with A ``[BLOCK, k]`` and B ``[n, BLOCK]``, zeros where ranks are missing. So rb is BLOCK there, and the other
summands take the last columns of the last block. A mode is an entry as on a CPU; what a row's modes pass on to the next
ones of their chains may be `between` numbers of each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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


def between(modes: int, k: int, n: int) -> int:
    """Numbers that the modes of a row can pass on for each token, where a GPU's kernels take chains of `modes`."""
    return max(modes - 1, 0) * max(k, n)


def usual(k: int, n: int, width: int | None) -> tuple[torch.Tensor, int]:
    """A schedule of one row with one adapter of the usual rank, and how many numbers its pool needs: for timing."""
    b = -(-USUAL_RANK * k // UNIT)
    end = b + -(-USUAL_RANK * n // UNIT)
    return pack([[Use(0, b, USUAL_RANK, USUAL_RANK, 1.0, 0.0)]], width or 1), end * UNIT


class Use(NamedTuple):
    """One adapter of one row, or a mode of one, in the order of the fields of an entry."""

    a: int
    b: int
    ra: int
    rb: int
    scale: float
    weight: float
    same: int = 0
    adapters: int = 0

    @property
    def mode(self) -> bool:
        return self.ra < 0

    @property
    def columns(self) -> int:
        """Of B."""
        return 0 if self.mode else self.rb

    @property
    def passed_on(self) -> int:
        """Numbers that it makes for the next mode of its chain."""
        return self.b * self.ra * int(self.weight) if self.mode and self.weight < 0 else 0


def has_bias(use: Use) -> bool:
    return not use.mode and use.rb - use.ra >= 1


def scales_rows(use: Use) -> bool:
    """Whether it is DoRA."""
    return not use.mode and use.rb - use.ra == 2


def modes_of(chain: Sequence[tuple[int, tuple[int, int, int, int]]], scale: float) -> list[Use]:
    """The entries of a chain: for each mode where G begins, in units, and before, G's rows and columns, and after."""
    last = len(chain) - 1
    return [
        Use(begin, before, -rows, columns, scale if i == last else 0.0, after if i == last else -after)
        for i, (begin, (before, rows, columns, after)) in enumerate(chain)
    ]


def uses(schedule: torch.Tensor, row: int) -> Iterator[Use]:
    """The adapters of a row."""
    entries = schedule[1 + row][: int(schedule[1 + row, 0, -1])].contiguous()
    for whole, real in zip(entries.tolist(), entries.view(torch.float32).tolist(), strict=True):
        yield Use._make([*whole[:4], real[4], whole[5] if whole[2] < 0 else real[5], *whole[6:]])


def pack(rows: Sequence[Sequence[Use]], width: int) -> torch.Tensor:
    """The schedule of one module: the adapters of each row, whose `same` follows from them."""
    empty = Use(0, 0, 0, 0, 0.0, 0.0)
    first = [list(rows).index(row) for row in rows]
    room = max((sum(use.columns for use in row) for row in rows), default=0)
    found = torch.zeros(len(rows) + 1, width, FIELDS, dtype=torch.int32)
    found[0, 0, :3] = torch.tensor([len(rows), width, -(-room // PAD) * PAD])
    for number, row in enumerate(rows):
        for i, use in enumerate([*row, *[empty] * (width - len(row))]):
            after = int(use.weight) if use.mode else 0
            whole = use._replace(scale=0, weight=after, same=first[number], adapters=len(row))
            found[number + 1, i] = torch.tensor(whole, dtype=torch.int32)
            real = [use.scale] if use.mode else [use.scale, use.weight]
            found[number + 1, i, 4 : 4 + len(real)] = torch.tensor(real).view(torch.int32)
    return found


def drawn(
    rows: int, width: int, k: int, n: int, generator: torch.Generator, modes: int | None = None
) -> tuple[torch.Tensor, int]:
    """A random schedule for a projection of k to n features, and how many numbers the pool needs. There are adapters
    with a DoRA, with a bias and plain, and chains of one to four modes; a row of as many as it can have, one after the
    other; others of none, one and several; and rows that share. With `modes`, entries for a GPU, in chains of no
    more."""
    blocks = modes is not None

    def number(most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=generator))

    known: list[list[Use]] = []
    end = 0
    for more in (2, 1, 0):
        ra = BLOCK - more if blocks else number(20)
        rb = ra + more
        b = -(-(end + (BLOCK if blocks else ra) * k) // UNIT)
        weight = number(1) - 0.5
        known.append([Use(end // UNIT, b, ra, rb, number(4) / 2 - 0.75, weight)])
        end = -(-(b * UNIT + n * rb) // UNIT) * UNIT
    for sizes in _chains(k, n, number):
        if modes is not None and (len(sizes) > modes or _passed_on(sizes) > between(modes, k, n)):
            continue
        chain = []
        for before, high, wide, after in sizes:
            chain.append((end // UNIT, (before, high, wide, after)))
            end = -(-(end + high * wide) // UNIT) * UNIT
        known.append(modes_of(chain, number(4) / 2 - 0.75))

    def row(most: int, following: bool) -> list[Use]:
        found: list[Use] = []
        at = number(len(known) - 1)
        for i in range(len(known) + most if following else most):
            adapter = known[(at + i) % len(known) if following else number(len(known) - 1)]
            fits = modes is None or sum(use.passed_on for use in found + adapter) <= between(modes, k, n)
            found += adapter if fits and len(found) + len(adapter) <= most else []
        return found

    return pack([row(width, True), *(row(number(width), False) for _ in range(1, rows))][:rows], width), end


def _passed_on(sizes: Sequence[tuple[int, int, int, int]]) -> int:
    return sum(before * rows * after for before, rows, _, after in sizes[:-1])


def _chains(k: int, n: int, number: Callable[[int], int]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Modes that take k features to n, with before, rows, columns and after of each; none that would be large."""

    def divisor(*sizes: int) -> int:
        common = math.gcd(*sizes)
        found = [d for d in range(1, min(common, 256) + 1) if common % d == 0]
        return found[number(len(found) - 1)]

    for among in (lambda d: (d, n // d, k // d, 1), lambda d: (1, n // d, k // d, d)):  # GAWS and GAWS-D
        before, rows, columns, after = among(divisor(k, n))
        if rows * columns <= 32 * (k + n):
            yield [(before, rows, columns, after)]
    m, high, rank, inner = divisor(k), divisor(n), 1 + number(4), 1 + number(2)
    wide, tall = k // m, n // high  # w1 [high, m] ⊗ w2 [tall, wide] (LoKr), with w2 and w1 in two factors or in one
    left = [(1, inner, m, rank), (1, high, inner, rank)]
    if tall * wide <= 32 * (k + n):
        yield [(1, high, m, wide), (high, tall, wide, 1)]
    yield [(m, rank, wide, 1), (1, high, m, rank), (high, tall, rank, 1)]
    yield [(m, rank, wide, 1), *left, (high, tall, rank, 1)]


def apply(
    x: torch.Tensor, pool: torch.Tensor, schedule: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What the bank adds to `base`, ``W x`` or with a `bias` ``W x + bias``, in plain torch: x ``[..., k]`` and base
    ``[..., n]`` → ``[..., n]`` of the dtype that holds both base and pool. Tokens are the rows of the batch one after
    the other. Raises `ValueError` where they are no whole rows."""
    rows, k, n = len(schedule) - 1, x.shape[-1], base.shape[-1]
    wide = torch.promote_types(base.dtype, pool.dtype)
    if rows == 0:
        return pool.new_zeros((*x.shape[:-1], n), dtype=wide)
    tokens = x.reshape(-1, k).to(pool.dtype)
    if len(tokens) % rows:
        raise ValueError(f"{len(tokens)} tokens are no {rows} rows of a batch: a bank's adapters are given by row")
    batch = tokens.unflatten(0, (rows, len(tokens) // rows))
    made = base.reshape(*batch.shape[:2], n)
    sums = []
    for row in range(rows):
        total = batch.new_zeros(batch.shape[1], n, dtype=wide)
        z = batch[row]
        for use in uses(schedule, row):
            if use.mode:
                g = pool[use.a * UNIT :][: -use.ra * use.rb].view(-use.ra, use.rb)
                axes = z.unflatten(-1, (use.b, use.rb, abs(int(use.weight))))
                z = torch.einsum("oi,...bia->...boa", g, axes).flatten(-3)
                if use.weight > 0:
                    total, z = total + z * use.scale, batch[row]
                continue
            a = pool[use.a * UNIT :][: use.ra * k].view(use.ra, k)
            b = pool[use.b * UNIT :][: n * use.rb].view(n, use.rb)
            total = total + F.linear(F.linear(batch[row], a), b[:, : use.ra]) * use.scale
            if has_bias(use):
                total = total + b[:, use.ra] * use.weight
            if scales_rows(use):
                product = made[row] if bias is None else made[row] - bias
                total = total + product.to(wide) * b[:, use.ra + 1].to(wide) * use.weight
        sums.append(total)
    return torch.stack(sums).reshape(*x.shape[:-1], n)
