"""What a graph reads of globals, functions, classes and configurations is watched, and every change is seen."""

from __future__ import annotations

import builtins
import functools
import types

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from gawscompile.watch import found, guards, unchanged
from tests.graphs import small_llama, tokens
from tests.watch.test_unchanged import Counting, patched, watching

pytestmark = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")

SHIFT = 1.0
COUNT = 0
outside = types.ModuleType("outside")
outside.factor = 1.5
outside.work = lambda x: x * 1.25


def helper(x, by=2.5):
    return x * by + SHIFT


def _scaling(by):
    def scaled(x):
        return x * by

    return scaled


scaled = _scaling(3.0)


class Base:
    level = 1.0

    def raised(self, x):
        return x + self.level

    @property
    def low(self):
        return 0.5


class Settings(Base):
    pass


class Kind(type):
    pass


class Numbers(metaclass=Kind):
    level = 2.0


class Front:
    extra = 3.0


class Hollow:
    pass


class Optional(Front, Hollow):
    pass


@functools.cache
def known():
    return 1.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.settings = nn.Linear(8, 8), Settings()
        self.config, self.optional = GPT2Config(n_embd=8, n_head=2), Optional()

    def forward(self, x):
        y = scaled(helper(self.linear(x)))
        y = self.settings.raised(outside.work(y)) * outside.factor
        y = y * self.config.hidden_size + self.config.n_head * abs(-1.0) + known() * Numbers.level
        if hasattr(self.optional, "extra"):
            y = y * 2
        return y + self.settings.low + len(type(self.settings).__name__) * type(self.settings).level


def _other(x, by=2.0):
    return x * by - SHIFT


CHANGES = {  # a method of the class of Settings is no such change: Dynamo has no guard on it

    "a number": lambda patch, model: patch.setitem(globals(), "SHIFT", 4.0),
    "a function": lambda patch, model: patch.setitem(globals(), "helper", _other),
    "a function's code": lambda patch, model: patch.setattr(helper, "__code__", _other.__code__),
    "a function's defaults": lambda patch, model: patch.setattr(helper, "__defaults__", (5.0,)),
    "a function's defaults, twice": lambda patch, model: [
        setattr(helper, "__defaults__", (float(number),)) for number in ("6.5", "7.5")
    ],
    "what a function closes over": lambda patch, model: setattr(scaled.__closure__[0], "cell_contents", 7.0),
    "what a function closes over, twice": lambda patch, model: [
        setattr(scaled.__closure__[0], "cell_contents", float(number)) for number in ("6.5", "7.5")
    ],
    "a module's number": lambda patch, model: patch.setattr(outside, "factor", 2.5),
    "a module's function": lambda patch, model: patch.setattr(outside, "work", lambda x: x * 9),
    "a builtin": lambda patch, model: patch.setattr(builtins, "abs", lambda x: 11.0),
    "a class's number": lambda patch, model: patch.setattr(Base, "level", 6.0),
    "a number in front of it": lambda patch, model: patch.setattr(Settings, "level", 6.0, raising=False),
    "a class's bases": lambda patch, model: setattr(Optional, "__bases__", (Hollow,)),
    "a class's class": lambda patch, model: setattr(
        Numbers, "__class__", type("Other", (Kind,), {"level": property(lambda self: 5.0)})
    ),
    "a property": lambda patch, model: patch.setattr(Base, "low", property(lambda self: 8.0)),
    "a property's code": lambda patch, model: patch.setattr(
        Base.low.fget, "__code__", (lambda self: 8.0).__code__
    ),
    "a configuration's number": lambda patch, model: setattr(model.config, "n_head", 4),
    "one that it keeps by another name": lambda patch, model: setattr(model.config, "n_embd", 16),
    "that by the name it has outside": lambda patch, model: setattr(model.config, "hidden_size", 16),
    "the names that it keeps": lambda patch, model: patch.setitem(
        type(model.config).attribute_map, "hidden_size", "n_head"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_change_is_seen(change, monkeypatch):
    helper.__defaults__, scaled.__closure__[0].cell_contents = (float("2.5"),), float("3.5")
    Optional.__bases__, Numbers.__class__ = (Front, Hollow), Kind
    made, checks = [], []
    model, x = Model().eval(), torch.randn(2, 8)
    with patched(unchanged.Unchanged, "__init__", lambda self, *given: made.append(self)):
        call = torch.compile(model, backend=watching)
        call(x)
    for one in made:
        one.guards = Counting(one.guards, checks)
    for _ in range(2):  # the first compile gave the globals new names
        call(x)
    checks.clear()
    before = call(x)
    assert not checks and len(made) == 3, "modules, configurations and globals have a watch each"
    with monkeypatch.context() as patch:
        CHANGES[change](patch, model)
        want = model(x)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(call(x), want)
        torch.testing.assert_close(call(x), want)


def test_a_tuple_is_compared_by_its_size_and_its_items():
    """Another one may lie where one was freed. Numbers are held, so that no other number does."""
    number = float("2.5")
    one, seen = (number, [1]), found.Found()
    seen.add(one)
    assert {found.word(place): place for place in seen.words}.keys() >= {2, id(number), id(one[1])}
    assert any(held is number for held in seen.held) and not any(held is one[1] for held in seen.held)


@torch.no_grad()
def test_globals_that_are_written_in_every_call_are_left_to_the_guards(monkeypatch):
    model, x, made = Model().eval(), torch.randn(2, 8), []
    with patched(unchanged.State, "__init__", lambda self, *given: made.append(self)):
        call = torch.compile(model, backend=watching)
        for i in range(100):
            monkeypatch.setitem(globals(), "COUNT", i)
            torch.testing.assert_close(call(x), model(x))
        assert 0 < len(made) < 25
        monkeypatch.setitem(globals(), "SHIFT", 9.0)
        torch.testing.assert_close(call(x), model(x))


@torch.no_grad()
def test_what_another_thread_writes_while_a_watch_is_made_is_seen(monkeypatch):
    model, x = Model().eval(), torch.randn(2, 8)
    call = torch.compile(model, backend=watching)
    call(x)
    real, writes = found.Paths.follow, []

    def follow(self, variables):
        seen = real(self, variables)
        if not writes:
            writes.append(monkeypatch.setitem(globals(), "SHIFT", 8.0))
        return seen

    monkeypatch.setattr(found.Paths, "follow", follow)
    monkeypatch.setitem(globals(), "COUNT", 5)  # has a watch made
    call(x)
    assert writes
    torch.testing.assert_close(call(x), model(x))


@torch.no_grad()
def test_each_group_changes_in_its_own_time():
    model, x, made = Model().eval(), torch.randn(2, 8), []
    with patched(unchanged.Unchanged, "__init__", lambda self, *given: made.append(self)):
        call = torch.compile(model, backend=watching)
        call(x)
    call(x)
    call(x)
    checked = {}
    for one in made:
        one.guards = Counting(one.guards, checked.setdefault(one.said[0].split(" on ")[1], []))
    for _ in range(20):
        model.config.is_causal = True  # as transformers does before a layer's forward
        del model.config.is_causal
        Base().level = 5.0
        nn.Linear(2, 2).register_forward_hook(print)
        call(x)
    checks = {what.split()[0]: len(seen) for what, seen in checked.items()}
    assert checks["configurations"] and not checks["globals"], checks
    model.config.n_head = 8
    torch.testing.assert_close(call(x), model(x))


@torch.no_grad()
def test_few_guards_of_a_model_are_checked_in_every_call(monkeypatch):
    counts, divided = [], guards.standing_alone

    def counting(*given):
        alone = divided(*given)
        counts.append((len(alone), sum(alone)))
        return alone

    monkeypatch.setattr(guards, "standing_alone", counting)
    torch.compile(small_llama(layers=1), backend=watching)(tokens(1, 5), use_cache=False)
    ((all_of_them, alone),) = counts
    assert all_of_them > 500 and alone < all_of_them / 20
