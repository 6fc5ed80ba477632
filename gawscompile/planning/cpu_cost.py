"""The cost model of a CPU: seconds per call of each plan, as a sympy expression in m, the number of tokens.

The generated kernel's first tile of tokens takes the longer of its bytes and its operations; later tiles, and the
vendor library's matmul, add the two up.
"""

from __future__ import annotations

import sympy

from gawscompile.codegen.cpp import foldable
from gawscompile.ir.banked import USUAL_RANK
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.planning.devices import Device

UNPACKING = 2e-11
"""Seconds to make a number of a code, by all threads."""

TURNING = 10
"""Operations whose time it takes to turn a number of a weight."""

STRIPE, CHUNK, FOLDED, KEPT = 64, 512, 1280, 16 << 20
"""Columns of a panel. Tokens that meet it at once: at least so many, and so many where ΔW is in it. Bytes of tokens in
fp32 that stay cached from one panel to the next."""

LINES = 128
"""Columns of a weight kept so that are the least work for all threads: a block of them is one's."""

PANELS = 1.15
"""How much faster panels are multiplied than rows, whose sums are horizontal."""

TILE_TOKENS, FIRST_CACHE = 6, 32 << 10
"""Tokens in a tile of the generated kernel, and bytes of first cache that every CPU has."""


def weight_bytes(spec: KernelSpec) -> int:
    """Bytes of the group's base weights."""
    return sum(o.type.bytes for o in spec.operands() if o.of_base)


def adapter_bytes(spec: KernelSpec) -> int:
    """Bytes of the group's factors. Those of a bank are guessed."""
    factors = sum(o.type.bytes for o in spec.operands() if o.factor)
    return factors + sum(p.banked.usual_bytes(spec.k) for p in spec.projections if p.banked)


def _adapter_products(spec: KernelSpec) -> int:
    """Multiplications a token, of all factors. They run on fp32 vectors, whatever the factors' dtype."""
    return sum(term.multiplications(spec.k) for p in spec.projections for term in p.terms[1:])


def cached(k: int, dtype: str) -> float:
    """The share of its rate at which ``gemv_cpp`` multiplies rows of `k` columns: less where a tile of tokens does not
    fit the first cache."""
    return 1.0 if TILE_TOKENS * k * DTYPES[dtype].itemsize <= FIRST_CACHE else 0.8


def gemv(spec: KernelSpec, device: Device, m: sympy.Symbol) -> sympy.Expr:
    """One region. What the first tile of tokens multiplies hides behind its weights' way from memory, or hides that;
    later tiles find the weights in a cache."""
    token = 2 * _adapter_products(spec) / device.kernel_rate["f32"]
    for p in spec.projections:
        if p.packed:
            token += 2 * p.n * spec.k / device.kernel_rate["f32"]
        if p.dense is None:
            continue
        # sums of columns go through the first cache, and are read and written there once in a few rows
        rate = device.kernel_rate[p.weight.dtype] * cached(spec.k, spec.x) * (0.8 if p.transposed else 1.0)
        token += 2 * (max(p.n, LINES) if p.transposed else p.n) * spec.k / rate
    memory = (weight_bytes(spec) + adapter_bytes(spec)) / device.bandwidth
    first = sympy.Min(m, TILE_TOKENS)
    return device.launch + sympy.Max(memory, token * first) + token * (m - first)


def panels(spec: KernelSpec, device: Device, m: sympy.Symbol) -> sympy.Expr:
    """One region. Every weight is turned once, unless it is kept so; then tiles of tokens meet it in fp32. Adapters run
    by rows or, where that is less work, as ΔW that is added to each panel, for each chunk of tokens anew. A bank is
    taken for one mixture of plain adapters. Panels are padded to whole tiles. Tokens that no cache keeps come from
    memory for each panel."""
    size = sum(_padded(p.n) for p in spec.projections) * spec.k
    turned = sum(p.n for p in spec.projections if not p.transposed) * spec.k
    once = (weight_bytes(spec) + adapter_bytes(spec)) / device.bandwidth + TURNING * turned / device.kernel_rate["f32"]
    token = 2 * size / PANELS / device.kernel_rate["f32"]
    delta, factors = foldable(spec)
    for p in spec.projections:
        if p.banked:
            delta, factors = delta + USUAL_RANK * p.n * spec.k, factors + p.banked.multiplications(spec.k)
    adapters = (_adapter_products(spec) - factors) * m + sympy.Min(factors * m, delta * (1 + m / FOLDED))
    if 4 * CHUNK * spec.k > KEPT:
        token += 4 * spec.k * sum(-(-p.n // STRIPE) for p in spec.projections) / device.bandwidth
    return 2 * device.launch + once + m * token + 2 * adapters / device.kernel_rate["f32"]


def _padded(n: int) -> int:
    """Columns that tiles of tokens take the time of: half a panel at least, as fewer columns wait for loads."""
    rest = n % STRIPE
    return n - rest + next(width for width in (0, STRIPE // 2, STRIPE) if rest <= width)


def gemm(spec: KernelSpec, device: Device, m: sympy.Symbol) -> sympy.Expr:
    """The library's matmul per projection, then one region that adds what the product lacks, in place."""
    seconds = sympy.Float(0)
    for p in spec.projections:
        if p.opaque is not None:
            continue
        dtype = p.weight.dtype if p.dense else spec.x
        size = p.n * spec.k * DTYPES[dtype].itemsize
        seconds += device.library_launch + size / device.library_bandwidth[dtype]
        if p.packed:  # it is made dense in memory first
            seconds += device.launch + (size + p.packed.bytes) / device.bandwidth + p.n * spec.k * UNPACKING
        seconds += 2 * m * max(p.n, STRIPE // 2) * spec.k / device.library_rate[dtype]  # few columns fill no registers
    if not all(p.plain for p in spec.projections):
        traffic = 2 * m * sum(p.n * DTYPES[p.out].itemsize for p in spec.projections)
        factors = adapter_bytes(spec) / device.bandwidth
        adapters = factors + 2 * m * _adapter_products(spec) / device.kernel_rate["f32"]
        seconds += device.launch + adapters + traffic / (4 * device.bandwidth)
    return seconds
