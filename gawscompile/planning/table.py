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
from typing import Any, TypeVar

import torch

from gawscompile.codegen import cpp_sums
from gawscompile.ir.spec import KernelSpec, Operand
from gawscompile.ir.sums import project
from gawscompile.ir.types import SpecError
from gawscompile.planning.targets import CPP, TARGETS, Target

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
    """A planned group: which plan runs for which m, the spec of its kernels, and the target that runs them.

    `tuned`: the target's autotuner has the last word (``triton autotuned single_launch[8] | …``). `derived`: operands
    that are hoisted (``… | k=576 x=bf16; … | [[2,[0,1],"[…"]]``).
    """

    table: PlanTable
    spec: KernelSpec
    target: Target = CPP
    tuned: bool = False
    derived: tuple[Derived, ...] = ()

    def __post_init__(self) -> None:
        if self.derived and not self.target.hoists:
            raise SpecError(f"nothing is hoisted on a GPU: {self.spec}")
        for plan in self.plans:
            self.target.kind(plan)
        if self.tuned and not self.target.tunes:
            raise SpecError(f"the emitter {self.target.name} has no autotuner: {self.table}")

    def __str__(self) -> str:
        return f"{self.prefix}{self.table} | {self.spec}{self.suffix}"

    @property
    def prefix(self) -> str:
        """What comes before the table."""
        return self.target.prefix + "autotuned " * self.tuned

    @property
    def suffix(self) -> str:
        """What comes after the spec."""
        rows = [[d.operand, d.sources, d.recipe] for d in self.derived]
        return " | " + json.dumps(rows, separators=(",", ":")) if rows else ""

    @property
    def plans(self) -> list[str]:
        """Of all rows."""
        return [plan for plan, _ in self.table.rows]

    @property
    def stateless(self) -> bool:
        """Whether Inductor may see a GPU's kernels themselves: one plan is left, so that the choice adds no guard, and
        it keeps nothing between calls."""
        one = len(self.plans) == 1 and self.target.device == "cuda"
        return one and not self.target.kind(self.plans[0]).keeps_state

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

    def run(self, x: torch.Tensor, arguments: Sequence[torch.Tensor], derive: Callable[..., Any]) -> list[torch.Tensor]:
        """What its kernels compute of what the op takes, segment by segment, in the dtypes that eager would use."""
        sums = self.spec.bound(self.operands(arguments, derive))
        return project(x, sums, self.spec.swiglu, self)

    @property
    def summed(self) -> list[tuple[int, Operand]]:
        """The sources of hoisted operands of which a kernel takes a checksum as it reads them: (argument, operand)."""
        if not any(self.target.kind(plan).takes_sums for plan in self.plans):
            return []
        derived = {d.operand for d in self.derived}
        given = [operand for at, operand in enumerate(self.spec.operands()) if at not in derived]
        sources = sorted({source for d in self.derived for source in d.sources if source < len(given)})
        return [(source, given[source]) for source in sources if cpp_sums.takes(given[source])]

    def sources(self) -> dict[str, str]:
        """The generated code, by file name: of the plans that a row runs, as half of a build is for the other."""
        return self.target.sources(self.spec, self.plans, [operand for _, operand in self.summed], self.tuned)

    def start(self) -> None:
        """Begin to build it in the background."""
        self.target.start(self.spec, self.plans, [operand for _, operand in self.summed])

    def finish(self) -> None:
        """Wait until it is built, or print and import it. Raises what building raises."""
        self.target.finish(self.spec, self.plans, [operand for _, operand in self.summed], self.tuned)

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Program:
        """The program that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        table, _, rest = text.partition(" | ")
        spec, _, suffix = rest.partition(" | ")
        target = next(one for one in reversed(TARGETS) if table.startswith(one.prefix))
        table = table.removeprefix(target.prefix)
        tuned, table = table.startswith("autotuned "), table.removeprefix("autotuned ")
        try:
            rows = json.loads(suffix) if suffix else []
            derived = tuple(Derived(at, tuple(sources), recipe) for at, sources, recipe in rows)
        except ValueError as error:
            raise SpecError(f"not the recipes of a program: {suffix[:200]!r}: {error}") from None
        return Program(PlanTable.parse(table), KernelSpec.parse(spec), target, tuned, derived)
