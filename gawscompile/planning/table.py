"""A plan table: for m tokens in this range, this plan. And a program: a table with the spec it is for.

A program is what the op takes as its one string argument: ``gemv_cpp<=24, gemm_accumulate | k=576 x=bf16; …``, or
``triton single_launch[8]<=2, fused_tile<=96, gemm_accumulate | …`` for a GPU. The op picks the row at run time, so a
symbolic m needs no guard.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gawscompile.codegen import cpp, triton
from gawscompile.codegen.cpp_sums import SUMMED
from gawscompile.ir.spec import KernelSpec, Operand, SpecError

T = TypeVar("T")


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
class Derived:
    """The operand at `operand` is no argument of the op, but computed by `recipe` from the arguments at `sources`."""

    operand: int
    sources: tuple[int, ...]
    recipe: str


@dataclass(frozen=True)
class Program:
    """A planned group: which plan runs for which m, the spec of its kernels, and the emitter that prints them.

    `tuned`: Triton's autotuner has the last word (``triton autotuned single_launch[8] | …``). `derived`: operands that
    are hoisted (``… | k=576 x=bf16; … | [[2,[0,1],"[…"]]``).
    """

    table: PlanTable
    spec: KernelSpec
    emitter: str = "cpp"
    tuned: bool = False
    derived: tuple[Derived, ...] = ()

    def __post_init__(self) -> None:
        if self.derived and self.emitter != "cpp":
            raise SpecError(f"nothing is hoisted on a GPU: {self.spec}")
        for plan, _ in self.table.rows:
            if self.emitter == "triton":
                triton.Plan.parse(plan)
            elif plan not in cpp.PLANS or self.emitter != "cpp" or self.tuned:
                raise SpecError(f"not a plan of the emitter {self.emitter}: {plan}")

    def __str__(self) -> str:
        return f"{self.prefix}{self.table} | {self.spec}{self.suffix}"

    @property
    def suffix(self) -> str:
        """What comes after the spec."""
        rows = [[d.operand, d.sources, d.recipe] for d in self.derived]
        return " | " + json.dumps(rows, separators=(",", ":")) if rows else ""

    def operands(self, arguments: Sequence[T], derive: Callable[[str, list[T]], T]) -> list[T]:
        """What the kernels take, of what the op takes; `derive` computes a recipe from its sources."""
        if not self.derived:
            return list(arguments)
        given, derived = iter(arguments), {d.operand: d for d in self.derived}
        found = []
        for at, _ in enumerate(self.spec.operands()):
            if at in derived:
                found.append(derive(derived[at].recipe, [arguments[source] for source in derived[at].sources]))
            else:
                found.append(next(given))
        return found

    @property
    def prefix(self) -> str:
        """What comes before the table."""
        return "triton " * (self.emitter == "triton") + "autotuned " * self.tuned

    def cpp_source(self) -> str:
        """The C++ of its kernels: of those that a row of its table runs, as half of a build is for the other."""
        return cpp.emit(self.spec, [plan for plan, _ in self.table.rows], [operand for _, operand in self.summed])

    @property
    def summed(self) -> list[tuple[int, Operand]]:
        """The sources of hoisted operands of which `gemv` takes a checksum as it reads them: (argument, operand)."""
        if not any(plan == "gemv_cpp" for plan, _ in self.table.rows):
            return []
        derived = {d.operand for d in self.derived}
        given = [operand for at, operand in enumerate(self.spec.operands()) if at not in derived]
        sources = sorted({source for d in self.derived for source in d.sources if source < len(given)})
        return [(source, given[source]) for source in sources if given[source].role in SUMMED]

    def triton_plan(self, m: int) -> triton.Plan:
        """The plan that runs `m` tokens on a GPU."""
        return triton.Plan.parse(self.table.pick(m))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Program:
        """The program that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        table, _, rest = text.partition(" | ")
        spec, _, suffix = rest.partition(" | ")
        match = re.fullmatch("(triton )?(autotuned )?(.*)", table)
        assert match is not None
        emitter = "triton" if match[1] else "cpp"
        rows = json.loads(suffix) if suffix else []
        derived = tuple(Derived(at, tuple(sources), recipe) for at, sources, recipe in rows)
        return Program(PlanTable.parse(match[3]), KernelSpec.parse(spec), emitter, bool(match[2]), derived)
