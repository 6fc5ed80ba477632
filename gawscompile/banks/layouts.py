"""How the factors of one module's adapter lie in the pool (`ir.banked`): whole for CPUs, in blocks of ranks for GPUs.

Either way they are *parts*, each an entry of a schedule with a run of the pool for A and one for B. On a CPU there is
one part. On a GPU each has `BLOCK` columns, of which the last part's last are the bias and DoRA's, if there are such;
what ranks a part has not are zeros. A Kronecker adapter has an entry for each mode, with a run for its factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gawscompile.banks.checkpoints import Factors
from gawscompile.banks.kronecker import Chain
from gawscompile.banks.opening import BankError
from gawscompile.ir.banked import BLOCK, FIELDS, UNIT, modes_of, pack
from gawscompile.ir.operators import Mode


class Part(NamedTuple):
    """Ranks from `start` on, `real` of them; the entry's `ra` and `rb` (columns of B)."""

    start: int
    real: int
    ra: int
    rb: int


def parts(rank: int, more: int, blocks: bool) -> list[Part]:
    """The parts of an adapter of a rank with `more` columns behind B's: none, a bias, or a bias and DoRA's."""
    if not blocks:
        return [Part(0, rank, rank, rank + more)]
    found = [Part(start, min(BLOCK, rank - start), BLOCK, BLOCK) for start in range(0, rank, BLOCK)]
    if more:
        last = found.pop() if found and found[-1].real <= BLOCK - more else Part(rank, 0, 0, 0)
        found.append(Part(last.start, last.real, BLOCK - more, BLOCK))
    return found


def more(factors: Factors) -> int:
    """Columns of B in the pool beside its own: one where there is a bias, two where it is DoRA."""
    return 2 if factors.scaled is not None else 0 if factors.bias is None else 1


def count(factors: Factors | Chain, blocks: bool) -> int:
    """Entries that it takes of a row."""
    return len(factors.modes) if isinstance(factors, Chain) else len(parts(factors.rank, more(factors), blocks))


def no_place(who: str, entries: int, width: int, blocks: bool) -> BankError:
    """A row of the bank has place for `width` entries, and `who` takes more."""
    what, limit = (f"blocks of {BLOCK} ranks, or modes", "max_ranks") if blocks else ("modes", "max_modes")
    return BankError(f"{who}: {entries} {what}, and a row of this bank has place for {width}: AdapterBank({limit}=…)")


def runs(factors: Factors | Chain, blocks: bool) -> list[int]:
    """How many numbers of the pool each A and B takes, or each mode's factor."""
    if isinstance(factors, Chain):
        return [mode.matrix.numel() for mode in factors.modes]
    (rank, k), n = factors.a.shape, factors.b.shape[0]
    found = parts(rank, more(factors), blocks)
    return [size for part in found for size in (_rows(part, blocks) * k, n * part.rb)]


def fill(pool: Tensor, begins: Iterator[int], factors: Factors | Chain, blocks: bool) -> np.ndarray:
    """Copy the factors to where their runs begin: the entries, ``[parts, FIELDS]``. Raises `OverflowError` for numbers
    that are too large for the pool's dtype."""
    if isinstance(factors, Chain):
        return _fill_chain(pool, begins, factors)
    (rank, k), n = factors.a.shape, factors.b.shape[0]
    found = parts(rank, more(factors), blocks)
    entries = np.zeros((len(found), FIELDS), np.int32)
    numbers = np.array([factors.scale, 1.0], np.float32).view(np.int32)
    for entry, part in zip(entries, found, strict=True):
        a, b, end = next(begins), next(begins), part.start + part.real
        first, columns = _views(pool, a, b, part, k, n, blocks)
        if part.real < len(first) or part.rb > part.real:
            first.zero_()
            columns.zero_()
        first[: part.real].copy_(factors.a[part.start : end])
        columns[:, : part.real].copy_(factors.b[:, part.start : end])
        if part.rb > part.ra and factors.bias is not None:
            columns[:, part.ra].copy_(factors.bias)
        if part.rb > part.ra + 1 and factors.scaled is not None:
            columns[:, part.ra + 1].copy_(factors.scaled.c - 1)
        # whatever is masked is multiplied by zero, so one adapter's infinity would be another row's NaN
        if not (first.isfinite().all() and columns.isfinite().all()):
            raise OverflowError("factors beyond the pool's dtype")
        entry[:6] = a // UNIT, b // UNIT, part.ra, part.rb, *numbers
    return entries


def taken(
    pool: Tensor, entries: np.ndarray, rank: int, sizes: tuple[int, int], blocks: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A ``[rank, k]``, B ``[n, rank]`` and the bias of what `fill` has put there: views of the pool, or copies where
    there are several parts."""
    (n, k), used = sizes, [entry for entry in entries if entry[3]]
    extra = int(used[-1][3] - used[-1][2])
    firsts, columns, bias = [], [], None
    for entry, part in zip(used, parts(rank, extra, blocks), strict=True):
        first, wide = _views(pool, int(entry[0]) * UNIT, int(entry[1]) * UNIT, part, k, n, blocks)
        firsts.append(first[: part.real])
        columns.append(wide[:, : part.real])
        bias = wide[:, part.ra] if part.rb > part.ra else None
    if len(used) == 1:
        return firsts[0], columns[0], bias
    return torch.cat(firsts), torch.cat(columns, dim=1), bias


def _fill_chain(pool: Tensor, begins: Iterator[int], chain: Chain) -> np.ndarray:
    found = []
    for before, matrix, after in chain.modes:
        begin, (rows, columns) = next(begins), matrix.shape
        own = pool[begin:][: matrix.numel()].view(rows, columns)
        own.copy_(matrix)
        if not own.isfinite().all():
            raise OverflowError("factors beyond the pool's dtype")
        found.append((begin // UNIT, (before, rows, columns, after)))
    entries: np.ndarray = pack([modes_of(found, chain.scale)], len(found))[1].numpy()
    return entries


def modes_in(pool: Tensor, entries: np.ndarray) -> tuple[tuple[Mode, ...], float]:
    """The modes of a chain, views of the pool, and its scale."""
    used = [entry for entry in entries if entry[3]]
    modes = tuple(
        Mode(int(before), pool[int(begin) * UNIT :][: -rows * columns].view(-rows, columns), abs(int(after)))
        for begin, before, rows, columns, _, after, *_ in (entry.tolist() for entry in used)
    )
    return modes, float(used[-1].view(np.float32)[4])


def _rows(part: Part, blocks: bool) -> int:
    return BLOCK if blocks else part.ra


def _views(pool: Tensor, a: int, b: int, part: Part, k: int, n: int, blocks: bool) -> tuple[Tensor, Tensor]:
    rows = _rows(part, blocks)
    return pool[a:][: rows * k].view(rows, k), pool[b:][: n * part.rb].view(n, part.rb)
