"""PyTorch's own channels: ``TORCH_LOGS="+gaws"`` and structured traces (``TORCH_TRACE=DIR``, then ``tlparse DIR``)."""

from __future__ import annotations

import json
import logging

import torch
from torch._logging import _internal as torch_logs

from gawscompile.ir.records import GraphRecord, plain
from gawscompile.observe.channels import LOG, register
from gawscompile.observe.dump import Dump


def tracing() -> bool:
    """Whether structured traces go to a file: torch's handler takes itself away at the first message if not."""
    return any(isinstance(handler, torch_logs.LazyTraceHandler) for handler in torch_logs.trace_log.handlers)


def wanted(artifact: str) -> bool:
    """Whether anybody listens to an artifact."""
    return _logger(artifact).isEnabledFor(logging.DEBUG)


def _logger(artifact: str) -> logging.Logger:
    register()
    return torch_logs.getArtifactLogger(LOG, artifact)


def report(record: GraphRecord, dumps: list[Dump]) -> None:
    """One compiled graph, on the channels that are listened to."""
    register()
    fused = sum(entry.status == "fused" for entry in record.linears)
    groups = len(record.groups)
    what = f"{fused} of {len(record.linears)} linears fused into {groups} groups by {record.matches} rewrites"
    logging.getLogger(LOG).info("graph %s: %s", record.key[:8], what)
    if wanted("gaws_passes"):
        for name, count in record.passes.items():
            _logger("gaws_passes").debug("%s: %d matches", name, count)
        for dump in dumps:
            for name, text in dump.diffs():
                _logger("gaws_passes").debug("what %s changed:\n%s", name, text)
    if wanted("gaws_plans"):
        for group in record.groups:
            costs = "".join(f"\n  {plan}: {cost} seconds" for plan, cost in group.costs.items())
            head = f"group {group.index}: {', '.join(map(plain, group.members))}: m = {group.tokens}: {group.plan}"
            _logger("gaws_plans").debug("%s%s", head, costs)
    if wanted("gaws_rejections"):
        for entry in record.linears:
            if entry.status != "fused":
                detail = plain(entry.detail or "")
                _logger("gaws_rejections").debug("%s: %s: %s", plain(entry.name), entry.reason, detail)
    if wanted("gaws_kernels"):
        shown: set[str] = set()
        for group in record.groups:
            if group.kernel not in shown:
                shown.add(group.kernel)
                _logger("gaws_kernels").debug("kernel %s: %s", group.kernel, group.spec)
        for dump in dumps:
            for name, kernel in dump.kernels.items():
                for file, text in kernel["sources"].items():
                    _logger("gaws_kernels").debug("%s, %s:\n%s", name, file, text)


def trace(dumps: list[Dump]) -> None:
    """The files of dumps as artifacts of a structured trace."""
    for dump in dumps:
        texts = {f"gaws_{number:02d}_{name}": text for number, (name, text) in enumerate(dump.sources())}
        texts |= {f"gaws_{number:02d}_{name}_diff": text for number, (name, text) in enumerate(dump.diffs(), 1)}
        texts["gaws_plans"] = json.dumps(dump.record.get("groups", []), indent=1)
        texts["gaws_operators"] = "\n".join(dump.operators())
        for name, text in texts.items():
            torch._logging.trace_structured(
                "artifact",
                metadata_fn=lambda name=name: {"name": name, "encoding": "string"},  # type: ignore[misc]
                payload_fn=lambda text=text: text,  # type: ignore[misc]
            )
