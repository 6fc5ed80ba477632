"""What the compiler shows of itself: from contexts and graphs to dumps, logs, traces and files."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from gawscompile.analysis.paths import path_of_source
from gawscompile.ir.records import GraphRecord
from gawscompile.observe import logs
from gawscompile.observe.dump import Dump
from gawscompile.observe.store import RECORDS
from gawscompile.options import Options
from gawscompile.passes.context import Context
from gawscompile.planning.table import Program

log = logging.getLogger("gawscompile")


def wanted(options: Options) -> bool:
    """Whether anybody wants to see what the passes do to a graph: only then are graphs listed."""
    listened = logs.wanted("gaws_passes") or logs.wanted("gaws_kernels")
    return bool(_folder(options)) or listened or logs.tracing()


def _folder(options: Options) -> str:
    """Where dumps go: the option's folder, or Inductor's own debugging folder where ``TORCH_COMPILE_DEBUG=1``."""
    if options.dump or not torch._inductor.config.trace.enabled:
        return options.dump
    return os.path.join(torch._dynamo.utils.get_debug_dir(), "gaws")


def matches(context: Context) -> list[tuple[int, str, list[str]]]:
    """What the pass that has just run matched, for a dump."""
    found = []
    start = context.record.matches - len(context.matches)  # the branches of a torch.cond share a record
    for number, (stage, nodes) in enumerate(context.matches, start + 1):
        if stage == context.stage:
            entries = [entry.name for node in nodes for entry in node.meta.get("gaws_entries", [])]
            found.append((number, nodes[0].name, entries or [context.module_path(node) for node in nodes]))
    return found


def names(gm: torch.fx.GraphModule) -> list[str]:
    """What the inputs of a graph are called in the model: ``layers.0.self_attn.q_proj.weight``."""
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None)
        text = str(name() if callable(name) else name or node.name)
        if "_modules" in text or "_parameters" in text or "_buffers" in text:
            found.append(re.sub(r"(^|\.)_(parameters|buffers)\.", r"\1", path_of_source(text)))
        else:
            found.append(re.sub(r"^L\['(\w+)'\]", r"\1", text))
    return found


def show(number: int, record: GraphRecord, dumps: list[Dump], options: Options, keep: bool = False) -> None:
    """The `number`-th graph of the process, to everybody who looks: log, structured trace, files.

    `keep`: the dumps are kept in the cache, or come from there where there are none (a warm start). Where they cannot
    be written that is said, and costs no answer.
    """
    try:
        for dump in dumps:
            dump.record = dataclasses.asdict(record)
            dump.kernels = kernels(record)
        if keep:
            dumps = RECORDS.dumped(record.key, dumps)
        logs.report(record, dumps)
        if dumps and logs.tracing():
            logs.trace(dumps)
        where = _folder(options)
        for i, dump in enumerate(dumps if where else ()):
            branch = f"_{i}" * (len(dumps) > 1)  # of a torch.cond
            dump.write(Path(where).expanduser() / f"graph_{number:02d}_{record.key[:8]}{branch}")
    except Exception as error:
        if options.strict:
            raise
        log.warning("gaws: the dump of a graph was not written: %s: %s", type(error).__name__, error)


def kernels(record: GraphRecord) -> dict[str, dict[str, Any]]:
    """The kernels of all groups, for a dump: spec, formulas, and the generated source of every plan that runs."""
    found: dict[str, dict[str, Any]] = {}
    for name, text in dict.fromkeys((group.kernel, group.program) for group in record.groups):
        program = Program.parse(text)
        kernel = {"spec": str(program.spec), "formulas": program.spec.formulas(), "sources": {}}
        found.setdefault(name, kernel)["sources"].update(program.sources())
    return found
