"""Runs of a bank's pool: none overlap, all come back, and none is lent again while a snapshot may read it."""

from __future__ import annotations

import gc
import random

import numpy as np

from gawscompile.banks.arena import Arena, whole
from gawscompile.ir.banked import UNIT


def test_random_runs_never_overlap_and_all_come_back():
    numbers, arena, lent = random.Random(0), Arena(1000 * UNIT + 7), {}
    refused = 0
    for _ in range(3000):
        if lent and numbers.random() < 0.5:
            begin = numbers.choice(list(lent))
            arena.give_back([begin], [lent.pop(begin)])
            continue
        count = numbers.randint(1, 90 * UNIT)
        found = arena.take([count])
        if found is None:
            refused += 1
            continue
        (begin,) = found
        assert begin % UNIT == 0 and begin + count <= arena.size
        assert all(begin + whole(count) <= other or other + whole(size) <= begin for other, size in lent.items())
        lent[begin] = count
    assert refused > 50
    for begin, count in lent.items():
        arena.give_back([begin], [count])
    assert arena.take([arena.size]) == [0]


def test_what_a_snapshot_may_read_rests():
    arena = Arena(10 * UNIT)
    assert arena.take([10 * UNIT]) == [0]
    before = np.zeros(1)
    arena.read_by(before)
    arena.give_back([0], [10 * UNIT])
    after = np.zeros(1)
    arena.read_by(after)
    assert arena.take([UNIT]) is None and arena.resting
    del before
    gc.collect()
    assert arena.take([UNIT]) == [0] and not arena.resting  # `after` is of a time when nothing had that run any more


def test_runs_that_touch_become_one():
    arena = Arena(4 * UNIT)
    assert arena.take([UNIT] * 4) == [0, UNIT, 2 * UNIT, 3 * UNIT] and arena.take([1]) is None
    for begin in (UNIT, 3 * UNIT, 0, 2 * UNIT):
        arena.give_back([begin], [UNIT])
    assert arena.take([4 * UNIT]) == [0]


def test_runs_lie_apart_where_there_is_no_room_for_all_together():
    arena = Arena(6 * UNIT)
    arena.take([UNIT] * 6)
    for begin in (0, UNIT, 3 * UNIT, 5 * UNIT):
        arena.give_back([begin], [UNIT])
    assert arena.take([UNIT, 2 * UNIT, 2 * UNIT]) is None  # and nothing is lost by that
    assert arena.take([UNIT + 1, 3, UNIT]) == [0, 3 * UNIT, 5 * UNIT]
