"""A graph as lines of Python, and the difference between two of them.

Nodes keep their names and their order from pass to pass, so a difference is found in one walk along both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from gawscompile.ir.records import plain
from gawscompile.planning.table import Program

SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
SHORT |= {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8"}


class Line(NamedTuple):
    """One node: its name, what it is as Python, and the path of the module that it is of."""

    name: str
    text: str
    path: str


class Hunk(NamedTuple):
    """From line `at` on, `removed` lines become `added`."""

    at: int
    removed: int
    added: list[Line]


def listing(graph: Graph, path_of: Callable[[Node], str]) -> list[Line]:
    """The nodes of `graph`, in order."""
    return [Line(node.name, statement(node), path_of(node)) for node in graph.nodes]


def statement(node: Node) -> str:
    """``mm: "f32[5, 64]" = aten.mm.default(view, permute)``."""
    if node.op == "output":
        return f"return {spell(node.args[0])}"
    kind = describe(node.meta.get("val"))
    head = f'{node.name}: "{kind}"' if kind else node.name
    if node.op == "placeholder":
        return f"{head},"
    if node.op == "get_attr":
        return f"{head} = self.{node.target}"
    return f"{head} = {_call(node)}"


def _call(node: Node) -> str:
    target: Any = node.target
    if getattr(target, "__module__", "") == "_operator" and target.__name__ == "getitem":
        return f"{spell(node.args[0])}[{spell(node.args[1])}]"
    inside = [*map(spell, node.args), *(f"{name}={spell(value)}" for name, value in node.kwargs.items())]
    return f"{function(target)}({', '.join(inside)})"


def function(target: Any) -> str:
    """The name under which `source` makes a node's target known."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__name__", str(target))
    if module == "_operator":
        return f"operator.{name}"
    if module.startswith("gawscompile."):
        return f"operators.{name}"
    return f"{module}.{name}" if module.startswith("torch") else f"higher_order.{name}"


def spell(value: Any) -> str:
    """An argument as Python."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # an operator: Dense(W), LowRank(A, B, 2.0)
        return f"{type(value).__name__}({', '.join(map(spell, value))})"
    if isinstance(value, tuple):
        return f"({', '.join(map(spell, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, slice):
        return f"slice({spell(value.start)}, {spell(value.stop)}, {spell(value.step)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, Program):
        return repr(str(value))
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    return repr(value)


def describe(value: Any) -> str:
    """``f32[5, 64]`` of a tensor's fake, in brackets where there are several."""
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe, value))}]"
    return str(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else ""


def source(lines: Iterable[Line]) -> Iterator[str]:
    """The lines of a function, each module's under its path."""
    yield "def forward("
    inside, path = False, ""
    for line in lines:
        if not inside and line.text.endswith(","):
            yield f"    {line.text}" + (f"  # {plain(line.path)}" if line.path else "")
            continue
        if not inside:
            yield "):"
            inside = True
        if line.path != path and not line.text.startswith("return"):
            yield ""
            yield f"    # {plain(line.path)}"
            path = line.path
        yield f"    {line.text}"


def difference(before: list[Line], after: list[Line]) -> list[Hunk]:
    """What turns `before` into `after`, first line first."""
    kept = {(line.name, line.text) for line in before} & {(line.name, line.text) for line in after}
    hunks: list[Hunk] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and before[i][:2] == after[j][:2]:
            i, j = i + 1, j + 1
            continue
        here, there = i, j
        while i < len(before) and before[i][:2] not in kept:
            i += 1
        while j < len(after) and after[j][:2] not in kept:
            j += 1
        if (here, there) == (i, j):  # they stand in another order: taken out here, put in there
            kept -= {line[:2] for line in (before[i : i + 1] + after[j : j + 1])}
            continue
        hunks.append(Hunk(here, i - here, after[there:j]))
    return hunks


def unified(before: list[Line], hunks: list[Hunk]) -> Iterator[str]:
    """Hunks as `diff -U0` prints them, each under the module that it is of."""
    shift = 0
    for at, removed, added in hunks:
        old, new = before[at : at + removed], added
        path = next((line.path for line in (*new, *old) if line.path), "")
        yield f"@@ -{at + (removed > 0)},{removed} +{at + shift + (len(added) > 0)},{len(added)} @@ {plain(path)}"
        yield from (f"-{line.text}" for line in old)
        yield from (f"+{line.text}" for line in new)
        shift += len(added) - removed


def applied(lines: list[Line], hunks: list[Hunk]) -> list[Line]:
    """`lines` with `hunks` applied to them."""
    result = list(lines)
    for at, removed, added in reversed(hunks):
        result[at : at + removed] = added
    return result
