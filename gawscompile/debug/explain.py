"""``explain``: what became of every linear of a model."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import FunctionType
from typing import Any

import torch

from gawscompile.debug.records import GraphRecord, GroupRecord, LinearRecord, Reason, plain


@dataclass
class Report:
    """An entry for every linear of the model, the groups they run in, and what else there is to know.

    ``str(report)`` is a table for people, `to_dict` the same as plain data.
    """

    linears: list[LinearRecord]
    groups: list[GroupRecord]
    graphs: int
    passes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> list[LinearRecord]:
        """The linears that run in generated kernels."""
        return [entry for entry in self.linears if entry.status == "fused"]

    def summary(self) -> str:
        """The outcome in one line."""
        adapted = [entry for entry in self.linears if entry.adapters]
        fused = sum(entry.status == "fused" for entry in adapted)
        reasons = Counter(entry.reason for entry in self.linears if entry.status != "fused")
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=str)) or "none"
        return (
            f"{len(self.linears)} linears in {self.graphs} graph(s): {len(self.fused)} fused into {len(self.groups)} "
            f"groups; with adapters {fused} of {len(adapted)} fused; left as they were: {rejected}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``linears``, ``groups``, ``graphs``, ``passes``, ``notes``, ``summary``."""
        return {
            "summary": self.summary(),
            "graphs": self.graphs,
            "linears": [asdict(entry) for entry in self.linears],
            "groups": [asdict(group) for group in self.groups],
            "passes": dict(self.passes),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("linear", "shape", "dtype", "group", "plan, or why not", "operators")]
        for entry in self.linears:
            why = entry.plan or f"{entry.reason}: {entry.detail}"
            group = "-" if entry.group is None else str(entry.group)
            rows.append((entry.path, "{}x{}".format(*entry.shape), entry.dtype, group, why, entry.operators))
        widths = [max(len(plain(row[i])) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(plain(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        notes = [f"note: {plain(note)}" for note in self.notes]
        return "\n".join([self.summary(), *notes, "", *map(str.rstrip, lines)])


def explain(
    model: torch.nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **inputs: Any,
) -> Report:
    """Compile `model` with the backend for one call ``model(*args, **inputs)`` and report what became of it.

    `model` may be compiled already. The call runs without gradients, on copies of the inputs. Linears that no graph
    contains are reported too. Raises what the model raises, and `OptionError` for bad options.
    """
    from gawscompile.backend import gaws
    from gawscompile.debug.store import RECORDS

    model = getattr(model, "_orig_mod", model)
    mark = len(RECORDS)
    call_once(model, functools.partial(gaws, options=dict(options or {})), args, inputs, dynamic)
    return assemble(RECORDS.since(mark), model)


def call_once(
    model: torch.nn.Module, backend: Any, args: tuple[Any, ...], inputs: dict[str, Any], dynamic: bool | None = None
) -> None:
    """Compile `model` with `backend` for one call, without gradients and on copies of the inputs, and run it."""
    call = torch.compile(_fresh(_call), backend=backend, dynamic=dynamic)
    with torch.no_grad():
        call(model, copy.deepcopy(args), copy.deepcopy(inputs))


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
        linears += [entry for entry in _untraced(model) if entry.path not in seen]
    notes = [note for record in records for note in record.notes]
    for group in groups:
        if "autotuned" in group.prefix:
            notes += _tuned(group)
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


def _untraced(model: torch.nn.Module) -> list[LinearRecord]:
    """Every linear of a model as "not traced"; an adapter's factors belong to the linear that they adapt."""
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
        reason = Reason.NOT_TRACED
        dtype = str(weight.dtype).removeprefix("torch.")
        entries.append(LinearRecord(path, (n, k), dtype, reason=reason.name, detail=reason.value))
    return entries
