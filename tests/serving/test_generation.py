"""``generate`` of what `gawscompile.compile` returns: eager's tokens, few graphs, and a model that stays as it was."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

import gawscompile
from gawscompile.calibration.measure import graphs_compiled
from gawscompile.serving import generation
from gawscompile.watch import unchanged
from tests.graphs import randomise, small_llama, tokens
from tests.ways import fusing

OPTIONS = {"strict": True}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
LINEARS = 7  # of a layer, all of them with a LoRA


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: what `pair` compiled serves several tests."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def two(model):
    """A model, and its compiled twin."""
    torch._dynamo.reset()
    return model, gawscompile.compile(copy.deepcopy(model), options=OPTIONS)


@pytest.fixture(scope="module")
def pair():
    return two(small_llama(layers=1))


def same(pair, rows=2, length=5, **settings):
    """Whether both write the same; `settings` of ``generate``, on top of `GREEDY`."""
    ids = tokens(rows, length)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY, **settings}
    want, got = (each.generate(**given) for each in pair)
    return torch.equal(want, got)


def test_prompts_of_any_length_take_one_graph_and_decoding_another(pair):
    graphs = graphs_compiled()
    with fusing(LINEARS):
        assert same(pair, length=5)
    assert same(pair, length=9) and same(pair, length=31, max_new_tokens=20)
    assert graphs_compiled() - graphs == 2


def test_guards_are_checked_after_a_change_alone(pair, monkeypatch):
    """As in a call of the model itself: one check whether anything changed stands for those on modules."""
    made, real = [], unchanged.State.__init__

    def counted(self, variables, found):
        made.append(len(found.tensors))
        real(self, variables, found)

    def of_models():
        return sum(tensors > 3 * LINEARS for tensors in made)

    def of_globals():
        return made.count(0)

    def of_caches():
        return [tensors for tensors in made if 0 < tensors <= 3 * LINEARS]

    monkeypatch.setattr(unchanged.State, "__init__", counted)
    assert same(pair, max_new_tokens=40)
    assert of_models() <= 2 and of_globals() <= 2 and len(of_caches()) <= 2  # these come in every `generate`
    assert same(pair, max_new_tokens=40)  # Dynamo marked a buffer when it compiled the second graph: one is made again
    seen = of_models(), of_globals()
    assert max(seen) <= 3
    assert same(pair, max_new_tokens=40) and (of_models(), of_globals()) == seen  # nor is a later `generate` a change
    assert len(of_caches()) <= 6


def test_adapters_are_live(pair):
    assert same(pair)
    graphs, before = graphs_compiled(), pair[1].generate(input_ids=tokens(2, 5), **GREEDY)
    for each in pair:
        randomise(each, seed=7, scale=0.3)
    assert same(pair) and graphs_compiled() == graphs
    assert not torch.equal(before, pair[1].generate(input_ids=tokens(2, 5), **GREEDY))


class Beside(LogitsProcessor):
    """Calls a function in another thread for every token."""

    def __init__(self, function):
        self.function = function
        self.results = []

    def __call__(self, ids, scores):
        thread = threading.Thread(target=lambda: self.results.append(self.function()))
        thread.start()
        thread.join()
        return scores


def test_other_threads_and_later_calls_find_the_model_as_it_was(pair):
    compiled = pair[1]
    inner = compiled.get_base_model()
    assert same(pair)
    graphs = graphs_compiled()

    def eager():
        with torch.no_grad():
            return inner(tokens(3, 11), use_cache=False).logits

    want, beside = eager(), Beside(eager)
    compiled.generate(input_ids=tokens(2, 5), logits_processor=[beside], **GREEDY)
    assert len(beside.results) == 6 and all(torch.equal(result, want) for result in beside.results)
    with pytest.raises(ValueError, match="nonsense"):
        compiled.generate(input_ids=tokens(2, 5), nonsense=1, **GREEDY)
    assert torch.equal(eager(), want) and graphs_compiled() == graphs
    assert copy.deepcopy(inner)._compiled_call_impl is None


def test_what_the_user_compiled_stays(pair):
    model = small_llama(layers=1)
    inner = model.get_base_model()
    inner.compile(backend="eager")
    theirs, graphs = inner._compiled_call_impl, graphs_compiled()
    gawscompile.compile(model).generate(input_ids=tokens(1, 3), **GREEDY)
    assert inner._compiled_call_impl is theirs and graphs_compiled() > graphs


def chosen(**settings):
    """What ``generate`` is given of these settings, for a prompt of five tokens."""
    model = small_llama(layers=1, max_position_embeddings=300)
    given = generation.with_cache(model, (), {"input_ids": tokens(2, 5), **settings})
    assert given.pop("input_ids").shape == (2, 5)
    return given


@pytest.mark.parametrize(("new", "room"), [(6, 128), (123, 128), (124, 256), (260, 300), (400, 405)])
def test_room_in_a_static_cache(new, room):
    given = chosen(max_new_tokens=new)
    assert (given["cache_implementation"], given["max_cache_len"]) == ("static", room)
    given = chosen(generation_config=(config := GenerationConfig(max_new_tokens=new)))
    assert given["generation_config"].max_cache_len == room
    assert config.cache_implementation is None and config.max_cache_len is None  # the caller's stays


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "dynamic"},
        {"cache": DynamicCache()},
        {"past_key_values": DynamicCache()},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": object()},
        {"generation_config": GenerationConfig(cache_implementation="offloaded_static")},
    ],
    ids=lambda settings: "".join(settings),
)
def test_a_cache_that_the_caller_chose_stays(settings):
    given = chosen(**settings)
    config = given.pop("generation_config", None)
    assert config is None or config.cache_implementation == "offloaded_static"
    assert given == {**settings, "disable_compile": True} if config is None else given == {}


def test_models_that_do_not_generate_get_torchs_wrapper():
    compiled = gawscompile.compile(torch.nn.Linear(3, 3))
    assert not isinstance(compiled, generation.CompiledModel) and not hasattr(compiled, "generate")


@pytest.mark.slow
def test_left_padded_rows():
    models = two(small_llama(layers=1))
    graphs = graphs_compiled()
    for length in (7, 12):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :3] = 0
        assert same(models, length=length, attention_mask=mask)
    assert graphs_compiled() - graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_rows_and_sizes_of_caches_change(cache):
    models = two(small_llama(layers=1))
    for rows, length, new in ((1, 5, 6), (3, 6, 6), (2, 20, 120), (4, 90, 60)):
        assert same(models, rows, length, max_new_tokens=new, cache_implementation=cache)
    graphs = graphs_compiled()
    assert same(models, 5, 8, max_new_tokens=300, cache_implementation=cache) and graphs_compiled() == graphs


@pytest.mark.slow
def test_adapter_names_and_switches():
    model = small_llama(layers=1)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules="all-linear"))
    models = two(randomise(model.eval(), 3))
    for names in (["default", "second", "__base__"], ["second", "default", "default"]):
        assert same(models, rows=3, adapter_names=names)
    for name in ("second", "default"):
        for each in models:
            each.set_adapter(name)
        assert same(models)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert same(models)


@pytest.mark.slow
def test_assisted_decoding():
    model, compiled = two(small_llama(layers=2))
    small = small_llama(layers=1)
    ids, settings = tokens(1, 7), {**GREEDY, "max_new_tokens": 12}
    want = model.generate(input_ids=ids, **settings)
    for more in ({"assistant_model": gawscompile.compile(small)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(compiled.generate(input_ids=ids, **more, **settings), want)


@pytest.mark.slow
def test_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 128}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    lora = peft.LoraConfig(r=4, target_modules=["q", "k", "v", "o", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    models = two(randomise(peft.get_peft_model(base, lora).eval()))
    with fusing():
        assert same(models, length=7) and same(models, length=12)


@pytest.mark.slow
def test_threads_generate_at_once():
    model, compiled = two(small_llama(layers=1))
    ids = tokens(1, 7)
    want, found = model.generate(input_ids=ids, **GREEDY), []

    def run():
        found.append(torch.equal(compiled.generate(input_ids=ids, **GREEDY), want))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@pytest.mark.slow
def test_a_copy_generates_with_parameters_of_its_own(pair):
    other = copy.deepcopy(pair[1])
    randomise(other, seed=9, scale=0.5)
    ids = tokens(2, 5)
    eager = copy.deepcopy(other._orig_mod)
    assert torch.equal(other.generate(input_ids=ids, **GREEDY), eager.generate(input_ids=ids, **GREEDY))
    assert same(pair)
