"""A plan table: for m tokens in this range, this plan. And a program: a table with the spec it is for.

A program is what the op takes as its one string argument: ``gemv_cpp<=24, gemm_accumulate | k=576 x=bf16; …``.
The op picks the row at run time, so a symbolic m needs no guard.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, get_args

from gawscompile.codegen.spec import KernelSpec, SpecError

Plan = Literal["gemv_cpp", "gemm_accumulate"]
PLANS: tuple[str, ...] = get_args(Plan)


@dataclass(frozen=True)
class PlanTable:
    """Rows ``(plan, last m)``, in rising order of m; the last row has no bound (None)."""

    rows: tuple[tuple[str, int | None], ...]

    def __post_init__(self) -> None:
        bounds = [bound for _, bound in self.rows]
        rising = all(a is not None and (b is None or a < b) for a, b in itertools.pairwise(bounds))
        if not self.rows or bounds[-1] is not None or not rising or any(plan not in PLANS for plan, _ in self.rows):
            raise SpecError(f"not a plan table: {self.rows}")

    def __str__(self) -> str:
        return ", ".join(plan if bound is None else f"{plan}<={bound}" for plan, bound in self.rows)

    def pick(self, m: int) -> str:
        """The plan that runs `m` tokens."""
        return next(plan for plan, bound in self.rows if bound is None or m <= bound)

    @staticmethod
    def parse(text: str) -> PlanTable:
        rows: list[tuple[str, int | None]] = []
        for row in text.split(", "):
            match = re.fullmatch(r"(\w+)(?:<=(\d+))?", row)
            if match is None:
                raise SpecError(f"not a plan table: {text!r}")
            rows.append((match[1], int(match[2]) if match[2] else None))
        return PlanTable(tuple(rows))


@dataclass(frozen=True)
class Program:
    """A planned group: which plan runs for which m, and the spec of its kernels."""

    table: PlanTable
    spec: KernelSpec

    def __str__(self) -> str:
        return f"{self.table} | {self.spec}"

    @staticmethod
    def parse(text: str) -> Program:
        table, _, spec = text.partition(" | ")
        return Program(PlanTable.parse(table), KernelSpec.parse(spec))
