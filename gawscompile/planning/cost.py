"""The plan table of a group: the cost model, evaluated.

Each target knows the cost of its plans, seconds per call as a sympy expression in m, the number of tokens
(`cpu_cost`, `gpu_cost`). Crossovers are found by evaluating the expressions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import sympy

from gawscompile import cache
from gawscompile.ir.spec import KernelSpec
from gawscompile.planning import devices
from gawscompile.planning.devices import Device, Gpu
from gawscompile.planning.table import PlanTable
from gawscompile.planning.targets import Target, target_of

m = sympy.Symbol("m", integer=True, positive=True)

LONGEST = 1 << 16
"""Beyond so many tokens the last row of a table goes on."""


@dataclass(frozen=True)
class Planned:
    """A group's plan table and why: each plan's cost in seconds, in `m`."""

    table: PlanTable
    target: Target
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
    target = target_of(device)
    costs = target.costs(spec, device, m)
    return Planned(_table(costs), target, cache.digest(str(spec))[:12], costs)


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
