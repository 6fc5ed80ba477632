"""Dumps: what the compiler did to one graph, as data, and as a folder of files to read.

``options={"dump": DIR}`` or ``GAWS_DUMP=DIR`` makes a folder for each graph::

    00_captured.py          the graph as AOTAutograd hands it over
    01_split_streams.py     after each pass, with .diff against the step before and .json of its matches and rejections
    operators.txt           every linear: its operator sum and what became of it
    plans.json              every group: members, plan table, cost of each plan in m
    kernels/                every kernel with its spec
    graph.json              what `gawscompile repro` needs
    index.html              all of it, to look through in a browser

The data is kept in the cache beside the record of the graph, so a warm start writes the same files.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from gawscompile.ir.records import GraphRecord, LinearRecord, plain
from gawscompile.observe.html import page
from gawscompile.observe.listing import Hunk, Line, applied, difference, listing, source, unified

CAPTURED = "captured"
FEW_NUMBERS = 4096
"""A constant of so many numbers is kept; a larger one is only described."""


@dataclass
class Step:
    """One pass: what it changed, matched and rejected."""

    name: str
    hunks: list[Hunk]
    matches: list[tuple[int, str, list[str]]] = field(default_factory=list)
    """Number of the match in the graph (what `fuel` counts), the node, the modules."""

    rejections: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    milliseconds: float = 0.0
    ran: bool = True


@dataclass
class Dump:
    """The steps of one graph. `options` as they were given; `names` are what the graph's inputs are called."""

    key: str
    options: dict[str, Any]
    names: list[str]
    steps: list[Step] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    _last: list[Line] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)
    _notes: int = 0

    # ---- while a graph is compiled -----------------------------------------------------------------------------

    def capture(self, graph: Graph, path_of: Callable[[Node], str]) -> None:
        """The graph before all passes."""
        places = {node.name: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        self.inputs = [_input(node, self._name(i)) for i, node in enumerate(graph.find_nodes(op="placeholder"))]
        for node in graph.find_nodes(op="get_attr"):
            self.constants[str(node.target)] = _constant(node)
        self._path_of = lambda node: self._name(places[node.name]) if node.name in places else path_of(node)
        self._step(Step(CAPTURED, []), graph)

    def step(
        self,
        name: str,
        graph: Graph,
        record: GraphRecord,
        matches: Sequence[tuple[int, str, list[str]]] = (),
        ran: bool = True,
    ) -> None:
        """The graph after the pass `name`; `record` as it is now."""
        step = Step(name, [], list(matches), ran=ran)
        step.rejections = [dataclasses.asdict(entry) for entry in record.linears if entry.stage == name]
        step.notes = record.notes[self._notes :]
        self._notes = len(record.notes)
        self._step(step, graph)

    def _step(self, step: Step, graph: Graph) -> None:
        step.milliseconds = round((time.perf_counter() - self._began) * 1e3, 2)
        lines = listing(graph, self._path_of)
        step.hunks = difference(self._last, lines)
        self.steps.append(step)
        self._last = lines
        self._began = time.perf_counter()  # the time of listing is no pass's

    def _name(self, index: int) -> str:
        return self.names[index] if index < len(self.names) else ""

    # ---- as data -----------------------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """For the cache."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("_")}
        data["steps"] = [dataclasses.asdict(step) for step in self.steps]
        return gzip.compress(json.dumps(data).encode(), 5, mtime=0)

    @staticmethod
    def unpack(raw: bytes) -> Dump:
        data = json.loads(gzip.decompress(raw))
        for step in data["steps"]:
            step["hunks"] = [Hunk(at, removed, [Line(*line) for line in added]) for at, removed, added in step["hunks"]]
        return Dump(**{**data, "steps": [Step(**step) for step in data["steps"]]})

    def listings(self) -> Iterator[tuple[Step, list[Line], list[Line]]]:
        """Every step, with the lines before it and after it."""
        before: list[Line] = []
        for step in self.steps:
            after = applied(before, step.hunks)
            yield step, before, after
            before = after

    def sources(self) -> Iterator[tuple[str, str]]:
        """(step, the graph after it)."""
        for step, _, after in self.listings():
            yield step.name, "\n".join(_source(step, after))

    def diffs(self) -> Iterator[tuple[str, str]]:
        """(pass, what it changed)."""
        for step, before, _ in list(self.listings())[1:]:
            yield step.name, "\n".join(unified(before, step.hunks))

    def operators(self) -> list[str]:
        """A line for every linear: its operator sum and what became of it."""
        return [_fate(entry) for entry in GraphRecord.from_json(json.dumps(self.record)).linears]

    # ---- as files ----------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """The files described above, in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, (step, before, after) in enumerate(self.listings()):
            stem = folder / f"{number:02d}_{step.name}"
            _put(stem.with_suffix(".py"), _source(step, after))
            if number:
                _put(stem.with_suffix(".diff"), unified(before, step.hunks))
                found = {"matches": step.matches, "rejections": step.rejections, "notes": step.notes}
                stem.with_suffix(".json").write_text(json.dumps(found, indent=1))
        _put(folder / "operators.txt", self.operators())
        (folder / "plans.json").write_text(json.dumps(self.record.get("groups", []), indent=1))
        kept = {"key": self.key, "options": self.options, "inputs": self.inputs, "constants": self.constants}
        first = list(applied([], self.steps[0].hunks)) if self.steps else []
        (folder / "graph.json").write_text(json.dumps({**kept, "lines": [line.text for line in first]}, indent=1))
        for name, kernel in self.kernels.items():
            place = folder / "kernels" / name.replace(":", "_")
            place.mkdir(parents=True, exist_ok=True)
            _put(place / "spec.txt", [kernel["spec"], "", *kernel["formulas"]])
            for file, text in kernel["sources"].items():
                (place / file).write_text(text)
        (folder / "index.html").write_text(page(self.data()), encoding="utf-8")

    def data(self) -> Mapping[str, Any]:
        """What the page shows: paths by number, as there are many lines and few modules."""
        paths: dict[str, int] = {}
        steps = []
        for step in self.steps:
            hunks = [
                (at, removed, [(name, text, paths.setdefault(path, len(paths))) for name, text, path in added])
                for at, removed, added in step.hunks
            ]
            steps.append({**dataclasses.asdict(dataclasses.replace(step, hunks=[])), "hunks": hunks})
        shown = {"key": self.key, "options": self.options, "record": self.record, "kernels": self.kernels}
        return {**shown, "steps": steps, "paths": list(paths)}


def _put(path: Path, lines: Any) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _source(step: Step, lines: list[Line]) -> Iterator[str]:
    yield f"# after {step.name}{'' if step.ran else ', which was disabled'}"
    yield from source(lines)


def _fate(entry: LinearRecord) -> str:
    fate = f"{entry.plan} in group {entry.group}" if entry.plan else f"{entry.reason}: {entry.detail}"
    return f"{plain(entry.name)}\t{entry.operators or '-'}\t{plain(fate)}"


def _input(node: Node, name: str) -> dict[str, Any]:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        kept = {"value": hint} if isinstance(hint := _hint(fake), (int, float, bool)) else {"object": str(type(fake))}
        return {"name": node.name, "path": name, **kept}
    return {
        "name": node.name,
        "path": name,
        "dtype": str(fake.dtype),
        "device": str(fake.device),
        "size": [_hint(size) for size in fake.shape],
        "stride": [_hint(step) for step in fake.stride()],
        "symbolic": not all(isinstance(size, int) for size in fake.shape),
    }


def _hint(size: Any) -> Any:
    """A size as a number: the one that it had in the call that was compiled, where it is symbolic."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size.node.hint if size.node.hint is not None else 2
    return size


def _constant(node: Node) -> Any:
    value = node.meta.get("val")
    owner = node.graph.owning_module
    real = getattr(owner, str(node.target), None) if owner is not None else None
    if isinstance(real, torch.Tensor) and real.numel() <= FEW_NUMBERS and type(real) in (torch.Tensor,):
        return {"dtype": str(real.dtype), "device": str(real.device), "size": list(real.shape), "is": real.tolist()}
    if isinstance(value, torch.Tensor):
        return {"dtype": str(value.dtype), "device": str(value.device), "size": [_hint(s) for s in value.shape]}
    return None
