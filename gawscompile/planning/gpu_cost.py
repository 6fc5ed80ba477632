"""The cost model of a GPU: seconds per call of each Triton plan, in m, the number of tokens.

A decode plan is bound by memory. What it reaches of the bandwidth follows from the programs that fit on the device at
once: their loads in flight must cover the latency (Little's law), and the last wave of programs should be a full one.
That is what chooses the rows per program. A plan for many tokens pays its bytes and its operations, whichever is more.
Nothing here was measured on a device yet: the numbers rank plans, and are called predicted wherever they are shown.
`gawscompile calibrate` fits the constants of `devices.Gpu` to a card.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import sympy

from gawscompile.codegen import triton
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning.devices import Gpu

RESIDENT, RESIDENT_TILES = 8, 4
"""Programs that share a multiprocessor: of a decode kernel with up to 64 registers and 128 threads, and of a tile."""

IN_FLIGHT = 8192
"""Bytes of weights that a program keeps in flight: four loads of 16 bytes in each thread of four warps."""

TILE_STEPS = 128
"""Columns of W that a tile keeps in flight: two steps of 64 while a third is multiplied."""

UNPACKING = {8: 16, 4: 80}
"""Operations of the vector units that make a number of a code, by its bits, counted as if they were multiplications and
additions of fp32: a cast at an eighth of their rate, or some twenty choices and tests at half. Counted, not measured.
"""


def seconds(spec: KernelSpec, plan: triton.Plan, gpu: Gpu, m: sympy.Symbol | int) -> Any:
    """Of one call by `plan`: an expression in the symbol `m`, or a number where `m` is one."""
    weights, factors = operand_bytes(spec)
    work = 2 * spec.k * sum(p.n for p in spec.projections)
    launches = triton.launches(spec, plan)
    overhead = len(launches) * gpu.launch
    if plan.style.uses_library:
        outputs = m * sum(p.n * DTYPES[p.out].itemsize for p in spec.projections)
        library = _most(weights / (gpu.tensor_share * gpu.bandwidth), _matrix(spec, gpu.library_share, gpu, m, work))
        return overhead + len(spec.projections) * gpu.launch + library + (factors + 2 * outputs) / gpu.bandwidth
    programs, tiles, rows = list(launches.values())[-1], plan.rows is None, plan.rows or 1
    seats = gpu.multiprocessors * (RESIDENT_TILES if tiles else RESIDENT)
    flying = TILE_STEPS * weights / (programs * spec.k) if tiles else IN_FLIGHT
    share = min(1.0, min(programs, seats) * flying / (gpu.bandwidth * gpu.latency))
    waves = math.ceil(programs / seats) if tiles else _ceiling(m, programs, seats)
    overhead += waves * gpu.latency
    streamed = (weights + factors) / (gpu.bandwidth * share)
    if tiles:
        streamed /= gpu.tensor_share
        again = _most(m / 64 - 1, 0) * weights / gpu.cache_bandwidth  # every tile of tokens reads all of W
        unpacked = _most(m / 64, 1) * unpacking(spec) / gpu.vector_rate if unpacking(spec) else 0  # and unpacks it
        return overhead + _most(streamed + again, _matrix(spec, gpu.tile_share, gpu, m, work)) + unpacked
    work += unpacking(spec)
    taken = overhead + streamed + (m - 1) * weights / gpu.cache_bandwidth + m * work / gpu.vector_rate
    if plan.style.keeps_state:
        taken += gpu.publish
    if plan.style.repeats_shrink:  # a program reads the A's of its own projection
        a = [(p.n, t.rank * DTYPES[t.dtype].itemsize) for p in spec.projections for t in p.lowrank]
        taken += m * sum(-(-n // rows) * spec.k * column for n, column in a) / gpu.cache_bandwidth
    return taken


@functools.lru_cache(maxsize=4096)
def unpacking(spec: KernelSpec) -> int:
    """Operations that make numbers of all codes of the bases, once."""
    return sum(UNPACKING[p.packed.kept.bits] * p.n * spec.k for p in spec.projections if p.packed)


@functools.lru_cache(maxsize=4096)
def operand_bytes(spec: KernelSpec) -> tuple[int, int]:
    """Of base weights, packed ones with their scales, and of factors. Those of a bank are guessed."""
    weights = sum(p.packed.bytes if p.packed else p.weight.bytes for p in spec.projections)
    factors = sum(o.type.bytes for o in spec.operands() if o.factor)
    return weights, factors + sum(p.banked.usual_bytes(spec.k) for p in spec.projections if p.banked)


def _matrix(spec: KernelSpec, share: float, gpu: Gpu, m: sympy.Symbol | int, work: int) -> Any:
    """Time of the products alone; tiles of tokens have an edge of at least 16."""
    return _most(m, 16) * work / (share * gpu.matrix_rate[spec.x])


def _most(left: Any, right: Any) -> Any:
    """The larger; fitting constants evaluates numbers by the million, for which sympy is slow."""
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    return max(left, right) if numbers else sympy.Max(left, right)


def _ceiling(m: sympy.Symbol | int, programs: int, seats: int) -> Any:
    """Waves of `m` times as many programs."""
    return -(-m * programs // seats) if isinstance(m, int) else sympy.ceiling(m * sympy.Rational(programs, seats))
