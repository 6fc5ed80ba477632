"""What a graph reads of a cache, or another object that is no module, is watched apart from the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from gawscompile.calibration.measure import graphs_compiled
from gawscompile.watch import guards, unchanged
from gawscompile.watch.found import TYPE, Found
from tests.graphs import small_llama
from tests.runtime.test_direct import deciding

pytestmark = pytest.mark.skipif(not unchanged.available(), reason="no watch on this Python")


class Layer:
    grows = False

    def __init__(self) -> None:
        self.keys, self.values = torch.randn(3, 4), torch.randn(3, 4)
        self.scale = 1.0


class Cache:
    def __init__(self) -> None:
        self.layers = [Layer(), Layer()]

    def length(self) -> int:
        return len(self.layers)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x, *, cache):
        y = self.inner(x) + self.shift
        for layer in cache.layers:
            y = y + (layer.keys.sum(0) * 2 + layer.values.sum(0)) * layer.scale * cache.length()
            if layer.grows:
                y = y + 1
        return y


@pytest.fixture
def checked(monkeypatch):
    """How often guards were checked in full: of modules, of others."""
    counts = {True: 0, False: 0}
    plain = unchanged.Unchanged.__init__

    class Counting:
        def __init__(self, guards, lasting):
            self.guards, self.lasting = guards, lasting
            self.check_verbose = guards.check_verbose

        def check(self, scope):
            counts[self.lasting] += 1
            return self.guards.check(scope)

    def made(self, guards, *given):
        paths, lasting = given[0], given[3]
        plain(self, Counting(guards, lasting) if paths.roots else guards, *given)

    monkeypatch.setattr(unchanged.Unchanged, "__init__", made)
    return counts


def watching(gm, inputs):
    guards.watch_frame(watch=True, bind=True)
    return gm.forward


@torch.no_grad()
def check(call, model, cache, x=None):
    x = torch.randn(2, 4) if x is None else x
    torch.testing.assert_close(call(x, cache=cache), model(x, cache=cache))


def test_it_is_checked_only_after_a_change_and_the_model_apart(checked):
    model, cache = Model(), Cache()
    call = torch.compile(model, backend=watching)
    for _ in range(4):
        check(call, model, cache)
    before = dict(checked)
    for _ in range(3):
        check(call, model, cache)
    assert checked == before
    cache.layers[1].keys = torch.randn(3, 4)
    for _ in range(3):
        check(call, model, cache)
    assert checked == {True: before[True], False: before[False] + 2}  # once more when what is there was noted
    model.inner.weight = nn.Parameter(torch.randn(4, 4))
    check(call, model, cache)
    assert checked == {True: before[True] + 2, False: before[False] + 2}


def _alias(cache):
    cache.layers[0].values = cache.layers[0].keys


def _shadow(cache):
    cache.length = lambda: 5


CHANGES = {
    "another shape": lambda cache: setattr(cache.layers[0], "keys", torch.randn(1, 4)),
    "another shape in place": lambda cache: cache.layers[0].keys.resize_(2, 4).fill_(1),
    "another number": lambda cache: setattr(cache.layers[1], "scale", 2.5),
    "one more layer": lambda cache: cache.layers.append(Layer()),
    "another layer": lambda cache: cache.layers.__setitem__(0, type("Other", (Layer,), {"grows": True})()),
    "a class's attribute": lambda cache: setattr(type(cache.layers[0]), "grows", True),
    "a method of its own": _shadow,
    "one tensor twice": _alias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change, monkeypatch):
    monkeypatch.setattr(Layer, "grows", False)
    model, cache = Model(), Cache()
    call = torch.compile(model, backend=watching)
    for _ in range(4):
        check(call, model, cache)
    before = graphs_compiled()
    CHANGES[change](cache)
    for _ in range(3):
        check(call, model, cache)
    assert graphs_compiled() == before + 1


def test_a_tensor_that_is_given_and_lies_in_the_cache_too():
    model, cache = Model(), Cache()
    call = torch.compile(model, backend=watching, dynamic=False)
    for _ in range(4):
        check(call, model, cache, torch.randn(3, 4))
    before = graphs_compiled()
    check(call, model, cache, cache.layers[1].values)
    assert graphs_compiled() == before + 1
    cache.layers[0].keys = model.shift.expand(3, 4).contiguous()
    check(call, model, cache, torch.randn(3, 4))


@pytest.mark.parametrize("whose", ["the cache's", "the model's"])
def test_a_tensor_that_is_the_models_and_lies_in_the_cache_too(whose):
    model, cache = Model(), Cache()
    model.shift = torch.randn(3, 4)
    call = torch.compile(model, backend=watching)
    x = torch.randn(3, 4)
    for _ in range(4):
        check(call, model, cache, x)
    before = graphs_compiled()
    if whose == "the cache's":
        model.shift = cache.layers[1].keys
    else:
        cache.layers[1].keys = model.shift
    for _ in range(3):
        check(call, model, cache, x)
    assert graphs_compiled() == before + 1


def test_sizes_that_are_marked_as_dynamic():
    model, cache = Model(), Cache()
    call = torch.compile(model, backend=watching)
    for _ in range(4):
        check(call, model, cache)
    before = graphs_compiled()
    torch._dynamo.mark_dynamic(cache.layers[0].keys, 0)
    check(call, model, cache)
    assert graphs_compiled() == before + 1


def test_a_list_is_compared_before_what_it_holds_is_read():
    """An item that was taken out is freed: nothing of it may be read any more."""
    cache, found = Cache(), Found()
    for value in (cache, cache.layers, cache.layers[0], cache.layers[0].keys):
        found.add(value)
    (behind,) = found.behind
    for item in (cache.layers[0], cache.layers[0].keys):
        assert found.words.index(id(item) + TYPE) >= behind


@dataclass
class Batch:
    keys: torch.Tensor
    layers: list = field(default_factory=list)


def test_new_objects_in_every_call_are_left_to_the_guards(checked):
    class Reads(nn.Module):
        def forward(self, x, *, cache):
            return x + cache.keys.sum(0)

    model = Reads()
    call = torch.compile(model, backend=watching)
    made = []
    plain = unchanged.State.__init__

    def counting(self, *given):
        made.append(given)
        plain(self, *given)

    unchanged.State.__init__ = counting
    try:
        for _ in range(60):
            check(call, model, Batch(torch.randn(3, 4)))
    finally:
        unchanged.State.__init__ = plain
    assert len(made) < 25


def test_a_cache_is_not_kept_alive():
    model, cache = Model(), Cache()
    call = torch.compile(model, backend=watching)
    for _ in range(4):
        check(call, model, cache)
    gone = weakref.ref(cache), weakref.ref(cache.layers[0].keys)
    del cache
    gc.collect()
    assert gone[0]() is None and gone[1]() is None
    check(call, model, Cache())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_models_decode_with_each_kind_of_cache(kind):
    model = small_llama()
    call = torch.compile(model, backend="gaws", dynamic=False)
    for _ in range(2):
        _, check_token = deciding(model, call, kind)
        for _ in range(5):
            check_token()
