"""What a watch sees: every change that a guard in its place was about, and what costs it more than it saves."""

from __future__ import annotations

import contextlib
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

import gawscompile
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.watch import guards, unchanged
from gawscompile.watch.unchanged import Unchanged
from tests.graphs import Pair, small_llama, tokens

IDS = tokens(1, 5)


@torch.no_grad()
def logits(call):
    return call(IDS, use_cache=False).logits


def watching(gm, inputs):
    """A backend that compiles nothing."""
    guards.watch_frame(watch=True, bind=False)
    return gm.forward


def test_most_guards_on_parameters_are_checked_only_after_a_change(monkeypatch):
    model = small_llama(layers=1)
    counts, made, divided = [], [], guards.standing_alone

    def counting(entries, known):
        alone = divided(entries, known)
        matched = [stays for entry, stays in zip(entries, alone, strict=True) if entry.guard_type == "TENSOR_MATCH"]
        counts.append((len(matched), sum(matched)))
        return alone

    monkeypatch.setattr(guards, "standing_alone", counting)
    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)):
        compiled = torch.compile(model, backend=watching)
        logits(compiled)
    parameters = sum(1 for _ in model.parameters())
    (before, after), *_ = counts
    assert before >= parameters * 0.9 and after < before / 4
    guard, checks = of_modules(made), []
    guard.guards = Counting(guard.guards, checks)
    logits(compiled)
    logits(compiled)
    assert not checks, "nothing has changed since Dynamo tried its guards"
    model.base_model.model.lm_head.some_attribute = 1
    logits(compiled)
    logits(compiled)
    assert len(checks) == 2, "then, and once more when what is there was noted"


def of_modules(watches):
    """The one that watches modules and their parameters."""
    (watch,) = [watch for watch in watches if " on modules" in watch.said[0]]
    return watch


class Counting:
    """Guards that note that they are checked."""

    def __init__(self, guards, checks):
        self.guards, self.checks = guards, checks

    def check(self, scope):
        self.checks.append(scope)
        return self.guards.check(scope)


@contextlib.contextmanager
def patched(owner, name, also):
    """`owner.name` with `also` called after it."""
    before = getattr(owner, name)

    def both(self, *given):
        before(self, *given)
        also(self, *given)

    setattr(owner, name, both)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_storage_that_is_too_small_is_an_error_and_no_crash():
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 8)).eval()
    compiled, x = gawscompile.compile(model), tokens(1, 3, vocabulary=64)
    with torch.no_grad():
        compiled(x)
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(Exception, match="storage lacks 8192 bytes"):
            compiled(x)


def test_one_graph_serves_many_modules_and_keeps_none_alive():
    layers = [Pair() for _ in range(3)]
    for i, layer in enumerate(layers):
        torch.nn.init.normal_(layer.q.b, std=0.1 * (i + 1))
    x = torch.randn(2, 32)
    compiled = [gawscompile.compile(layer, dynamic=False) for layer in layers]
    with torch.no_grad():
        for _ in range(3):
            for layer, call in zip(layers, compiled, strict=True):
                torch.testing.assert_close(call(x), layer(x), rtol=1e-4, atol=1e-4)
        layers[1].k.weight.data = layers[1].k.weight.data.to(torch.float64)
        with pytest.raises(RuntimeError, match="dtype"):
            compiled[1](x)
        torch.testing.assert_close(compiled[2](x), layers[2](x), rtol=1e-4, atol=1e-4)
    alive = weakref.ref(layers[0])
    del layers, layer, call, compiled
    gc.collect()
    assert alive() is None


COUNTRY = {"large": False}  # of no module


OLD = []  # so that it is no other's memory


class Settings:
    def __init__(self):
        self.factor = 2.0


class Custom(torch.nn.Module):
    """Everything that a guard of a module of one's own looks at decides what it returns."""

    shift = 1.0

    @property
    def asked(self):
        if not COUNTRY["large"]:
            raise AttributeError("asked")
        return 1.0

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.linear.marks = {"a"}  # on a module of torch's
        self.names, self.scales, self.negative, self.settings = ["a"], {"a": 2.0, "b": 3.0}, False, Settings()
        self.weights = [float("1.5")]  # what is put there twice lies where this did
        self.linear.weight.level, self.linear.weight.gain = 2.0, torch.tensor(1.5)

    def forward(self, x):
        y = self.linear(x) * self.settings.factor
        for name in self.names:
            y = y * self.scales[name]
        if hasattr(self, "extra"):
            y = y + self.extra
        if self.linear.marks:
            y = y + 0.25
        y = y * self.linear.weight.gain + self.linear.weight.level
        if hasattr(self.linear.weight, "extra"):
            y = y * 0.75
        if self.linear.weight.requires_grad:
            y = y * 1.5
        if hasattr(self, "asked"):
            y = y * 3.0
        return (-y if self.negative else y) * self.weights[0] + self.shift


class Another(Custom):
    shift = 4.0


EDITS = {
    "a list, longer": lambda one: one.names.append("b"),
    "a list, an item": lambda one: one.names.__setitem__(0, "b"),
    "a list, another": lambda one: setattr(one, "names", ["b"]),
    "a list, an item twice": lambda one: [one.weights.__setitem__(0, float(n)) for n in ("5.5", "6.5")],
    "a dictionary's item": lambda one: one.scales.__setitem__("a", 5.0),
    "a dictionary, another": lambda one: setattr(one, "scales", {"a": 7.0}),
    "an attribute": lambda one: setattr(one, "negative", True),
    "an attribute that was not there": lambda one: setattr(one, "extra", 2.5),
    "a parameter that was not there": lambda one: one.register_parameter("extra", torch.nn.Parameter(torch.ones(8))),
    "an attribute of an object": lambda one: setattr(one.settings, "factor", 3.0),
    "an object, another": lambda one: setattr(one, "settings", mock.Mock(spec=Settings, factor=4.0)),
    "a class's attribute": lambda one: setattr(type(one), "shift", 2.0),
    "a class's attribute that was not there": lambda one: setattr(type(one), "extra", 1.5),
    "the class": lambda one: setattr(one, "__class__", Another),
    "what a module of torch's holds": lambda one: one.linear.marks.clear(),
    "a parameter's number": lambda one: setattr(one.linear.weight, "level", 5.0),
    "a parameter's tensor": lambda one: (
        OLD.append(one.linear.weight.gain),
        setattr(one.linear.weight, "gain", torch.tensor(4.0)),
    ),
    "an attribute that a parameter had not": lambda one: setattr(one.linear.weight, "extra", 1),
    "requires_grad": lambda one: one.requires_grad_(False),
    "all attributes at once": lambda one: (
        OLD.append(vars(one)),
        setattr(one, "__dict__", {**vars(one), "negative": True}),
    ),
    "what a property looks at": lambda one: COUNTRY.update(large=True),
    "an attribute in the place of a class's": lambda one: setattr(one, "shift", 3.0),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_other_libraries_keep_in_modules_is_seen(edit, monkeypatch):
    monkeypatch.setitem(COUNTRY, "large", False)
    monkeypatch.setattr(Custom, "shift", 1.0)
    monkeypatch.setattr(Custom, "extra", None, raising=False)
    monkeypatch.delattr(Custom, "extra")  # put back as it was: not there
    made = []
    model, x = Custom().eval(), torch.randn(2, 8)
    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(model, backend=watching)
        compiled(x)
        guard = of_modules(made)
        guard.guards = Counting(guard.guards, checks := [])
        before = compiled(x)
        assert not checks
        EDITS[edit](model)
        want = model(x)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(compiled(x), want)


def test_a_recompile_names_the_guard_that_failed():
    model, x = Custom().eval(), torch.randn(2, 8)
    clear_compilation_metrics()
    compiled = torch.compile(model, backend=watching)
    with torch.no_grad():
        compiled(x)
        model.settings.factor = 7.0
        compiled(x)
        model.linear.register_forward_hook(lambda module, given, made: made + 1)
        torch.testing.assert_close(compiled(x), model(x))
    _, factor, hook = [metric.recompile_reason or "" for metric in get_compilation_metrics()]
    assert "settings.factor == 2.0" in factor and "other hooks" in hook


FILTERS = {
    "one attribute": lambda entries: ["factor" not in entry.name for entry in entries],
    "tensors alone": torch.compiler.keep_tensor_guards_unsafe,
    "portable": torch.compiler.keep_portable_guards_unsafe,
    "no globals": torch.compiler.skip_guard_on_globals_unsafe,
    "no modules": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe,
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_of_the_users_has_the_last_word(name):
    """What recompiles with it does, and nothing else, as without a watch."""

    def recompiles(backend):
        torch._dynamo.reset()
        model, x = Custom().eval(), torch.randn(2, 8)
        compiled = torch.compile(model, backend=backend, options={"guard_filter_fn": FILTERS[name]}, dynamic=False)
        counts = []
        with torch.no_grad():
            for action in (
                lambda: compiled(x),
                lambda: compiled(torch.randn(3, 8)),
                lambda: (setattr(model.settings, "factor", 7.0), compiled(x)),
                lambda: (setattr(model, "negative", True), compiled(x)),
                lambda: (setattr(model.linear, "bias", None), compiled(x)),
            ):
                action()
                counts.append(graphs_compiled())
        return [after - counts[0] for after in counts]

    found = recompiles(watching)
    assert found == recompiles("eager") and (found[-1] > 0 or name == "no modules")


class Batched(torch.nn.Module):
    """Dynamo shares the guards of such functions between all frames of a process."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(8, width)

    def forward(self, x):
        return torch.vmap(self.linear)(x)


def test_guards_that_frames_share_stay_as_they_are():
    x = torch.randn(2, 8)
    with torch.no_grad():
        for width, backend in ((3, watching), (5, "eager"), (6, watching)):
            model = Batched(width)
            torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
            model.linear = torch.nn.Linear(8, 4)
            torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


class Tied(torch.nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_weights_that_are_tied_no_more():
    x, models = torch.randn(2, 8), [Tied(tied=True), Tied(tied=False)]
    with torch.no_grad():
        for model in models:
            torch.testing.assert_close(torch.compile(model, backend=watching)(x), model(x))
        models[0].b.weight = torch.nn.Parameter(torch.randn(8, 8))
        models[1].b.weight = models[1].a.weight
        for model in models:
            torch.testing.assert_close(torch.compile(model, backend=watching)(x), model(x))


def test_a_frame_that_calls_the_backend_twice():
    model, x = Custom().eval(), torch.randn(2, 8)

    def twice(gm, inputs):
        watching(gm, inputs)
        return watching(gm, inputs)

    made = []
    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(model, backend=twice)
        torch.testing.assert_close(compiled(x), model(x))
        assert of_modules(made), "one watch in the place of all guards"
        model.settings.factor = 5.0
        torch.testing.assert_close(compiled(x), model(x))


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("b", torch.randn(2, 8))

    def forward(self, x):
        self.last = x
        return self.linear(x) * (2.0 if x is self.b else 3.0)


def test_an_input_that_is_a_buffer():
    model, x = Buffered().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend=watching)
    with torch.no_grad():
        for given in (x, model.b, x):
            torch.testing.assert_close(compiled(given), model(given))


def test_modules_that_write_in_every_call_are_left_to_the_guards(monkeypatch):
    model, made = Buffered().eval(), []
    with patched(unchanged.State, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(model, backend=watching)
        for _ in range(200):
            x = torch.randn(2, 8)
            torch.testing.assert_close(compiled(x), model(x))
        assert 0 < len(made) < 25
        model.linear.bias = None
        torch.testing.assert_close(compiled(x), model(x))


def test_what_a_decorator_calls():
    """transformers wraps a model's forward: what is compiled is called with ``*args``."""
    model, x, made = Custom().eval(), torch.randn(2, 8), []

    def wrapped(*args, **keywords):
        return Custom.forward(*args, **keywords)

    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(wrapped, backend=watching)
        for factor in (2.0, 2.0, 5.0):
            model.settings.factor = factor
            torch.testing.assert_close(compiled(model, x), model(x))
    assert made


def test_all_guards_stay_where_changes_cannot_be_seen(monkeypatch, caplog):
    model, made = small_llama(layers=1), []
    monkeypatch.setattr(unchanged, "available", lambda: False)
    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)):
        compiled = torch.compile(model, backend=watching)
        before = logits(compiled)
    assert not made
    model.base_model.model.lm_head.bias = torch.nn.Parameter(torch.ones(128))
    torch.testing.assert_close(logits(compiled), before + 1, rtol=1e-2, atol=1e-2)
    model.base_model.model.lm_head.bias = None
    # … and where Dynamo is another than the one that is known
    torch._dynamo.reset()
    monkeypatch.setattr(unchanged, "available", lambda: True)
    monkeypatch.setattr(Unchanged, "__init__", lambda self, *given: 1 / 0)
    compiled = torch.compile(model, backend=watching)
    before, graphs = logits(compiled), graphs_compiled()
    assert "all guards on modules and their parameters stay" in caplog.text
    model.base_model.model.lm_head.to(torch.bfloat16).to(torch.float32)
    logits(compiled)
    assert graphs_compiled() == graphs
    model.base_model.model.lm_head.bias = torch.nn.Parameter(torch.ones(128))
    torch.testing.assert_close(logits(compiled), before + 1, rtol=1e-2, atol=1e-2)
    assert graphs_compiled() == graphs + 1
