"""Run as two processes, by rank: one of them fails in some way, and both go on alike.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=… python -m tests.distributed.agreement FOLDER
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.graph
import torch.distributed as dist
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.distributed._functional_collectives import all_reduce

from gawscompile import backend
from gawscompile.ir.records import GraphRecord, Reason
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES
from gawscompile.observe.store import RECORDS
from gawscompile.passes import join_collectives
from gawscompile.planning import cost, devices
from gawscompile.planning.table import PlanTable

K, N, R, PATIENCE = 64, 48, 4, 5.0


class Rows(torch.nn.Module):
    """A row-parallel projection with LoRA, of which each rank has its shard."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole = [torch.randn(*size) / 4 for size in ((N, K), (R, K), (N, R))]
        weight, a, b = self.whole
        mine = slice(dist.get_rank() * K // 2, (dist.get_rank() + 1) * K // 2)
        self.weight, self.a = torch.nn.Parameter(weight[:, mine].clone()), torch.nn.Parameter(a[:, mine].clone())
        self.b = torch.nn.Parameter(b)
        self.mine, self.group = mine, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = torch.nn.functional.linear
        base = all_reduce(linear(x, self.weight), "sum", self.group)
        return base + linear(all_reduce(linear(x, self.a), "sum", self.group), self.b) * 0.5

    def want(self, x: torch.Tensor) -> torch.Tensor:
        weight, a, b = self.whole
        return x @ weight.T + x @ a.T @ b.T * 0.5


def call(group: Any = dist.group.WORLD) -> GraphRecord:
    """A compile and a right answer; what became of the graph."""
    torch._dynamo.reset()
    mark = len(RECORDS)
    model = Rows(group or dist.group.WORLD)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = torch.compile(model, backend="gaws")(x[:, model.mine].contiguous())
    torch.testing.assert_close(got, model.want(x), rtol=1e-4, atol=1e-5)
    found = RECORDS.since(mark)
    return found[0] if found else GraphRecord("none")


def raises_once(real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, which fails the first time."""
    failed = []

    def function(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(True)
            raise ValueError("planted")
        return real(*args, **kwargs)

    return function


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """The warnings of this rank."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gawscompile")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def well(rank: int) -> None:
    """Fused, planned for the first rank's machine, and no kernel is built twice."""
    fast = {"library_bandwidth": dict.fromkeys(DTYPES, 1e15), "library_rate": dict.fromkeys(DTYPES, 1e18)}
    odd = dataclasses.replace(devices.cpu(), name="another", library_launch=1e-12, **fast)  # on which the library wins
    with mock.patch.object(devices, "cpu", lambda: odd) if rank else contextlib.nullcontext(), said() as warnings:
        record = call()
    assert record.linears[0].status == "fused" and record.collectives == ["all_reduce sum 0"], record
    assert not warnings, warnings
    built: list[Any] = [None, None]
    dist.all_gather_object(built, (counters["gaws"]["built"], record.groups[0].plan))
    (mine, plan), (others, their_plan) = built
    assert mine + others == 1 and plan == their_plan, built
    own = cost.plan(KernelSpec.parse(record.groups[0].spec), odd)
    assert plan != str(PlanTable(((own.table.pick(3), None),))), own


def caches(rank: int) -> None:
    """The first rank has a warm cache, the other one has none, and is late."""
    with torch._inductor.config.patch(force_disable_caches=rank == 1):
        time.sleep(rank)
        passes = counters["gaws"]["passes"]
        assert call().linears[0].status == "fused"
        assert (counters["gaws"]["passes"] > passes) == (rank == 1)


FAULTS = {
    "a pass": (join_collectives, "_join", "undone: join_collectives, at "),
    "the compile": (torch._inductor.graph.GraphLowering, "run", "ValueError: planted"),
    "a kernel": (backend, "_build", "ValueError: planted"),
}


def failures(rank: int) -> None:
    """The second rank fails: all go on without us, and the first one says why."""
    for what, (owner, name, told) in FAULTS.items():
        planted = mock.patch.object(owner, name, raises_once(getattr(owner, name)))
        settings = torch._inductor.config.patch(force_disable_caches=True)
        with planted if rank else contextlib.nullcontext(), settings, said() as warnings:
            record = call()
        assert not [entry for entry in record.linears if entry.status == "fused"], record
        together = [line for line in warnings if "rank 1" in line and told in line]
        assert len(together) == (rank == 0), (what, rank, warnings)
        assert rank or Reason.RANKS.value in record.notes[-1]


def gone(rank: int) -> None:
    """The second rank dies: the first one says so once the group's time is over."""
    impatient = dist.new_group(timeout=datetime.timedelta(seconds=PATIENCE))
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    try:
        call(impatient)
    except BackendCompilerFailed as error:
        assert "rank 1 did not compile" in str(error), error
    else:
        raise AssertionError("a lone rank went on")
    assert time.monotonic() - began < PATIENCE + 30


def main(folder: str, *names: str) -> None:
    rank = int(os.environ["RANK"])
    os.environ["GAWS_CACHE_DIR"] = f"{folder}/gaws"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=240))
    for name in names or ("well", "caches", "failures", "gone"):
        globals()[name](rank)
    print("right", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
