"""``explain``: what became of every linear of a model."""

from __future__ import annotations

import copy
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.utils import counters

from gawscompile.debug import frames, shards
from gawscompile.debug.regions import Regional, regions
from gawscompile.debug.report import Report
from gawscompile.ir.records import GraphRecord, GroupRecord, LinearRecord, Reason

__all__ = ["Report", "assemble", "call_once", "explain"]


def explain(
    model: torch.nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    measure: bool = False,
    serving: bool = False,
    training: bool = False,
    **inputs: Any,
) -> Report:
    """Compile `model` with the backend for one call ``model(*args, **inputs)`` and report what became of it.

    `model` may be compiled already. Where its blocks are compiled one by one, these are reported, each with the graph
    that it runs. The call runs on copies of the inputs, and without gradients unless for `training`:
    then the report has the backward too. Linears that no graph contains are reported as well. `measure`: time every
    group's kernels, the guards and the parts of a call here, some seconds. `serving`: compile the whole model as one,
    as `gawscompile.compile` does.
    Raises what the model raises, and `OptionError` for bad options.
    """
    from gawscompile.backend import gaws
    from gawscompile.observe.store import RECORDS
    from gawscompile.runtime import first_calls, pages

    whole, model = hasattr(model, "_orig_mod") or serving, getattr(model, "_orig_mod", model)
    if isinstance(model, torch.nn.Module) and not training:
        first_calls.lay_out(model)  # which this call would do, if it ran in eager mode
    mark, before, began, paged = len(RECORDS), frames.breaks(), time.time(), len(pages.OUTCOMES)
    watched = counters["gaws"]["watched"]
    backend = functools.partial(gaws, options=dict(options or {}))
    if whole or not regions(model):
        call = call_once(model, backend, args, inputs, dynamic, training)
        report = assemble(RECORDS.since(mark), model)
    else:
        regional = Regional(model, backend, lambda run, b: torch.compile(_fresh(run), backend=b, dynamic=dynamic))
        call = _on_copies(regional, args, inputs, training)
        report = assemble(regional.records(), model)
        report.graphs = len(RECORDS.since(mark))
        report.notes.insert(0, regional.note())
    report.notes += dict.fromkeys(str(outcome) for outcome in pages.OUTCOMES[paged:])
    report.guards, report.watched = frames.guards(began), counters["gaws"]["watched"] - watched
    report.troubles = [*frames.limited(), *frames.broken(before), *frames.recompiled()]
    if measure:
        from gawscompile.calibration import measure as timing
        from gawscompile.calibration import split

        timing.measure_groups(report.groups)
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            report.parts = split.seconds(call)
        else:
            report.notes.append("the parts of a call were not measured: they are of CPU time")
    return report


def call_once(
    model: torch.nn.Module,
    backend: Any,
    args: tuple[Any, ...],
    inputs: dict[str, Any],
    dynamic: bool | None = None,
    training: bool = False,
) -> Callable[[], Any]:
    """Compile `model` with `backend` for one call, on copies of the inputs, and run it. Returns what runs it again.
    `training`: with gradients."""
    compiled = torch.compile(_fresh(_call), backend=backend, dynamic=dynamic)
    return _on_copies(lambda *given, **named: compiled(model, given, named), args, inputs, training)


def _on_copies(run: Callable[..., Any], args: Any, inputs: Any, training: bool) -> Callable[[], Any]:
    """Calls `run` on copies of the inputs, and returns what does so again."""

    def call() -> Any:
        with torch.set_grad_enabled(training):
            return run(*copy.deepcopy(args), **copy.deepcopy(inputs))

    call()
    return call


def _call(self: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    # named `self` so that module paths in the graph start where the model does
    return self(*args, **inputs)


def _fresh(function: Any) -> Any:
    """The function with a code object of its own: Dynamo's caches hang on code objects, and must not fill up here."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def assemble(records: list[GraphRecord], model: torch.nn.Module | None = None) -> Report:
    """One report of several graphs; with `model`, also of its linears that are in none of them."""
    linears: list[LinearRecord] = []
    groups: list[GroupRecord] = []
    passes: Counter[str] = Counter()
    for record in records:
        shift = len(groups)
        for entry in record.linears:
            linears.append(copy.copy(entry))
            if entry.group is not None:
                linears[-1].group = entry.group + shift
        for group in record.groups:
            groups.append(copy.copy(group))
            groups[-1].index += shift
        passes.update(record.passes)
    if model is not None:
        seen = {entry.path for entry in linears}
        reason = Reason.RECORD_LOST if any(record.lost for record in records) else Reason.NOT_TRACED
        missing = [entry for entry in _untraced(model, reason) if entry.path not in seen]
        if shards.is_fsdp(model):
            missing = [entry for entry in missing if not entry.path.endswith(tuple(f".{path}" for path in seen))]
        linears += missing
        shards.tell(linears, model)
    notes = [note for record in records for note in (*record.notes, *filter(None, [record.wrapper]))]
    notes += [shards.FSDP] if model is not None and shards.is_fsdp(model) else []
    notes += shards.counted(one for record in records for one in record.collectives)
    for group in groups:
        if "autotuned" in group.prefix:
            notes += _tuned(group)
    notes += model.adapter_bank.notes() if hasattr(model, "adapter_bank") else []  # type: ignore[union-attr, operator]
    return Report(linears, groups, len(records), dict(passes), list(dict.fromkeys(notes)))


def _tuned(group: GroupRecord) -> list[str]:
    """What Triton's autotuner chose for a group that has run."""
    from gawscompile.codegen import triton
    from gawscompile.planning.table import Program

    program = Program.parse(group.program)
    plans = [triton.Plan.parse(plan) for plan, _ in program.table.rows]
    return [
        f"autotuned {plan} of {', '.join(group.members)}: {kernel}: {choice}"
        for plan in plans
        for kernel, choice in triton.chosen(program.spec, plan).items()
    ]


def _untraced(model: torch.nn.Module, reason: Reason) -> list[LinearRecord]:
    """Every linear of a model as rejected; an adapter's factors belong to the linear that they adapt."""
    entries = []
    layers = [(name, getattr(module, "base_layer", None)) for name, module in model.named_modules()]
    adapted = {name for name, base in layers if isinstance(base, torch.nn.Module)}
    factors = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if not linear or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        path = name.removesuffix(".base_layer") or "(model)"
        if name.startswith(factors) and path not in adapted:
            continue
        n, k = weight.shape if isinstance(module, torch.nn.Linear) else reversed(weight.shape)
        dtype = str(weight.dtype).removeprefix("torch.")
        entries.append(LinearRecord(path, (n, k), dtype, reason=reason.name, detail=reason.value))
    return entries
