"""What a bank keeps: who leaves the pool and comes back, when memory is used again, what is saved and what refused."""

from __future__ import annotations

import gc
import threading

import peft
import pytest
import torch

from gawscompile.banks import residents
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import BankError
from gawscompile.ir.banked import FIELDS
from gawscompile.runtime import ops
from gawscompile.runtime.banked import SNAPSHOT, publish, retract, switch
from tests.banks.common import adapted, close, llama, logits, with_bank


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


def test_schedules_that_compiled_graphs_keep_are_bounded():
    """Three of 12 MB are more than the 32 MB that a bank's may take: then the newest one alone is kept."""
    ops.ensure_loaded()
    bank, sizes = -7, (1, 2, 196_608, FIELDS)
    state = torch.tensor([bank])

    def kept():
        return SNAPSHOT(state, 1, 1, sizes[2])[0, 0, 0, 0].item()

    try:
        for number in (1, 2):
            publish(bank, 1, torch.full(sizes, number, dtype=torch.int32), number)
        for number in (1, 2):
            switch(bank, number)
            assert kept() == number
        publish(bank, 1, torch.full(sizes, 3, dtype=torch.int32), 3)
        assert kept() == 3
        switch(bank, 1)
        with pytest.raises(RuntimeError, match="bank of this model is gone"):  # Python is asked, who knows none
            kept()
    finally:
        retract(bank)


def test_a_full_disk_loses_no_adapter(judge, ids, monkeypatch):
    sizes = {info.name: info.bytes for info in with_bank(judge)[1]}
    model, bank = with_bank(judge, memory=sum(sizes.values()))
    bank.activate(None)
    with monkeypatch.context() as patched:
        patched.setattr(residents, "spilled", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
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


def test_saved_as_peft_reads_it(judge, ids, tmp_path):
    both = adapted("b")
    for source, name in ((judge, "c"), (both, "b")):
        _, bank = with_bank(source)
        bank.save(name, tmp_path / name)
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        close(again(ids).logits, logits(source, ids, name))


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
