"""Level 2: kernels against fp64. A random spec is built once and called `CALLS` times, one case each: by both entry
points of its C++ and by the op, with hoisted operands and without, for 0 to 70 tokens, by 1 to 3 threads, on numbers of
every kind, between NaNs, off any alignment. One spec in `INTERPRETED` is printed by the Triton emitters instead, and
runs in Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from gawscompile.codegen import cpp, triton
from gawscompile.ir.operators import ROLES, Banked, Dense
from gawscompile.ir.packed import Packed
from gawscompile.ir.places import places
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import TensorType
from tests.fuzz import interpreted
from tests.fuzz.calls import ENTRIES, NUMBERS, TOKENS, VECTORS, Call, built
from tests.fuzz.coverage import Coverage, Failure
from tests.fuzz.specs import FEATURES, FLOATS, random_spec

LEVEL = 2
CALLS = 33
"""Seeds ``33 n … 33 n + 32`` are calls of one spec."""
INTERPRETED, FEW, DECODED = 12, 3, 3
"""One in so many is Triton's: its specs have `FEW` calls each, and plans for few tokens have at most `DECODED`."""
THREADS = (1, 2, 3)
AHEAD = 2
"""Specs that are built while one is called."""
TRIALS = 40
"""Simpler calls at most that are tried to shrink a failure."""

TRITON = frozenset(f"triton: {name}" for name in triton.PLANS)
TESTED_APART = {place.role for kind in (Banked, Packed) for place in places(kind).values() if place} - {"weight"}
"""Operands of banks and of packed bases, for which there are tests of their own, on numbers of one kind."""
MUST_REACH: dict[str, frozenset[str]] = {
    "kernel": frozenset({*ENTRIES, *(f"{how}: {name}" for how in ("op", "hoisted") for name in cpp.PLANS)})
    | TRITON,
    "operand": ROLES - TESTED_APART,
    "spec": frozenset(FEATURES),
    "numbers": frozenset(NUMBERS),
    "activation": frozenset(FLOATS),
    "threads": frozenset(map(str, THREADS)),
    "tokens": frozenset({"0", "1", "2 to 5", "6 to 70"}),
    "layout": frozenset({"strided", "leading dimensions"}),
    "vectors": frozenset(VECTORS),
}


@dataclass(frozen=True)
class Subject:
    """What the calls of one spec share."""

    spec: KernelSpec
    vectors: str
    triton: bool


def subject(seed: int) -> Subject:
    """That of the seed's calls. Triton's need no build, and change after a few calls."""
    number = seed // CALLS
    triton = number % INTERPRETED == INTERPRETED - 1
    return _subject(number, seed % CALLS // FEW if triton else 0, triton)


@functools.lru_cache(maxsize=8)
def _subject(number: int, part: int, triton: bool) -> Subject:
    random = Random(f"spec {number} {part}")
    return Subject(random_spec(random, triton), "AVX2" if random.random() < 0.25 else "AVX-512", triton)


def call(seed: int) -> Call:
    """The case of a seed."""
    one, random = subject(seed), Random(f"call {seed}")
    spec, m = one.spec, random.choice((1, 1, *(random.randint(0, 9) for _ in range(3)), random.randint(0, TOKENS)))
    numbers = random.choice(("normal", *NUMBERS))
    if one.triton:
        plans = triton.plans(spec)
        name = random.choice(sorted({plan.name for plan in plans}))
        plan = random.choice([plan for plan in plans if plan.name == name])
        most = DECODED if plan.rows else TOKENS  # a program for each token takes long in the interpreter
        return Call(str(spec), str(plan), max(1, min(m, most)), 1, numbers, seed)
    added = spec.library_takes and (spec.swiglu or not all(p.plain for p in spec.projections))
    scaled = any(p.rowscale for p in spec.projections)
    turned = cpp.takes_panels(spec)
    plan = random.choice(("gemv", "op", *["gemm"] * turned, *["accumulate"] * added, *["hoisted"] * scaled))
    return Call(str(spec), plan, m, random.choice(THREADS), numbers, seed, one.vectors)


def run(seed: int, coverage: Coverage) -> Failure | None:
    """One call."""
    case = call(seed)
    if seed % CALLS:  # not a case that is replayed alone
        for ahead in range(0, (AHEAD + 1) * CALLS, CALLS):
            soon = subject(seed + ahead)
            if not soon.triton:
                built(str(soon.spec), soon.vectors)
    reached(case, coverage)
    found = _fault(case)
    if found is None:
        return None
    smallest, (kind, message) = shrunk(case, found)
    return Failure(LEVEL, seed, kind, message, f"from tests.fuzz.calls import Call\n\nprint({smallest}.fault())")


def reached(case: Call, coverage: Coverage) -> None:
    spec = case.kernel
    coverage.reach("kernel", case.by)
    for role in {operand.role for operand in spec.operands()}:
        coverage.reach("operand", role)
    for name, there in FEATURES.items():
        if there(spec):
            coverage.reach("spec", name)
    coverage.reach("numbers", case.numbers)
    coverage.reach("activation", spec.x)
    coverage.reach("threads", str(case.threads))
    coverage.reach("tokens", str(case.m) if case.m < 2 else "2 to 5" if case.m < 6 else "6 to 70")
    coverage.reach("vectors", case.vectors)
    if case.strided:
        coverage.reach("layout", "strided")
    if len(case.leading) > 1:
        coverage.reach("layout", "leading dimensions")


Kind = Literal["wrong", "crash"]


def _fault(case: Call) -> tuple[Kind, str] | None:
    try:
        found = case.fault() if not case.by.startswith("triton") else interpreted.fault(case)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    return ("wrong", found) if found else None


# --- Shrinking -----------------------------------------------------------------------------------------------


def shrunk(case: Call, found: tuple[Kind, str]) -> tuple[Call, tuple[Kind, str]]:
    """The simplest call that fails in the same way, of those that are tried."""
    trials, again = 0, True
    while again:
        again = False
        for simpler in simplified(case):
            trials += 1
            if trials > TRIALS:
                return case, found
            fault = _fault(simpler)
            if fault is not None and fault[0] == found[0]:
                case, found, again = simpler, fault, True
                break
    return case, found


def simplified(case: Call) -> Iterator[Call]:
    """Calls that are simpler by one step: those of the same kernels first."""
    for m in sorted({1, 2, case.m // 2, case.m - 1} - {case.m, 0, -1}):
        if m < case.m:
            yield replace(case, m=m)
    if case.threads > 1:
        yield replace(case, threads=1)
    if case.numbers != "normal":
        yield replace(case, numbers="normal")
    for spec in simpler_specs(case.kernel):
        smaller = replace(case, spec=str(spec))
        possible = case.by.startswith("triton") is False or triton.Plan.parse(case.plan) in triton.plans(spec)
        possible = possible and (case.plan != "accumulate" or not all(p.plain for p in spec.projections))
        possible = possible and (case.plan != "gemm" or cpp.takes_panels(spec))
        if possible and (case.plan != "hoisted" or any(p.rowscale for p in spec.projections)):
            yield smaller


def simpler_specs(spec: KernelSpec) -> Iterator[KernelSpec]:
    """Without a projection, a term, a bias, …."""
    for i, p in enumerate(spec.projections):
        others = (*spec.projections[:i], *spec.projections[i + 1 :])
        if others and not spec.swiglu:
            yield replace(spec, projections=others)
        for smaller in simpler_projections(p):
            yield replace(spec, projections=(*spec.projections[:i], smaller, *spec.projections[i + 1 :]))
    if spec.swiglu:
        yield replace(spec, swiglu=False)


def simpler_projections(p: Sum) -> Iterator[Sum]:
    """Without a term or a vector, as far as what is left is a projection."""
    for at in range(1, len(p.terms)):
        smaller = p._replace(terms=(*p.terms[:at], *p.terms[at + 1 :]))
        if (p.dense or smaller.adapted):
            yield smaller
    if p.transposed:
        turned = Dense(TensorType(p.dense.sizes, p.weight.dtype))
        yield p._replace(terms=(turned, *p.terms[1:]))
