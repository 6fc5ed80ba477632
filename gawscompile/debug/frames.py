"""What Dynamo made of a model beside our graphs: where it broke, what it compiled again, what it checks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch._dynamo.utils import counters, get_compilation_metrics

from gawscompile.runtime.recompile_limits import LIMITS


@dataclass
class Trouble:
    """A graph break, a recompile, or a function compiled no more: how often, why, and what to do about it."""

    kind: str
    count: int
    cause: str
    remedy: str


def breaks() -> Counter[str]:
    """Graph breaks of this process so far, by reason."""
    return Counter(counters["graph_break"])


def broken(before: Counter[str]) -> list[Trouble]:
    """The breaks since `before`."""
    found = []
    for reason, count in (breaks() - before).items():
        lines = [line.strip() for line in reason.splitlines()]
        told = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
        hints = [line.removeprefix("Hint: ") for line in lines if line.startswith("Hint: ")]
        remedy = hints[0] if hints else "torch.compile(…, fullgraph=True) raises there, and shows the line"
        found.append(Trouble("graph break", count, ": ".join([lines[0], *told[:1]]), remedy))
    return found


REMEDIES = (
    ("size mismatch", "compile with dynamic=True, or mark the dimension: torch._dynamo.mark_dynamic"),
    ("grad_mode", "call it under torch.no_grad() always, or never"),
    ("scaling", "make scalings tensors: peft.utils.hotswap.prepare_model_for_compiled_hotswap"),
    (
        "adapter",
        "switching adapters changes the graph: it is compiled once for each, and all are kept, "
        "up to torch._dynamo.config.recompile_limit",
    ),
    ("dtype mismatch", "call it with one dtype"),
)


def recompiled() -> list[Trouble]:
    """Recompiles of this process so far (torch keeps the last 64 compiles), with the guard that failed."""
    reasons = Counter(metric.recompile_reason for metric in get_compilation_metrics() if metric.recompile_reason)
    return [Trouble("recompile", count, reason, _remedy(reason)) for reason, count in reasons.items()]


def limited() -> list[Trouble]:
    """Functions of this process that torch compiles no more, since `torch._dynamo.reset`."""
    return [Trouble("recompile limit", 1, hit.cause, hit.remedy) for hit in LIMITS.hits]


def _remedy(reason: str) -> str:
    known = (remedy for sign, remedy in REMEDIES if sign in reason)
    return next(known, "keep what the guard names as it was, or raise torch._dynamo.config.recompile_limit")


def guards(since: float) -> int:
    """Guards of the frames whose compile began at `since` (``time.time()``) or later; torch keeps the last 64."""
    return sum(metric.guard_count or 0 for metric in get_compilation_metrics() if (metric.start_time or 0) >= since)
