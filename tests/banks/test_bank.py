"""An adapter bank beside PEFT in eager mode: the same answers whatever is active, and nothing compiled anew."""

from __future__ import annotations

import copy
import gc
import threading

import peft
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch.nn import functional as F

import gawscompile
from gawscompile.banks import residents
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import BankError
from gawscompile.banks.layer import BankedLinear
from gawscompile.debug.explain import assemble
from gawscompile.runtime import ops
from gawscompile.runtime.banked import SNAPSHOT
from gawscompile.verify import proof
from tests.banks.common import adapted, by_row, llama, logits, with_bank
from tests.graphs import capture, rewriting

CHOICES = ["a", "c", None, "d", {"a": 0.5, "c": 2.0}, {"d": -1.0}, {"a": 1.0, "c": 0.25, "d": 3.0}]
ROWS = [
    ["a", None, "c", "d"],
    ["d", "d", "a", "a"],
    [None, {"a": 0.5, "c": 2.0}, None, "a"],
    ["c", "d"],  # each for two rows
    [None] * 4,
]


@pytest.fixture(scope="module")
def judge() -> peft.PeftModel:
    return adapted("acd")


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_eager(judge, ids):
    model, bank = with_bank(judge)
    for choice in CHOICES:
        bank.activate(choice)
        close(model(ids).logits, logits(judge, ids, choice))
    for rows in ROWS:
        bank.activate(rows)
        close(model(ids).logits, by_row(judge, ids, rows))


def test_a_bias_of_b(ids):
    judge = adapted("b")
    model, bank = with_bank(judge)
    assert bank.info("b").rank == 5 and len(bank.info("b").targets) == 14
    close(model(ids).logits, logits(judge, ids, "b"))
    bank.activate([None, {"b": 0.5}])
    half = logits(judge, ids, None)
    close(model(ids).logits[:2], half[:2])
    assert (model(ids).logits - half)[2:].abs().max() > 1e-2


@pytest.fixture(scope="module")
def compiled(judge):
    model, bank = with_bank(judge)
    return gawscompile.compile(model), bank


def test_compiled_once_for_all(judge, ids, compiled):
    model, bank = compiled
    model(ids)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for choice in CHOICES:
            bank.activate(choice)
            close(model(ids).logits, logits(judge, ids, choice))
        for rows in ROWS:  # eight rows of eight adapters, then fewer: SGLang's CUDA graphs kept some (PR 28371)
            bank.activate(rows)
            close(model(ids).logits, by_row(judge, ids, rows))
        bank.activate("a")
        bank.scale("a", 0.5)
        close(model(ids).logits, logits(judge, ids, {"a": 0.5}))
        bank.scale("a", 1.0)
    assert counters["stats"]["unique_graphs"] == graphs


def test_all_is_fused_and_proven(judge, ids):
    model, _ = with_bank(judge)
    captured = capture(model, ids, kernels=True)
    context = captured.until()
    layers = [linear for linear in context.record.linears if linear.adapters]
    assert len(layers) == 14 and all(linear.status == "fused" and "Banked" in linear.operators for linear in layers)
    assert sorted(len(group.members) for group in context.record.groups) == [1] * 5 + [2] * 2 + [3] * 2
    context.complain = pytest.fail
    proof.verify_rewrites(context)
    assert context.record.passes["verify"] >= 9


def test_choices_of_threads_and_of_generators(judge, ids):
    model, bank = with_bank(judge)
    bank.activate("a")

    def served(name):
        with bank.activated(name):
            yield model(ids).logits
            yield model(ids).logits

    found = []
    other = threading.Thread(target=lambda: found.append(model(ids).logits))
    one, two = served("c"), served("d")
    close(next(one), logits(judge, ids, "c"))
    other.start()
    other.join()
    close(found[0], logits(judge, ids, "a"))
    close(next(two), logits(judge, ids, "d"))
    one.close()
    close(next(two), logits(judge, ids, "d"))
    two.close()
    with pytest.raises(BankError, match="no adapter"), bank.activated("z"):
        pass
    assert len(bank._rows) == 1
    bank.activate("c")
    close(model(ids).logits, logits(judge, ids, "c"))


def test_what_is_not_a_bank_s_any_more(judge, tmp_path):
    model, _ = with_bank(judge)
    for call in (model.merge_and_unload, model.merge_adapter, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(BankError, match="AdapterBank has this model's adapters"):
            call()
    with pytest.raises(BankError, match="no PeftModel"):
        AdapterBank(copy.deepcopy(judge).get_base_model())


def test_disabled_adapters_stay_so(judge, ids):
    source = copy.deepcopy(judge)
    source.base_model.disable_adapter_layers()
    model, _ = with_bank(source)
    close(model(ids).logits, logits(judge, ids, None))


def test_a_full_disk_loses_no_adapter(judge, ids, monkeypatch):
    sizes = {info.name: info.bytes for info in with_bank(judge)[1]}
    model, bank = with_bank(judge, memory=sum(sizes.values()))
    bank.activate(None)
    with monkeypatch.context() as patched:
        patched.setattr(residents, "_spilled", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            bank.load("again", judge, adapter_name="c")
    for name in "acd":
        bank.activate(name)
        close(model(ids).logits, logits(judge, ids, name))


def test_one_that_comes_does_not_flush_the_others(judge, tmp_path):
    """While forwards are under way, no more leave than the new one needs."""
    judge.save_pretrained(tmp_path, selected_adapters=["d"])
    bank = AdapterBank(llama(), memory="8KB")
    for number in range(4):
        bank.load(str(number), tmp_path / "d")
    taken = bank.snapshot(1)
    other = threading.Thread(target=bank.load, args=("new", tmp_path / "d"), kwargs={"scale": 2.0})
    bank._all.arena.take([sum(end - begin for begin, end in bank._all.arena._free)])  # the rest is somebody's
    other.start()
    other.join(0.3)
    assert other.is_alive() and sum(info.resident for info in bank) == 3
    del taken
    gc.collect()
    other.join(10)
    assert not other.is_alive() and bank.info("new").resident


def test_what_explain_says_of_a_bank(judge):
    model, bank = with_bank(judge)
    bank.activate(["a", {"d": 2.0}])
    bank.pin("c")
    notes = assemble([], model).notes
    assert notes[0].startswith("adapter bank: 14 modules, 3 adapters, 3 of them resident in 0.1 of 8 MB of float32")
    assert any("a: rank 8 on 6 modules, scale 1, 0.02 MB, active" in note for note in notes)
    assert any("c: rank 33 on 6 modules" in note and note.endswith("pinned") for note in notes)
    assert "adapter bank: lm_head is not in it: it is the output layer" in notes


def test_a_base_model_and_folders(judge, ids, tmp_path):
    judge.save_pretrained(tmp_path, selected_adapters=["a", "c"])
    model = llama()
    bank = AdapterBank(model, memory="8MB")
    compiled = torch.compile(model, backend=rewriting([]))
    close(compiled(ids).logits, logits(judge, ids, None))
    bank.load("x", tmp_path / "c")
    bank.activate("x")
    with torch._dynamo.config.patch(error_on_recompile=True):
        close(compiled(ids).logits, logits(judge, ids, "c"))
        bank.load("x", tmp_path / "a")  # in its place, while it is active
        close(compiled(ids).logits, logits(judge, ids, "a"))
        bank.activate(None)
        bank.unload("x")
        close(compiled(ids).logits, logits(judge, ids, None))
    assert not list(bank)


def test_saved_as_peft_reads_it(judge, ids, tmp_path):
    both = adapted("b")
    for source, name in ((judge, "c"), (both, "b")):
        _, bank = with_bank(source)
        bank.save(name, tmp_path / name)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        close(again(ids).logits, logits(source, ids, name))


def test_generate_and_peft_s_own_calls(judge, ids, tmp_path):
    judge.save_pretrained(tmp_path, selected_adapters=["d"])
    model, bank = with_bank(judge)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def alone(row: int, name: str | None) -> torch.Tensor:
        if name is None:
            with judge.disable_adapter():
                return judge.generate(ids[row : row + 1], **settings)
        judge.set_adapter(name)
        return judge.generate(ids[row : row + 1], **settings)

    names = ["c", "__base__", "a", "c"]
    want = torch.cat([alone(row, None if name == "__base__" else name) for row, name in enumerate(names)])
    assert torch.equal(model.generate(ids, adapter_names=names, **settings), want)
    quick = gawscompile.compile(model)
    assert torch.equal(quick.generate(ids, adapter_names=names, **settings), want)
    model.set_adapter("c")
    close(model(ids).logits, logits(judge, ids, "c"))
    model.load_adapter(tmp_path / "d", "new")
    model.set_adapter("new")
    close(model(ids).logits, logits(judge, ids, "d"))
    with model.disable_adapter():
        close(model(ids).logits, logits(judge, ids, None))
    with pytest.raises(BankError, match="active"):
        model.delete_adapter("new")
    model.set_adapter("a")
    model.delete_adapter("new")
    assert "new" not in bank and [info.name for info in bank] == ["a", "c", "d"]


def test_beams(judge, ids):
    model, _ = with_bank(judge)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    want = []
    for row, name in enumerate("acda"):
        judge.set_adapter(name)
        want.append(judge.generate(ids[row : row + 1], **settings))
    assert torch.equal(model.generate(ids, adapter_names=list("acda"), **settings), torch.cat(want))


def test_the_least_recently_used_leave_and_come_back(judge, ids, tmp_path):
    judge.save_pretrained(tmp_path, selected_adapters=["a", "c", "d"])
    bank = AdapterBank(model := llama(), memory="1MB", max_adapters=2)
    for name in "acd":
        bank.load(name, tmp_path / name, lazy=True)
    assert not any(info.resident for info in bank)
    for name in "acdacca":
        bank.activate(name)
        close(model(ids).logits, logits(judge, ids, name))
    assert [info.resident for info in bank] == [True, True, False]
    bank.prefetch("d").result()
    assert [info.resident for info in bank] == [True, False, True]
    bank.pin("d")
    bank.activate("d")
    bank.pin("a")
    with pytest.raises(BankError, match="no room for c: 2 resident"):
        bank.activate("c")
    close(model(ids).logits, logits(judge, ids, "d"))


def test_what_came_from_memory_is_spilled(judge, ids):
    sizes = {info.name: info.bytes for info in with_bank(judge)[1]}
    model, bank = with_bank(judge, memory=sizes["c"] + sizes["a"] + 9000)  # taken over one after the other
    for name in "acdc":
        bank.activate(name)
        close(model(ids).logits, logits(judge, ids, name))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_memory_is_not_given_away_while_it_is_read(judge, tmp_path, how):
    """A forward that has begun reads what was unloaded meanwhile, and nothing else."""
    judge.save_pretrained(tmp_path, selected_adapters=["a", "d"])
    bank = AdapterBank(llama(), memory=with_bank(judge)[1].info("a").bytes)
    bank.load("a", tmp_path / "a")
    bank.activate("a")
    taken = bank.snapshot(1)
    if how == "compiled":  # it has been published, and what C++ gives keeps it
        ops.ensure_loaded()
        bank.snapshot(1)
        taken = SNAPSHOT(bank.shared.state, 1, len(bank.modules), bank.max_mix)
        gc.collect()
    bank.activate(None)
    done = threading.Thread(target=bank.load, args=("d", tmp_path / "d"))
    before = bank.shared.pool.clone()
    bank.unload("a")
    done.start()
    done.join(0.3)
    assert done.is_alive() and torch.equal(before, bank.shared.pool)
    del taken
    gc.collect()
    done.join(10)
    assert not done.is_alive() and "d" in bank


def test_a_switch_is_seen_whole(judge, ids, compiled):
    """Two threads: every forward is of one adapter, also where the switch comes in its middle."""
    quick, bank = compiled
    model = quick._orig_mod
    wanted = {name: logits(judge, ids, name) for name in ("a", "c", "d", None)}
    bank.activate(None)
    quick(ids)
    stop, seen = threading.Event(), set()

    def switch() -> None:
        names = ["a", "c", "d", None]
        for number in range(100000):
            if stop.is_set():
                return
            bank.activate(names[number % 4])

    other = threading.Thread(target=switch)
    other.start()
    try:
        with torch.no_grad():
            for run in (quick, model):
                for _ in range(60):
                    got = run(ids).logits
                    errors = {name: (got - want).abs().max().item() for name, want in wanted.items()}
                    best = min(errors, key=errors.get)
                    assert errors[best] < 1e-4
                    seen.add(best)
    finally:
        stop.set()
        other.join()
    assert len(seen) > 1


def test_gradients_pass_through(judge, ids):
    model, bank = with_bank(judge)
    bank.activate(["a", None, "c", {"a": 0.5, "d": 1.0}])
    layer = next(module for module in model.modules() if isinstance(module, BankedLinear))
    x = torch.randn(4, 3, 64, requires_grad=True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(layer(x).sum(), x)
        (base,) = torch.autograd.grad(layer.base_layer(x).sum(), x)
        delta = (layer(x) - layer.base_layer(x)).detach()
    step = torch.randn_like(x)
    moved = (layer(x + step) - layer.base_layer(x + step)) - delta  # it is linear
    torch.testing.assert_close(((found - base) * step).sum(), moved.sum(), rtol=1e-3, atol=1e-4)


REFUSED = {
    "no such adapter": (lambda bank: bank.activate("z"), "no adapter 'z'"),
    "no such adapter in a mix": (lambda bank: bank.activate({"a": 1.0, "z": 1.0}), "no adapter 'z'"),
    "a mix of too many": (lambda bank: bank.activate({"a": 1, "c": 1, "d": 1}), "max_mix"),
    "no rows": (lambda bank: bank.activate([]), "one for each row"),
    "unload what is not there": (lambda bank: bank.unload("z"), "no adapter 'z'"),
    "scale what is not there": (lambda bank: bank.scale("z", 1), "no adapter 'z'"),
    "a folder that is not there": (lambda bank: bank.load("z", "/nowhere/at/all"), "/nowhere/at/all"),
    "a later read of no folder": (lambda bank: bank.load("z", {}, lazy=True), "only a folder"),
    "no name": (lambda bank: bank.load("", "/tmp"), "name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_nothing_changed(judge, ids, name):
    model, bank = with_bank(judge, max_mix=2)
    bank.activate("c")
    before = [*bank]
    act, message = REFUSED[name]
    with pytest.raises(BankError, match=message):
        act(bank)
    assert [*bank] == before
    close(model(ids).logits, logits(judge, ids, "c"))


MODELS = {
    "no memory": (lambda: AdapterBank(llama(), memory=10), "holds no adapter"),
    "memory of no unit": (lambda: AdapterBank(llama(), memory="many"), "'64MB'"),
    "no such module": (lambda: AdapterBank(llama(), modules=["nothing"]), "no linear"),
    "no linear": (lambda: AdapterBank(llama(), modules=["embed_tokens"]), "Embedding"),
    "another dtype": (lambda: AdapterBank(llama(), dtype=torch.float64), "float64"),
    "too few modules": (lambda: AdapterBank(adapted("a"), modules=["q_proj"]), "leaves out"),
    "too little memory": (lambda: AdapterBank(adapted("b"), memory=4096), "AdapterBank"),
    "DoRA": (
        lambda: AdapterBank(peft.get_peft_model(llama(), peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))),
        "dora",
    ),
    "no LoRA": (
        lambda: AdapterBank(peft.get_peft_model(llama(), peft.VeraConfig(target_modules=["q_proj"]))),
        "VERA",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_no_bank_can_take(name):
    make, message = MODELS[name]
    with pytest.raises(BankError, match=message):
        make()


def test_a_batch_of_other_rows(judge, ids):
    model, bank = with_bank(judge)
    bank.activate(["a", "c", "d"])
    with pytest.raises(BankError, match="3 rows, and the batch has 4"):
        model(ids)


def test_a_model_with_a_bank_is_not_copied(judge):
    model, _ = with_bank(judge)
    with pytest.raises(TypeError, match="copy the model first"):
        copy.deepcopy(model)


def test_16_bits(ids):
    judge = adapted("ac", torch.bfloat16)
    model, bank = with_bank(judge)
    assert bank.shared.pool.dtype == torch.bfloat16
    quick = torch.compile(model, backend=rewriting([]))
    exact = copy.deepcopy(judge).double()
    for rows in (["a", None], ["c", {"a": 0.5, "c": 1.0}]):
        bank.activate(rows)
        got, theirs, want = quick(ids).logits, by_row(judge, ids, rows), by_row(exact, ids, rows)
        assert (got - want).abs().mean() <= 1.25 * (theirs - want).abs().mean()


def test_scales_as_they_are_now(judge, ids):
    source = copy.deepcopy(judge)
    for layer in source.modules():
        if hasattr(layer, "set_scale") and "c" in layer.scaling:
            layer.set_scale("c", 3.0)
    model, _ = with_bank(source)
    model.adapter_bank.activate("c")
    close(model(ids).logits, logits(source, ids, "c"))


def test_two_biases_of_one_module_are_not_saved(tmp_path):
    """PEFT's file would have them apart, and the bank has their sum."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True, bias="lora_only")
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    want = model(x)
    bank = AdapterBank(model, memory="1MB")
    close(model(x), want)
    with pytest.raises(BankError, match="sum of two"):
        bank.save("default", tmp_path)


def test_a_pool_of_fewer_bits_is_not_given_what_it_cannot_hold(judge):
    bank = AdapterBank(llama(), memory="1MB", dtype=torch.float16)
    path = "model.layers.0.self_attn.o_proj"
    state = {f"{path}.lora_A.weight": torch.full((1, 64), 1e6), f"{path}.lora_B.weight": torch.ones(64, 1)}
    with pytest.raises(BankError, match="o_proj has factors beyond"):
        bank.load("x", state, config={"r": 1, "lora_alpha": 1})
    assert not list(bank)


def test_a_merged_adapter_is_refused():
    model = adapted("a")
    model.merge_adapter()
    with pytest.raises(BankError, match="unmerge_adapter"):
        AdapterBank(model)


def test_a_failed_bank_leaves_the_model(ids):
    model = adapted("ac")
    model.base_model.set_adapter(["a", "c"])
    want = model(ids).logits
    with pytest.raises(BankError, match="no room"):
        AdapterBank(model, max_adapters=1)
    assert torch.equal(model(ids).logits, want)


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_broken_graph_has_one_snapshot(monkeypatch):
    torch.manual_seed(0)
    judge = peft.get_peft_model(Broken(), peft.LoraConfig(r=2, target_modules=["first", "second"])).eval()
    for parameter in judge.parameters():
        torch.nn.init.normal_(parameter)
    model, bank = with_bank(judge)
    compiled, x = torch.compile(model, backend=rewriting([])), torch.randn(3, 8)
    close(compiled(x), judge(x))
    taken, snapshot = [], bank.snapshot
    monkeypatch.setattr(bank, "snapshot", lambda rows: taken.append(rows) or snapshot(rows))
    bank.activate(None)
    with judge.disable_adapter():
        close(compiled(x), judge(x))
    assert taken == [3]


def test_an_encoder_and_a_decoder(monkeypatch):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    torch.manual_seed(0)
    inner = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    judge = peft.get_peft_model(inner.eval(), peft.LoraConfig(r=2, target_modules=["q", "v"]), adapter_name="a")
    judge.add_adapter("b", peft.LoraConfig(r=3, target_modules=["k", "wo"]))
    for name, parameter in judge.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    judge.eval()
    ids, settings = torch.randint(1, 40, (2, 5)), {"max_new_tokens": 4, "do_sample": False}
    want = []
    for row, name in enumerate("ab"):
        judge.set_adapter(name)
        want.append(judge.generate(input_ids=ids[row : row + 1], **settings))
    model, bank = with_bank(judge)
    taken, snapshot = [], bank.snapshot
    monkeypatch.setattr(bank, "snapshot", lambda rows: taken.append(rows) or snapshot(rows))
    got = model.generate(input_ids=ids, adapter_names=["a", "b"], **settings)
    assert all(torch.equal(row[: len(one[0])], one[0]) for row, one in zip(got, want, strict=True))
    assert len(taken) == got.shape[1]  # one for the encoder, one for each step


def test_modules_alone(judge):
    """A module that is called outside of its model's forward takes a snapshot of its own."""
    model, bank = with_bank(judge)
    bank.activate(["a", "c"])
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    mine, theirs = model.get_submodule(name), judge.get_submodule(name)
    x = torch.randn(2, 3, 64)
    for row, adapter in enumerate("ac"):
        judge.set_adapter(adapter)
        close(mine(x)[row], theirs(x)[row])
    assert mine.weight is mine.base_layer.weight and mine.bias is None
    close(F.linear(x, mine.weight), mine.base_layer(x))
