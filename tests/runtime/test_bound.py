"""Parameters are gathered once: again after every change, never for another model, and they are not kept in memory."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from gawscompile.runtime import bound
from gawscompile.watch import unchanged
from gawscompile.watch.guards import watch_frame

pytestmark = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")


class Model(nn.Module):
    """Two linears, a buffer, and a list that Dynamo's code has to write to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 3)})
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: torch.Tensor, *more: torch.Tensor, kept: list, scale: float = 1.0, **named: torch.Tensor):
        y = self.inner["down"](self.inner["up"](x).relu()) * scale + self.shift
        y = y + sum(more) + sum(named.values())
        kept.append(y)
        return {"answer": y, "twice": 2 * y}


def backend(gm, inputs):
    watch_frame(watch=True, bind=True)
    return gm.forward


@pytest.fixture
def gathered():
    """How often all that a graph reads was gathered, and how often only what may change was."""
    counts = {"all": 0, "others": 0}

    def counting(self, values):
        gather = plain(self, values)
        kind = "all" if len(values) == len(self._values) else "others"

        def counted(*variables):
            counts[kind] += 1
            return gather(*variables)

        bound.skip_code(counted.__code__)
        return counted

    plain = bound.BoundCall._gather
    with mock.patch.object(bound.BoundCall, "_gather", counting):
        yield counts


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


@torch.no_grad()
def check(call, model, *more, **named):
    x = torch.randn(2, 4)
    mine, eager = [], []
    got = call(x, *more, kept=mine, **named)
    want = model(x, *more, kept=eager, **named)
    torch.testing.assert_close((got, mine), (want, eager))
    assert len(mine) == 1 and mine[0] is got["answer"]


def test_once_and_again_after_each_change(gathered):
    model = Model()
    call = compiled(model)
    for _ in range(4):
        check(call, model, torch.randn(3), other=torch.randn(3))
    assert gathered == {"all": 1, "others": 3}
    model.inner["up"].weight = nn.Parameter(torch.randn(6, 4))
    check(call, model, torch.randn(3), other=torch.randn(3))
    assert gathered == {"all": 2, "others": 3}
    for change, times in (
        (lambda: model.inner["down"].bias.data.add_(1), 0),  # the tensor is still the one that was gathered
        (lambda: setattr(model.inner["down"].bias, "data", torch.randn(3)), 0),
        (lambda: model.register_buffer("shift", torch.randn(3)), 1),
        (lambda: model.inner.update({"down": nn.Linear(6, 3)}), 1),
    ):
        before = gathered["all"]
        change()
        check(call, model, torch.randn(3), other=torch.randn(3))
        assert gathered["all"] == before + times
    others = gathered["others"]
    check(call, model, torch.randn(3), other=torch.randn(3))
    assert gathered["others"] == others + 1


def test_what_was_gathered_keeps_no_parameter_alive():
    model = Model()
    call = compiled(model)
    for _ in range(3):
        check(call, model)
    old = weakref.ref(model.inner["up"].weight)
    model.inner["up"].weight = nn.Parameter(torch.randn(6, 4))
    assert old() is None
    check(call, model)


def test_models_of_one_class_each_have_their_own(gathered):
    """One code object, whose guards hold for all of them."""
    models = [Model() for _ in range(3)]
    calls = [compiled(models[0]), *(torch.compile(m, backend=backend) for m in models[1:])]
    for _ in range(3):
        for model, call in zip(models, calls, strict=True):
            check(call, model)
    assert gathered == {"all": 3, "others": 6}


def test_threads_each_have_their_own():
    models = [Model(), Model()]
    calls = [compiled(models[0]), torch.compile(models[1], backend=backend)]
    for model, call in zip(models, calls, strict=True):
        check(call, model)
    failed = []

    def run(call, model):
        try:
            for _ in range(200):
                check(call, model)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=one) for one in zip(calls, models, strict=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


def test_a_call_that_the_guard_was_not_asked_of_reads_nothing_old():
    """A state is good for the one call that its guard let through."""
    model = Model()
    call = compiled(model)
    for _ in range(3):
        check(call, model)
    with mock.patch.object(unchanged.Unchanged, "__call__", lambda self, scope: True):
        check(call, model)
        model.inner["up"].weight = nn.Parameter(torch.randn(6, 4))
        check(call, model)


def test_a_model_that_is_gone_leaves_nothing():
    def run():
        model = Model()
        check(call_of(model), model)
        check(call_of(model), model)
        return [weakref.ref(one) for one in model.parameters()]

    def call_of(model):
        return torch.compile(model, backend=backend)

    torch._dynamo.reset()
    kept = Model()
    check(call_of(kept), kept)  # the code has an entry that stays
    gone = run()
    gc.collect()
    assert all(one() is None for one in gone)


@pytest.mark.parametrize("what", ["global", "closure", "break"])
def test_what_is_not_understood_stays_as_it_is(what, caplog):
    table, model = {"w": torch.randn(3)}, Model()
    globals()["TABLE"] = table

    def closure(x):
        return model.inner["up"](x) @ model.inner["up"].weight * table["w"].sum()

    def reads_globals(x):
        return model.inner["up"](x) * TABLE["w"].sum()  # noqa: F821

    def breaks(x):
        y = model.inner["up"](x)
        torch._dynamo.graph_break()
        return model.inner["down"](y) * table["w"]

    function = {"global": reads_globals, "closure": closure, "break": breaks}[what]
    torch._dynamo.reset()
    call = torch.compile(function, backend=backend)
    with torch.no_grad(), caplog.at_level(logging.INFO, "gawscompile"):
        for _ in range(3):
            x = torch.randn(2, 4)
            torch.testing.assert_close(call(x), function(x))
            table["w"] = torch.randn(3)
            model.inner["up"].weight = nn.Parameter(torch.randn(6, 4))
    said = [record.message for record in caplog.records if "gathered in every call" in record.message]
    assert bool(said) == (what == "global"), said


def test_sizes_that_are_symbols_are_asked_for_in_every_call(gathered):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    torch._dynamo.reset()
    call = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (2, 3, 5, 7):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(call(x), model(x))
    assert gathered["others"] >= 2
