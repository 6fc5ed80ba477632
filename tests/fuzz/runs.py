"""Level 3: whole ``torch.compile`` runs, with edits between calls.

Half of the cases are random programs as modules, whose stored tensors are edited at random: in place, through ``.data``
and numpy, under inference mode, replaced by other tensors, of other dtypes. The others are PEFT models to which a
random row of the table of user actions is done, and another, and another (`tests.actions`). After every edit the next
call is compared with eager's and, for programs, with fp64.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from gawscompile.observe.store import RECORDS
from gawscompile.planning import devices
from gawscompile.planning.table import Program as Planned
from tests.actions import GROUPS, Call, ids, small
from tests.fuzz import data, graphs, judge, reference
from tests.fuzz.coverage import Coverage, Failure
from tests.fuzz.programs import Program
from tests.fuzz.structure import generate
from tests.passes.test_choose_plan import FAST_LIBRARY

LEVEL = 3
ENTRIES = {"torch.compile": True, "watch=False": False}
MUST_REACH = {
    "entry": frozenset(ENTRIES),
    "plan": frozenset({"gemv_cpp", "gemm_accumulate"}),
    "group of actions": frozenset(GROUPS),
    "edit": frozenset({"in place", "data", "numpy", "inference mode", "memory", "replaced", "dtype"}),
}
EDITS, ACTIONS = 3, 3  # to one compiled model
SKIPPED = ("`torch.func.functional_call` with other parameters",)  # puts back what later actions have changed


def run(seed: int, coverage: Coverage) -> Failure | None:
    """One case. Raises only where the fuzzer itself is at fault."""
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    mark = len(RECORDS)
    library = random.Random(f"library {seed}").random() < 0.15
    device = mock.patch.object(devices, "cpu", lambda: FAST_LIBRARY) if library else contextlib.nullcontext()
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=64), device:
        warnings.simplefilter("ignore")
        failure = _program(seed, coverage) if seed % 2 else _actions(seed, coverage)
    for record in RECORDS.since(mark):
        for group in record.groups:
            for plan, _ in Planned.parse(group.program).table.rows:
                coverage.reach("plan", plan)
        for entry in record.linears:
            coverage.reach("linear", entry.reason or "fused")
    return failure


def _compiled(model: Any, entry: str, backend: str = "gaws", **settings: Any) -> Any:
    options = {"watch": ENTRIES[entry]}
    return torch.compile(model, backend=backend, options=options, **settings)


# ---- random programs --------------------------------------------------------------------------------------


def module_of(program: Program, tensors: list[torch.Tensor]) -> nn.Module:
    """The program as a module that holds its stored tensors, and takes the others."""
    lines = [
        "def forward(self, {}):".format(", ".join(one.name for one in program.inputs if not one.stored) or "_=None")
    ]
    lines += [f"    {step.name} = " + re.sub(r"\b(p\d+)\b", r"self.\1", step.text) for step in program.steps]
    returned = ", ".join(re.sub(r"\b(p\d+)\b", r"self.\1", name) for name in program.outputs)
    lines.append(f"    return ({returned},)")
    scope = {"torch": torch, "F": torch.nn.functional, **program.sizes}
    exec("\n".join(lines), scope)
    model = type("Case", (nn.Module,), {"forward": scope["forward"]})().eval()
    for one, t in zip(program.inputs, tensors, strict=True):
        if one.stored and t.is_floating_point():
            model.register_parameter(one.name, nn.Parameter(t, requires_grad=False))
        elif one.stored:
            model.register_buffer(one.name, t)
    return model


@dataclass
class Case:
    """A program, its module, and what it is called with. `program` follows the dtypes that edits leave."""

    program: Program
    model: nn.Module
    others: list[torch.Tensor]
    rng: random.Random

    def arguments(self) -> list[torch.Tensor]:
        return [t.clone(memory_format=torch.preserve_format) for t in self.others]

    def tensors(self) -> list[torch.Tensor]:
        """All inputs of the program, as they are now."""
        others = iter(self.arguments())
        return [getattr(self.model, one.name).detach() if one.stored else next(others) for one in self.program.inputs]


def _program(seed: int, coverage: Coverage) -> Failure | None:
    rng = random.Random(f"run {seed}")
    program = generate(seed)
    if not program.functional or any(re.search(r"\b[px]\d+", one.layout) for one in program.inputs):
        coverage.reach("case", "left out: it writes to its inputs, or they share memory")  # level 1 has such
        return None
    tensors = [t.clone(memory_format=torch.preserve_format) for t in data.tensors(program, seed)]
    others = [t for one, t in zip(program.inputs, tensors, strict=True) if not one.stored]
    case = Case(program, module_of(program, tensors), others, rng)
    entry, dynamic = rng.choice(list(ENTRIES)), rng.choice((None, False, False))
    coverage.reach("entry", entry)
    compiled = _compiled(case.model, entry, dynamic=dynamic)
    done = [f"compiled by {entry}, dynamic={dynamic}"]
    for _ in range(1 + EDITS):
        wrong = _judged(case, compiled)
        if wrong and (kind := _ours(case, wrong, dynamic)):
            source = program.source(f"# {'; then '.join(done)}")
            return Failure(LEVEL, seed, kind, f"{'; then '.join(done)}: {wrong}", source)
        if wrong:
            coverage.reach("case", "left out: Inductor is wrong, or fails, alike")
            return None
        coverage.reach("case", "program")
        done.append(_edit(case, coverage))
    return None


def _judged(case: Case, compiled: Any) -> str | None:
    """What is wrong with the next call, if anything: with the next calls, where one alone may be ill-conditioned (two
    logits that are alike but for a rounding)."""
    judgement, first = judge.Judgement(), case.others
    try:
        for draw in range(judge.DRAWS):
            if (fault := _added(case, compiled, judgement)) or not judgement.doubt():
                return fault
            random = torch.Generator().manual_seed(draw)
            case.others = [t.clone().normal_(generator=random) if t.is_floating_point() else t for t in first]
    finally:
        case.others = first
    return judgement.doubt()


def _added(case: Case, compiled: Any, judgement: judge.Judgement) -> str | None:
    """The next call, for the judgement. Returns what is wrong with it beside its numbers' errors."""
    before = case.tensors()
    with torch.no_grad():
        try:
            want = case.model(*case.arguments())
        except Exception:
            return None  # an edit that eager refuses
        try:
            got = compiled(*case.arguments())
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    typed = replace(
        case.program,
        inputs=tuple(replace(i, dtype=t.dtype) for i, t in zip(case.program.inputs, before, strict=True)),
    )
    traced = graphs.trace(typed)
    doubles = [t.double() if t.is_floating_point() else t for t in before]
    exact = reference.run(traced.graph, traced.module, traced.arguments(typed, doubles, {}), exact=True)
    ours, theirs = reference.Ran(list(got), []), reference.Ran(list(want), [])
    return judge.structure(ours, theirs) or judgement.add(ours, theirs, replace(exact, inputs=[]))


def _ours(case: Case, wrong: str, dynamic: bool | None) -> Any:
    """The kind of failure, or None where Inductor alone does no better."""
    torch._dynamo.reset()
    if _judged(case, torch.compile(case.model, dynamic=dynamic)):
        return None
    return "crash" if re.match(r"\w+(Error|Exception|Failed): ", wrong) else "wrong"


def _edit(case: Case, coverage: Coverage) -> str:
    """Edit some of the stored floating tensors. Returns what was done, in words."""
    names = [
        one.name for one in case.program.inputs if one.stored and getattr(case.model, one.name).is_floating_point()
    ]
    if not names:
        case.others = [t * 1.5 if t.is_floating_point() else t for t in case.others]
        return "other inputs"
    kind = case.rng.choice(list(KINDS))
    chosen = case.rng.sample(names, case.rng.randint(1, len(names)))
    if kind == "numpy":  # it has no bf16
        chosen = [name for name in chosen if getattr(case.model, name).dtype != torch.bfloat16]
    for name in chosen:
        KINDS[kind](case, name)
    coverage.reach("edit", kind)
    return f"{kind} of {', '.join(chosen)}"


def _in_place(case: Case, name: str) -> None:
    with torch.no_grad():
        getattr(case.model, name).mul_(1.25)


def _data(case: Case, name: str) -> None:
    flat = getattr(case.model, name).data
    if flat.numel():
        flat[(0,) * flat.dim()] += 3.0


def _numpy(case: Case, name: str) -> None:
    getattr(case.model, name).detach().numpy()[...] *= -0.75


def _inference(case: Case, name: str) -> None:
    with torch.inference_mode():
        getattr(case.model, name).add_(0.125)


def _memory(case: Case, name: str) -> None:
    p = getattr(case.model, name)
    p.data = p.data * 1.5


def _replaced(case: Case, name: str) -> None:
    p = getattr(case.model, name)
    setattr(case.model, name, nn.Parameter(p.detach() * 0.5, requires_grad=False))


def _dtype(case: Case, name: str) -> None:
    p = getattr(case.model, name)
    p.data = p.data.to(torch.bfloat16 if p.dtype == torch.float32 else torch.float32)


KINDS: dict[str, Callable[[Case, str], None]] = {
    "in place": _in_place,
    "data": _data,
    "numpy": _numpy,
    "inference mode": _inference,
    "memory": _memory,
    "replaced": _replaced,
    "dtype": _dtype,
}


# ---- models with adapters ---------------------------------------------------------------------------------


def _actions(seed: int, coverage: Coverage) -> Failure | None:
    rng = random.Random(f"actions {seed}")
    entry, dora = rng.choice(list(ENTRIES)), rng.random() < 0.25
    rows = [(group, words) for group, rows in GROUPS.items() for words in rows]
    if not ENTRIES[entry]:
        rows = [(group, words) for group, words in rows if "hook" not in words]  # torch has no guards on them
    fitting = [row for row in rows if row[1] not in SKIPPED and (dora or not GROUPS[row[0]][row[1]].dora)]
    chosen = rng.sample(fitting, ACTIONS)
    coverage.reach("entry", entry)
    model = small(dora, seed)
    compiled = _compiled(model, entry, dynamic=rng.choice((None, False)))
    done = [f"{'DoRA' if dora else 'LoRA'} compiled by {entry}"]
    wrong = _same(model, compiled, Call(ids()))
    for group, words in chosen:
        if wrong is not None:
            break
        try:
            made: Any = GROUPS[group][words](model)
        except Exception:
            continue  # not possible any more, after what was done before
        done.append(words)
        coverage.reach("group of actions", group)
        coverage.reach("action", words)
        call = made if isinstance(made, Call) else Call(ids())
        with made if isinstance(made, contextlib.AbstractContextManager) else contextlib.nullcontext():
            wrong = _same(model, compiled, call)
    coverage.reach("case", "adapters")
    if wrong is None:
        return None
    kind: Any = "wrong" if wrong.startswith("off by") else "crash"
    return Failure(LEVEL, seed, kind, f"{'; then '.join(done)}: {wrong}")


def _same(model: Any, compiled: Any, call: Call) -> str | None:
    with call.under():
        try:
            want = model(call.ids)
        except Exception:
            return None  # eager refuses it
        try:
            got = compiled(call.ids)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return f"off by its kind: {tuple(got.shape)} {got.dtype}, eager's is {tuple(want.shape)} {want.dtype}"
    narrow = torch.is_autocast_enabled("cpu") or {torch.bfloat16} & {want.dtype, *(p.dtype for p in model.parameters())}
    if not want.numel():
        return None
    off = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    if off <= (0.05 if narrow or call.under is not torch.no_grad else 1e-4):
        return None
    return f"off by {off.item():.2g} (relative, norms)"
