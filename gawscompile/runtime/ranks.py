"""Ranks that share a graph with collectives compile it alike, or leave it to Inductor together.

Every rank compiles for itself. Where one of them fails and the others go on, their graphs have other collectives than
its own: they wait for each other until a timeout, or add up what does not belong together. So all ranks of a group
meet twice for each graph that Dynamo gives them: before the passes, when they take the first rank's machine for the
one to plan for, and at the end, when they compare what became of the graph. That is known on a warm start too, in which
no pass runs. Where one failed, or made something else of it, no rank keeps what it compiled.

They meet in the group's store, and not by a collective: a rank that compiles while another one runs must not disturb
the other's sums. A rank that does not come within the group's timeout is an error on all others, which names it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from gawscompile.analysis.collectives import is_collective
from gawscompile.ir.records import GraphRecord, plain

Machine = TypeVar("Machine")


class RanksError(RuntimeError):
    """The ranks of a group cannot go on together; the message names the one that it is because of."""


class Ranks:
    """The ranks that compile one graph; only this one, where the graph has no collectives."""

    def __init__(self, group: Any = None, kind: str = "cpu") -> None:
        self._group = group
        self._kind = kind

    @staticmethod
    def of(gm: torch.fx.GraphModule, inputs: Sequence[Any], kind: str) -> Ranks:
        """Those of the process group of Dynamo's graph `gm`, on a `kind` of device: of the smallest one that has all
        ranks with which it talks."""
        if not dist.is_available() or not dist.is_initialized():
            return Ranks()
        groups = [group for group in _groups(gm, inputs) if group.size() > 1 and dist.get_backend(group) != "fake"]
        if not groups:
            return Ranks()
        spoken_to = set().union(*map(dist.get_process_group_ranks, groups))
        whole = [g for g in (*groups, dist.group.WORLD) if spoken_to <= set(dist.get_process_group_ranks(g))]
        return Ranks(min(whole, key=lambda group: group.size()), kind)

    @property
    def alone(self) -> bool:
        return self._group is None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.alone or self._group.rank() == 0

    def machine(self, own: Machine) -> Machine:
        """The first rank's, where this one has its `own`: a dataclass of plain values, or None. Raises `RanksError`."""
        if self.alone:
            return own
        known = dataclasses.asdict(own) if own is not None else None  # type: ignore[call-overload]
        found = json.loads(self._meet(json.dumps(known))[0])
        if known is None or found is None or found.keys() != known.keys():
            return own  # another kind of device, or another version: what comes of that will not be alike
        return type(own)(**found)

    def objection(self, record: GraphRecord | None, failure: Exception | None) -> str:
        """Why no rank may run what it compiled, in one line; empty, if all of them may.

        `record`: what became of the graph here. `failure`: what went wrong here. Raises `RanksError`.
        """
        if self.alone:
            return _told(failure)
        made = {"passes": record.passes, "collectives": record.collectives} if record else {}
        plans = {f"{group.spec} at m = {group.tokens}": group.plan for group in record.groups} if record else {}
        notes = record.notes if record else []
        mine = {"failure": _told(failure), "made": made, "plans": plans, "notes": notes}
        answers = dict(zip(self._ranks, map(json.loads, self._meet(json.dumps(mine))), strict=True))
        for rank, answer in answers.items():
            if answer["failure"]:
                return f"rank {rank}: {answer['failure']}"
        one, *others = answers
        for rank in others:
            if (differs := _differ(answers[one], answers[rank])) is not None:
                return f"rank {rank} made something else of the graph than rank {one}{differs}"
        return ""

    @property
    def _ranks(self) -> list[int]:
        """As all ranks call them."""
        return dist.get_process_group_ranks(self._group)

    def _meet(self, said: str) -> list[str]:
        """What every rank of the group says at this meeting. Raises `RanksError` where one does not come."""
        store = self._group.get_group_store()
        number = _meetings[self._group] = _meetings.get(self._group, 0) + 1
        timeout = self._timeout(store)
        end = time.monotonic() + timeout.total_seconds()
        found = []
        for at, rank in enumerate(self._ranks):
            key = f"gaws/{number}/{at}"
            try:
                if not at:
                    store.set(f"gaws/{number}/{self._group.rank()}", said)
                store.wait([key], datetime.timedelta(seconds=max(0.001, end - time.monotonic())))
                found.append(store.get(key).decode())
            except RuntimeError as error:  # also where the store has gone with its process
                raise RanksError(
                    f"rank {rank} did not compile what this rank compiles within {timeout}, the timeout of their "
                    f"process group: it has died, is too slow, or runs something else ({plain(str(error))})"
                ) from error
        return found

    def _timeout(self, store: Any) -> datetime.timedelta:
        try:
            found: datetime.timedelta = self._group._get_backend(torch.device(self._kind)).options._timeout
        except (AttributeError, RuntimeError):  # another version, or a backend that has none
            found = store.timeout
        return found


_meetings: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of each group, so far: they are as many on all ranks


def _groups(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The process groups of a graph as Dynamo gives it: of its collectives, and of the meshes of its inputs."""
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for value in inputs:
        for group in value.device_mesh.get_all_groups() if isinstance(value, DTensor) else ():
            found[group.group_name] = group
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if is_collective(node):
                named = node.kwargs.get("group_name", node.args[-1] if node.args else None)
                if isinstance(named, str):
                    found[named] = dist.distributed_c10d._resolve_process_group(named)  # type: ignore[arg-type]
                elif isinstance(named, dist.ProcessGroup):
                    found[named.group_name] = named
    return list(found.values())


def _told(failure: Exception | None) -> str:
    return f"{type(failure).__name__}: {plain(str(failure))}" if failure else ""


def _differ(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What distinguishes two ranks' answers; None, if nothing does that counts. Shards of other sizes have other
    groups, but what is the same group on both has the same plan."""
    if one["made"] == other["made"]:
        shared = one["plans"].keys() & other["plans"].keys()
        unlike = [spec for spec in sorted(shared) if one["plans"][spec] != other["plans"][spec]]
        if not unlike:
            return None
        return f": {other['plans'][unlike[0]]}, not {one['plans'][unlike[0]]}, for {unlike[0]}"
    notes = [note for note in other["notes"] if note not in one["notes"]]
    notes += [note for note in one["notes"] if note not in other["notes"]]
    return f": {notes[0]}" if notes else ""
