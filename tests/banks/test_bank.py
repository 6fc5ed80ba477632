"""An adapter bank beside PEFT in eager mode: the same answers whatever is active, and nothing compiled anew."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import gawscompile
from gawscompile.banks.bank import AdapterBank
from gawscompile.banks.checkpoints import BankError
from gawscompile.banks.layer import BankedLinear
from gawscompile.ir.records import GraphRecord
from gawscompile.runtime.banked import BANKED, SCHEDULE
from gawscompile.verify import proof
from tests.banks.common import adapted, agree, by_row, close, in_kernels, llama, logits, with_bank
from tests.graphs import capture, rewriting

CHOICES = ["a", "c", None, "d", {"a": 0.5, "c": 2.0}, {"d": -1.0}, {"a": 1.0, "c": 0.25, "d": 3.0}]


ROWS = [
    ["a", None, "c", "d"],
    ["d", "d", "a", "a"],
    [None, {"a": 0.5, "c": 2.0}, None, "a"],
    ["c", "d"],  # each for two rows
    [None] * 4,
]


def test_eager(judge, ids):
    model, bank = with_bank(judge)
    agree(model, bank, judge, ids, CHOICES, ROWS)


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


def test_compiled_once_for_all(judge, ids, compiled, monkeypatch):
    model, bank = compiled
    real, asked = AdapterBank.snapshot, []
    monkeypatch.setattr(AdapterBank, "snapshot", lambda self, rows: asked.append(rows) or real(self, rows))
    model(ids)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        agree(model, bank, judge, ids, CHOICES, ROWS)  # many, then fewer: SGLang's CUDA graphs kept some (PR 28371)
        bank.activate("a")
        bank.scale("a", 0.5)
        close(model(ids).logits, logits(judge, ids, {"a": 0.5}))
        bank.scale("a", 1.0)

        def python_after(choice, expected=None):
            """How often Python has made a schedule so far, once the logits are right for `choice`."""
            bank.activate(choice)
            close(model(ids).logits, logits(judge, ids, expected or choice))
            return len(asked)

        before = max(map(python_after, ("a", "c", None)))  # all are made
        same = ["c", None, "a", {"c": 1.0}, "a", None]
        assert {python_after(choice) for choice in same} == {before}  # a switch back finds what was made
        mix = {"a": 1.0, "c": -0.5}
        assert [python_after(choice) - before for choice in (mix, "a", "c", "a")] == [1, 2, 3, 3]
        bank.scale("a", 0.5)
        assert python_after("a", {"a": 0.5}) == before + 4
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


def test_a_base_model_and_folders(judge, ids, tmp_path):
    judge.save_pretrained(tmp_path, selected_adapters=["a", "c"])
    model = llama()
    bank = AdapterBank(model, memory="8MB")
    records: list[GraphRecord] = []
    compiled = torch.compile(model, backend=rewriting(records))
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
    assert not list(bank) and in_kernels(records)


@pytest.mark.slow  # test_compiled_once_for_all has the same graph, and generate is test_generation's
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


def test_a_batch_of_other_rows(judge, ids):
    model, bank = with_bank(judge)
    bank.activate(["a", "c", "d"])
    with pytest.raises(BankError, match="3 rows, and the batch has 4"):
        model(ids)


def test_16_bits(ids):
    judge = adapted("ac", torch.bfloat16)
    model, bank = with_bank(judge)
    assert bank.shared.pool.dtype == torch.bfloat16
    records: list[GraphRecord] = []
    quick = torch.compile(model, backend=rewriting(records))
    exact = copy.deepcopy(judge).double()
    for rows in (["a", None], ["c", {"a": 0.5, "c": 1.0}]):
        bank.activate(rows)
        got, theirs, want = quick(ids).logits, by_row(judge, ids, rows), by_row(exact, ids, rows)
        assert (got - want).abs().mean() <= 1.25 * (theirs - want).abs().mean()
    assert in_kernels(records, "bank(bf16)")


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
    graphs: list[torch.fx.GraphModule] = []
    compiled, x = torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward), torch.randn(3, 8)
    close(compiled(x), judge(x))
    taken, snapshot = [], bank.snapshot
    monkeypatch.setattr(bank, "snapshot", lambda rows: taken.append(rows) or snapshot(rows))
    bank.activate(None)
    with judge.disable_adapter():
        close(compiled(x), judge(x))
    calls = [node.target for gm in graphs for node in gm.graph.nodes]
    assert taken == [3] and len(graphs) == 3  # a layer each, and between them the call that takes the snapshot
    assert calls.count(BANKED) == 2 and calls.count(SCHEDULE) == 1


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
