"""A plan table: for m tokens in this range, this plan. And a program: a table with the spec it is for.

A program is what the op takes as its one string argument: ``gemv_cpp<=24, gemm_accumulate | k=576 x=bf16; …``, or
``triton single_launch[8]<=2, fused_tile<=96, gemm_accumulate | …`` for a GPU. The op picks the row at run time, so a
symbolic m needs no guard.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

from gawscompile.codegen import triton
from gawscompile.codegen.spec import KernelSpec, SpecError

CPP_PLANS = ("gemv_cpp", "gemm_accumulate")


@dataclass(frozen=True)
class PlanTable:
    """Rows ``(plan, last m)``, in rising order of m; the last row has no bound (None)."""

    rows: tuple[tuple[str, int | None], ...]

    def __post_init__(self) -> None:
        bounds = [bound for _, bound in self.rows]
        rising = all(a is not None and (b is None or a < b) for a, b in itertools.pairwise(bounds))
        if not self.rows or bounds[-1] is not None or not rising:
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
            match = re.fullmatch(r"(\w+(?:\[\d+\])?)(?:<=(\d+))?", row)
            if match is None:
                raise SpecError(f"not a plan table: {text!r}")
            rows.append((match[1], int(match[2]) if match[2] else None))
        return PlanTable(tuple(rows))


@dataclass(frozen=True)
class Program:
    """A planned group: which plan runs for which m, the spec of its kernels, and the emitter that prints them.

    `tuned`: Triton's autotuner has the last word (``triton autotuned single_launch[8] | …``).
    """

    table: PlanTable
    spec: KernelSpec
    emitter: str = "cpp"
    tuned: bool = False

    def __post_init__(self) -> None:
        for plan, _ in self.table.rows:
            if self.emitter == "triton":
                triton.Plan.parse(plan)
            elif plan not in CPP_PLANS or self.emitter != "cpp" or self.tuned:
                raise SpecError(f"not a plan of the emitter {self.emitter}: {plan}")

    def __str__(self) -> str:
        return f"{self.prefix}{self.table} | {self.spec}"

    @property
    def prefix(self) -> str:
        """What comes before the table."""
        return "triton " * (self.emitter == "triton") + "autotuned " * self.tuned

    def triton_plan(self, m: int) -> triton.Plan:
        """The plan that runs `m` tokens on a GPU."""
        return triton.Plan.parse(self.table.pick(m))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Program:
        """The program that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        table, _, spec = text.partition(" | ")
        match = re.fullmatch("(triton )?(autotuned )?(.*)", table)
        assert match is not None
        emitter = "triton" if match[1] else "cpp"
        return Program(PlanTable.parse(match[3]), KernelSpec.parse(spec), emitter, bool(match[2]))
