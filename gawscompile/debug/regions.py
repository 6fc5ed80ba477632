"""Reports of a model whose blocks are compiled one by one: ``layer.compile(backend="gaws")``, diffusers'
``compile_repeated_blocks``, accelerate's ``compile_regions``. Blocks that share a compiled graph are each told with its
groups."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from gawscompile.ir.records import GraphRecord
from gawscompile.observe.store import RECORDS

ENTRY = "_compiled_call_impl"
"""What torch.nn.Module calls in place of itself, once compiled in place."""


def regions(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules inside `model` that are compiled by themselves, by path, without those inside of others.

    Compiled in place (``module.compile()``), or put there by torch.compile as an `OptimizedModule`.
    """
    found: dict[str, torch.nn.Module] = {}
    for path, module in model.named_modules():
        compiled = isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        if path and compiled and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


class Regional:
    """Runs a model, its regions compiled anew with `compiled`, and notes which graph each of them ran."""

    def __init__(self, model: torch.nn.Module, backend: Any, compiled: Callable[[Any, Any], Any]) -> None:
        """`compiled`: of a function and a backend, what torch.compile makes. All regions share it, as they would."""
        self.model, self.found = model, regions(model)
        self.ran: dict[tuple[str, int], GraphRecord] = {}
        self._now = ""

        def noted(graph: Any, inputs: Any, **settings: Any) -> Any:
            mark = len(RECORDS)
            run = backend(graph, inputs, **settings)
            records = RECORDS.since(mark)

            def call(*given: Any) -> Any:
                self.ran |= {(self._now, id(record)): record for record in records}
                return run(*given)

            return call

        self._compiled = compiled(_region, noted)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        entries = {path: "forward" if isinstance(m, OptimizedModule) else ENTRY for path, m in self.found.items()}
        kept = {path: getattr(module, entries[path]) for path, module in self.found.items()}
        try:
            for path, module in self.found.items():
                setattr(module, entries[path], self._entry(path, module))
            return self.model(*args, **inputs)
        finally:
            for path, module in self.found.items():
                setattr(module, entries[path], kept[path])

    def _entry(self, path: str, module: Any) -> Any:
        if isinstance(module, OptimizedModule):
            path, module = f"{path}._orig_mod", module._orig_mod

        def enter(*args: Any, **inputs: Any) -> Any:
            self._now = path
            return self._compiled(module, args, inputs)

        return enter

    def records(self) -> list[GraphRecord]:
        """A record for each region, its paths those of the whole model."""
        return [_placed(record, path) for (path, _), record in self.ran.items()]

    def note(self) -> str:
        graphs = len({id(record) for record in self.ran.values()})
        return f"{len(self.found)} regions are compiled one by one and share {graphs} graph(s)"


def _region(self: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    return self._call_impl(*args, **inputs)


def _placed(record: GraphRecord, path: str) -> GraphRecord:
    placed = copy.deepcopy(record)
    for entry in placed.linears:
        entry.path = f"{path}.{entry.path}"
    for group in placed.groups:
        group.members = [f"{path}.{member}" for member in group.members]
    return placed
