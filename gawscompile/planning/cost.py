"""The cost model: seconds per call of each plan, as a sympy expression in m, the number of tokens.

The generated kernel's first tile of tokens takes the longer of its bytes and its operations; later tiles, and the
vendor library's matmul, add the two up. Crossovers are found by evaluating the expressions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import sympy

from gawscompile import cache
from gawscompile.ir.spec import DTYPES, KernelSpec
from gawscompile.planning import devices, gpu_cost
from gawscompile.planning.devices import Device, Gpu
from gawscompile.planning.table import PlanTable

m = sympy.Symbol("m", integer=True, positive=True)

TILE_TOKENS, FIRST_CACHE = 6, 32 << 10
"""Tokens in a tile of the generated kernel, and bytes of first cache that every CPU has."""

LONGEST = 1 << 16
"""Beyond so many tokens the last row of a table goes on."""


@dataclass(frozen=True)
class Planned:
    """A group's plan table and why: each plan's cost in seconds, in `m`."""

    table: PlanTable
    emitter: str
    kernel: str
    costs: dict[str, sympy.Expr] = field(hash=False)

    def seconds(self, plan: str, tokens: int) -> float:
        return float(self.costs[plan].subs(m, tokens))

    def compare(self, tokens: object) -> str:
        """The plans' estimates for `tokens`, in words."""
        if not isinstance(tokens, int):
            return f"for {tokens} tokens"
        return ", ".join(f"{name} {self.seconds(name, tokens) * 1e6:.0f} µs" for name in self.costs)


def plan(spec: KernelSpec, device: Device | Gpu | None = None) -> Planned:
    """The plan table of a group on `device` (by default this CPU)."""
    return _plan(spec, device or devices.cpu())


@functools.lru_cache(maxsize=1024)
def _plan(spec: KernelSpec, device: Device | Gpu) -> Planned:
    if isinstance(device, Gpu):
        costs = gpu_cost.costs(spec, device, m)
        return Planned(_table(costs), "triton", cache.digest(str(spec))[:12], costs)
    costs = {"gemv_cpp": _gemv(spec, device)}
    if library_takes(spec):
        costs["gemm_accumulate"] = _gemm(spec, device)
    return Planned(_table(costs), "cpp", cache.digest(str(spec))[:12], costs)


def library_takes(spec: KernelSpec) -> bool:
    """Whether the vendor library can multiply the bases of `spec`: activation, weight and product have one dtype."""
    return all(p.dtype is None or spec.x == p.dtype == p.out for p in spec.projections)


def _size(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def weight_bytes(spec: KernelSpec) -> int:
    """Bytes of the group's base weights."""
    return sum(p.n * spec.k * _size(p.dtype) for p in spec.projections if p.dtype)


def adapter_bytes(spec: KernelSpec) -> int:
    """Bytes of the group's factors."""
    lowrank = sum(t.rank * (spec.k + p.n) * _size(t.dtype) for p in spec.projections for t in p.lowrank)
    given = sum(t.rank * p.n * _size(t.dtype) for p in spec.projections for t in p.given)
    kronecker = [(mode, term.dtype) for p in spec.projections for term in p.kronecker for mode in term.modes]
    return lowrank + given + sum(math.prod(mode.shape) * _size(dtype) for mode, dtype in kronecker)


def _adapter_products(spec: KernelSpec) -> int:
    """Multiplications a token, of all factors. They run on fp32 vectors, whatever the factors' dtype."""
    products = sum(t.rank * (spec.k + p.n) for p in spec.projections for t in p.lowrank)
    products += sum(t.rank * p.n for p in spec.projections for t in p.given)
    return products + sum(mode.multiplications for p in spec.projections for t in p.kronecker for mode in t.modes)


def _gemv(spec: KernelSpec, device: Device) -> sympy.Expr:
    """One region. What the first tile of tokens multiplies hides behind its weights' way from memory, or hides that;
    later tiles find the weights in a cache."""
    token = 2 * _adapter_products(spec) / device.kernel_rate["f32"]
    for p in spec.projections:
        if p.dtype is None:
            continue
        # bf16's dot products eat twice what fp32's do: only there do tiles from the second cache slow them down
        fits = p.dtype == "f32" or TILE_TOKENS * spec.k * _size(spec.x) <= FIRST_CACHE
        # sums of columns go through the first cache, and are read and written there once in a few rows
        rate = device.kernel_rate[p.dtype] * (1.0 if fits else 0.8) * (0.8 if p.transposed else 1.0)
        token += 2 * p.n * spec.k / rate
    memory = (weight_bytes(spec) + adapter_bytes(spec)) / device.bandwidth
    first = sympy.Min(m, TILE_TOKENS)
    return device.launch + sympy.Max(memory, token * first) + token * (m - first)


def _gemm(spec: KernelSpec, device: Device) -> sympy.Expr:
    """The library's matmul per projection, then one region that adds what the product lacks, in place."""
    seconds = sympy.Float(0)
    for p in spec.projections:
        if p.dtype is None:
            continue
        bytes_ = p.n * spec.k * _size(p.dtype)
        seconds += device.library_launch + bytes_ / device.library_bandwidth[p.dtype]
        seconds += 2 * m * p.n * spec.k / device.library_rate[p.dtype]
    if any(p.adapted or p.bias or p.residual for p in spec.projections):
        traffic = 2 * m * sum(p.n * _size(p.out) for p in spec.projections)
        factors = adapter_bytes(spec) / device.bandwidth
        adapters = factors + 2 * m * _adapter_products(spec) / device.kernel_rate["f32"]
        seconds += device.launch + adapters + traffic / (4 * device.bandwidth)
    return seconds


def _table(costs: dict[str, sympy.Expr]) -> PlanTable:
    """The cheapest plan for every m, as ranges. Crossovers lie between powers of two and are bisected."""
    timed = {name: sympy.lambdify(m, cost, "math") for name, cost in costs.items()}

    def best(tokens: int) -> str:
        return min(timed, key=lambda name: timed[name](tokens))

    rows: list[tuple[str, int | None]] = []
    low = 1
    while low < LONGEST:
        high = 2 * low
        here, there = best(low), best(high)
        if here != there:
            inside, outside = low, high
            while outside - inside > 1:
                middle = (inside + outside) // 2
                inside, outside = (middle, outside) if best(middle) == here else (inside, middle)
            rows.append((here, inside))
        low = high
    rows.append((best(LONGEST), None))
    return PlanTable(tuple(rows))
