"""What ranks say to each other of a graph; `tests/distributed/test_agreement.py` has them in processes of their own."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from gawscompile.ir.records import GraphRecord, GroupRecord
from gawscompile.planning import devices
from gawscompile.runtime.ranks import Ranks, RanksError


def record(plans: dict[str, str], passes: int = 1, notes: tuple[str, ...] = ()) -> GraphRecord:
    groups = [GroupRecord(i, [], "1", plan, spec, "") for i, (spec, plan) in enumerate(plans.items())]
    found = GraphRecord("key", groups=groups, passes={"lower": passes}, notes=list(notes))
    found.collectives = ["all_reduce sum 0"]
    return found


@pytest.fixture
def pair(monkeypatch):
    """Two ranks of one group, 4 and 9 as all call them, in this process."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 9])
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.3))

    class Group(SimpleNamespace):
        def __hash__(self) -> int:
            return id(self)

        def rank(self) -> int:
            return int(self.number)

        def get_group_store(self) -> Any:
            return store

    return [Ranks(Group(number=number)) for number in range(2)]


def both(pair: list[Ranks], ask: Any) -> list[Any]:
    """What each of two ranks is answered, that ask at a time."""
    answers: list[Any] = [None, None]

    def one(at: int) -> None:
        answers[at] = ask(at, pair[at])

    threads = [threading.Thread(target=one, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return answers


def objections(pair: list[Ranks], *records: GraphRecord | None, failures: Any = (None, None)) -> set[str]:
    return set(both(pair, lambda at, rank: rank.objection(records[at], failures[at])))


def test_alike_ranks_go_on(pair):
    for _ in range(3):  # one meeting after the other
        assert objections(pair, record({"k=4": "a"}), record({"k=4": "a"})) == {""}


def test_shards_of_other_sizes_may_have_other_plans(pair):
    assert objections(pair, record({"k=4": "a", "k=8": "b"}), record({"k=4": "a", "k=7": "c"})) == {""}


def test_all_are_told_what_differs(pair):
    (said,) = objections(pair, record({"k=4": "a"}), record({"k=4": "b"}))
    assert said == "rank 9 made something else of the graph than rank 4: b, not a, for k=4 at m = 1"
    (said,) = objections(pair, record({}), record({}, passes=2, notes=("undone: it",)))
    assert said == "rank 9 made something else of the graph than rank 4: undone: it"
    (said,) = objections(pair, record({}), None, failures=(None, ValueError("planted")))
    assert said == "rank 9: ValueError: planted"


def test_all_plan_for_the_first_ones_machine(pair):
    machines = [devices.cpu(), dataclasses.replace(devices.cpu(), name="another", launch=1.0)]
    assert both(pair, lambda at, rank: rank.machine(machines[at])) == [machines[0]] * 2
    assert both(pair, lambda at, rank: rank.machine(None)) == [None, None]
    assert both(pair, lambda at, rank: rank.machine(machines[at] if at else None)) == [None, machines[1]]


def test_a_rank_that_does_not_come_is_named(pair):
    with pytest.raises(RanksError, match=r"rank 9 did not compile .* within 0:00:00.3"):
        pair[0].machine(devices.cpu())


def test_a_lone_rank_asks_nobody():
    alone = Ranks()
    assert alone.machine("anything") == "anything" and alone.objection(record({}), None) == ""
    assert alone.objection(None, ValueError("planted")) == "ValueError: planted" and alone.first
