"""gawscompile.compile: few guards are checked, and whatever one changes still shows in the next call."""

from __future__ import annotations

import contextlib
import gc
import weakref
from unittest import mock

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

import gawscompile
from gawscompile.debug.store import RECORDS
from gawscompile.guards import inference_guards
from gawscompile.measure import graphs_compiled
from gawscompile.runtime import unchanged
from gawscompile.runtime.unchanged import Unchanged
from tests.graphs import Pair, randomise, small_llama, tokens

IDS = tokens(1, 5)
OPTIONS = {"strict": True}


@torch.no_grad()
def logits(call):
    return call(IDS, use_cache=False).logits


def same(compiled, model):
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: what is compiled once must serve every test, and beyond torch's limit all would be eager."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def pair():
    """A model with two adapters and its compiled form, shared by all changes."""
    model = small_llama(layers=1)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules="all-linear"))
    randomise(model)
    mark = len(RECORDS)
    compiled = gawscompile.compile(model, options=OPTIONS)
    same(compiled, model)
    assert any(record.groups for record in RECORDS.since(mark))
    return model, compiled


def scaled(model, factor):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scaling["default"] *= factor


@pytest.mark.slow
def test_set_adapter(pair):
    model, compiled = pair
    first = logits(compiled)
    for names in ("other", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        same(compiled, model)
    assert torch.equal(logits(compiled), first)


def test_scaling(pair):
    model, compiled = pair
    before = logits(compiled)
    scaled(model, 3.0)
    same(compiled, model)
    assert not torch.allclose(logits(compiled), before, atol=1e-3)
    scaled(model, 1 / 3)
    same(compiled, model)


def test_disabling(pair):
    model, compiled = pair
    before = logits(compiled)
    with model.disable_adapter():
        same(compiled, model)
        assert not torch.allclose(logits(compiled), before, atol=1e-3)
    same(compiled, model)


def test_merging(pair):
    model, compiled = pair
    model.merge_adapter()
    same(compiled, model)
    model.unmerge_adapter()
    same(compiled, model)


def test_written_and_replaced_parameters_recompile_nothing(pair):
    model, compiled = pair
    same(compiled, model)
    graphs = graphs_compiled()
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if "lora_B" in name:
                parameter.mul_(-1.5)
            elif "norm" in name:
                parameter.data = parameter.data + 0.1
    same(compiled, model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = torch.nn.Parameter(torch.randn_like(layer.weight))
    same(compiled, model)
    assert graphs_compiled() == graphs


def test_a_factor_that_does_not_fit_is_eagers_error_and_not_an_answer(pair):
    model, compiled = pair
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    kept = layer.weight
    layer.weight = torch.nn.Parameter(kept[:2].clone())
    with pytest.raises(RuntimeError, match=r"shape|size"):
        logits(model)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        logits(compiled)
    layer.weight = kept
    same(compiled, model)


def test_an_adapter_that_came_later_and_one_that_went(pair):
    model, compiled = pair
    model.add_adapter("late", peft.LoraConfig(r=5, target_modules=["q_proj"]))
    randomise(model)
    model.set_adapter("late")
    same(compiled, model)
    model.delete_adapter("late")
    model.set_adapter("default")
    same(compiled, model)


@pytest.mark.slow
def test_gradients_get_all_their_guards(pair):
    model, compiled = pair
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    loss = compiled(IDS, use_cache=False).logits.sum()
    assert not loss.requires_grad
    for parameter in frozen:
        parameter.requires_grad_(True)
    compiled(IDS, use_cache=False).logits.sum().backward()
    active = [p for n, p in model.named_parameters() if p.requires_grad and ".default." in n]
    assert active and all(p.grad is not None for p in active)


def test_most_guards_on_parameters_are_checked_only_after_a_change():
    torch._dynamo.reset()
    model = small_llama(layers=1)
    counts, made = [], []

    def counting(entries):
        keep = inference_guards(entries)
        matched = [kept for entry, kept in zip(entries, keep, strict=True) if entry.guard_type == "TENSOR_MATCH"]
        counts.append((len(matched), sum(matched)))
        return keep

    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)):
        compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": counting})
        logits(compiled)
    parameters = sum(1 for _ in model.parameters())
    (before, after), *_ = counts
    assert before >= parameters * 0.9 and after < before / 4
    (guard,) = made
    checks = []
    guard.guards = Counting(guard.guards, checks)
    logits(compiled)
    logits(compiled)
    assert not checks, "nothing has changed since Dynamo tried its guards"
    model.base_model.model.lm_head.some_attribute = 1
    logits(compiled)
    logits(compiled)
    assert len(checks) == 1


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


def test_a_module_of_another_dtype_recompiles():
    """GPT-2's position embedding keeps the sum in fp32, so eager takes a bf16 embedding, in half the memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch._dynamo.reset()
    sizes = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": 128,
        "n_positions": 64,
        "tie_word_embeddings": False,
    }
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    model = randomise(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"])).eval())
    compiled = gawscompile.compile(model, options=OPTIONS)
    same(compiled, model)
    graphs = graphs_compiled()
    base.transformer.wte.to(torch.bfloat16)
    same(compiled, model)
    assert graphs_compiled() == graphs + 1


def test_resized_embeddings_recompile(pair):
    model, compiled = pair
    same(compiled, model)
    graphs = graphs_compiled()
    model.resize_token_embeddings(136, mean_resizing=False)
    same(compiled, model)
    assert logits(compiled).shape[-1] == 136 and graphs_compiled() == graphs + 1


def test_an_adapter_of_another_rank_recompiles(pair, tmp_path):
    model, compiled = pair
    same(compiled, model)
    other = small_llama(layers=1, lora=peft.LoraConfig(r=12, lora_alpha=24, target_modules="all-linear"))
    randomise(other, seed=7).save_pretrained(tmp_path)
    before, graphs = logits(compiled), graphs_compiled()
    hotswap_adapter(model, str(tmp_path), "default")
    same(compiled, model)
    assert not torch.allclose(logits(compiled), before, atol=1e-3) and graphs_compiled() == graphs + 1


def test_storage_that_is_too_small_is_an_error_and_no_crash():
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 8)).eval()
    compiled, x = gawscompile.compile(model), tokens(1, 3, vocabulary=64)
    with torch.no_grad():
        compiled(x)
        model[0].weight.untyped_storage().resize_(0)
        with pytest.raises(Exception, match="storage lacks 8192 bytes"):
            compiled(x)


def test_one_graph_serves_many_modules_and_keeps_none_alive():
    torch._dynamo.reset()
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

    def forward(self, x):
        y = self.linear(x) * self.settings.factor
        for name in self.names:
            y = y * self.scales[name]
        if hasattr(self, "extra"):
            y = y + self.extra
        if self.linear.marks:
            y = y + 0.25
        if self.linear.weight.requires_grad:
            y = y * 1.5
        if hasattr(self, "asked"):
            y = y * 3.0
        return (-y if self.negative else y) + self.shift


class Another(Custom):
    shift = 4.0


EDITS = {
    "a list, longer": lambda one: one.names.append("b"),
    "a list, an item": lambda one: one.names.__setitem__(0, "b"),
    "a list, another": lambda one: setattr(one, "names", ["b"]),
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
    torch._dynamo.reset()
    monkeypatch.setitem(COUNTRY, "large", False)
    monkeypatch.setattr(Custom, "shift", 1.0)
    monkeypatch.setattr(Custom, "extra", None, raising=False)
    monkeypatch.delattr(Custom, "extra")  # put back as it was: not there
    made = []
    model, x = Custom().eval(), torch.randn(2, 8)
    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": inference_guards})
        compiled(x)
        (guard,) = made
        guard.guards = Counting(guard.guards, checks := [])
        before = compiled(x)
        assert not checks
        EDITS[edit](model)
        want = model(x)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(compiled(x), want)


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("b", torch.randn(2, 8))

    def forward(self, x):
        self.last = x
        return self.linear(x) * (2.0 if x is self.b else 3.0)


def test_an_input_that_is_a_buffer():
    torch._dynamo.reset()
    model, x = Buffered().eval(), torch.randn(2, 8)
    compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": inference_guards})
    with torch.no_grad():
        for given in (x, model.b, x):
            torch.testing.assert_close(compiled(given), model(given))


def test_modules_that_write_in_every_call_are_left_to_the_guards(monkeypatch):
    torch._dynamo.reset()
    model, made = Buffered().eval(), []
    with patched(unchanged.State, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": inference_guards})
        for _ in range(200):
            x = torch.randn(2, 8)
            torch.testing.assert_close(compiled(x), model(x))
        assert 0 < len(made) < 25
        model.linear.bias = None
        torch.testing.assert_close(compiled(x), model(x))


def test_what_a_decorator_calls():
    """transformers wraps a model's forward: what is compiled is called with ``*args``."""
    torch._dynamo.reset()
    model, x, made = Custom().eval(), torch.randn(2, 8), []

    def wrapped(*args, **keywords):
        return Custom.forward(*args, **keywords)

    with patched(Unchanged, "__init__", lambda self, *given: made.append(self)), torch.no_grad():
        compiled = torch.compile(wrapped, backend="eager", options={"guard_filter_fn": inference_guards})
        for factor in (2.0, 2.0, 5.0):
            model.settings.factor = factor
            torch.testing.assert_close(compiled(model, x), model(x))
    assert made


def test_all_guards_stay_where_changes_cannot_be_seen(monkeypatch, caplog):
    torch._dynamo.reset()
    model = small_llama(layers=1)
    kept = []

    def counting(entries):
        kept.append(all(inference_guards(entries)))
        return inference_guards(entries)

    monkeypatch.setattr(unchanged, "available", lambda: False)
    logits(torch.compile(model, backend="eager", options={"guard_filter_fn": counting}))
    assert kept == [True]
    # … and where Dynamo is another than the one that is known
    torch._dynamo.reset()
    monkeypatch.setattr(unchanged, "available", lambda: True)
    monkeypatch.setattr(Unchanged, "__init__", lambda self, *given: 1 / 0)
    compiled = torch.compile(model, backend="eager", options={"guard_filter_fn": inference_guards})
    before, graphs = logits(compiled), graphs_compiled()
    assert "all guards stay" in caplog.text
    model.base_model.model.lm_head.to(torch.bfloat16).to(torch.float32)
    logits(compiled)
    assert graphs_compiled() == graphs
    model.base_model.model.lm_head.bias = torch.nn.Parameter(torch.ones(128))
    torch.testing.assert_close(logits(compiled), before + 1, rtol=1e-2, atol=1e-2)
    assert graphs_compiled() == graphs + 1


def test_what_it_cannot_take_is_said():
    with pytest.raises(ValueError, match="is a guard_filter_fn"):
        gawscompile.compile(torch.nn.Linear(2, 2), options={"guard_filter_fn": list})
    with pytest.raises(ValueError, match="takes no mode"):
        gawscompile.compile(torch.nn.Linear(2, 2), mode="max-autotune")
