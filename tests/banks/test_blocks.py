"""A bank as it is on a GPU, on tensors of a CPU: adapters in blocks of ranks, what is active in a table. Kernels that
read them: `tests/codegen/test_triton_numbers.py`; replays of graphs: `tests/gpu/test_banks.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gawscompile.banks import layouts
from gawscompile.banks.bank import BankError
from gawscompile.banks.checkpoints import Factors
from gawscompile.banks.dora import Scaled
from gawscompile.ir.banked import BLOCK, FIELDS, UNIT, apply
from gawscompile.planning import devices
from gawscompile.runtime.banked import taken
from tests.banks import test_dora, test_kronecker
from tests.banks.common import adapted, agree, by_row, close, with_bank

K, N = 24, 20


def factors(rank: int, more: int) -> Factors:
    bias = torch.randn(N) if more else None
    scaled = Scaled(torch.rand(N) + 0.5, torch.rand(N)) if more == 2 else None
    return Factors(torch.randn(rank, K), torch.randn(N, rank), 1.5, bias, scaled)


@pytest.mark.parametrize("more", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 14, 15, 16, 17, 40])
def test_an_adapter_in_blocks(rank, more):
    """What is missing of a block is zeros, whatever lay there before; what is put is what is found again."""
    torch.manual_seed(rank)
    f = factors(rank, more)
    sizes = [-(-size // UNIT) * UNIT for size in layouts.runs(f, True)]
    pool = torch.full((sum(sizes),), float("nan"))
    begins = np.cumsum([0, *sizes[:-1]]).tolist()
    entries = layouts.fill(pool, iter(begins), f, True)
    assert len(entries) == layouts.count(f, True) == -(-(rank + more) // BLOCK) and (entries[:, 3] == BLOCK).all()
    for begin, size in zip(begins, layouts.runs(f, True), strict=True):
        assert pool[begin:][:size].isfinite().all()
    schedule = torch.zeros(2, len(entries), FIELDS, dtype=torch.int32)
    schedule[1] = torch.from_numpy(entries)
    schedule[1, 0, 7] = len(entries)
    x, base = torch.randn(3, K), torch.randn(3, N)
    want = f.scale * x @ f.a.T @ f.b.T
    want = want + f.bias if f.bias is not None else want
    want = want + base * (f.scaled.c - 1) if f.scaled is not None else want
    torch.testing.assert_close(apply(x, pool, schedule, base), want, rtol=1e-4, atol=1e-4)
    a, b, bias = layouts.taken(pool, entries, rank, (N, K), True)
    assert torch.equal(a, f.a) and torch.equal(b, f.b) and (bias is None) == (f.bias is None)
    assert bias is None or f.bias is None or torch.equal(bias, f.bias)


@pytest.fixture
def on_a_gpu():
    with devices.planning_for(devices.GPUS["H100"]):
        yield


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("kinds", ["lora", "dora"])
def test_as_peft(kinds, ids):
    """Adapters of several blocks, rows of one choice and of many, beams, mixes, replaced and scaled while active."""
    judge = adapted("abcd") if kinds == "lora" else test_dora.adapted()
    answer = {} if kinds == "lora" else {"answer": test_dora.logits}
    model, bank = with_bank(judge)
    assert bank.shared.state.dim() == 4
    some = ["a", "c", None, {"a": 0.5, "c": 1.0}] if kinds == "lora" else test_dora.CHOICES
    rows = [["a", None, {"a": 1.0, "c": -2.0}, "c"], ["d", "b"]] if kinds == "lora" else test_dora.ROWS
    agree(model, bank, judge, ids, some, rows, **answer)
    bank.activate("a")
    bank.scale("a", -0.5)
    close(model(ids).logits, by_row(judge, ids, [{"a": -0.5}] * 4, **answer))


@pytest.mark.usefixtures("on_a_gpu")
def test_a_thread_s_own_choice_and_the_table(ids):
    judge = adapted("ac")
    model, bank = with_bank(judge)
    bank.activate(["a", "c"])
    with bank.activated([None, "a", "c", "c"]):
        close(model(ids).logits, by_row(judge, ids, [None, "a", "c", "c"]))
        assert not torch.equal(taken(bank.shared.state, 4), bank.snapshot(4))
    wanted = torch.from_numpy(bank._schedule(bank._rows[None], 4))
    assert torch.equal(taken(bank.shared.state, 4), wanted) and torch.equal(bank.snapshot(4), wanted)


@pytest.mark.usefixtures("on_a_gpu")
def test_what_has_no_place_is_refused(ids, tmp_path):
    model, bank = with_bank(adapted("ac"), max_ranks=48, max_rows=2)
    before = model(ids).logits
    with pytest.raises(BankError, match=r"3 rows, and the bank has places for 2: AdapterBank\(max_rows=…\)"):
        bank.activate(["a"] * 3)
    with pytest.raises(BankError, match=r"a and c: 4 blocks of 16 ranks, .* place for 3: AdapterBank\(max_ranks=…\)"):
        bank.activate({"a": 1.0, "c": 1.0})
    test_kronecker.judged("lokr").save_pretrained(tmp_path)
    with pytest.raises(BankError, match=r"k, .*: 2 mode product\(s\), .*for LoRA and DoRA alone: .*\(max_modes=2\)"):
        bank.load("k", tmp_path)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_row_has_the_entries_of_its_module_and_no_others():
    """Kernels read as many as a row says, and find factors for each."""
    _, bank = with_bank(adapted("acd"))
    bank.activate([{"d": 1.0, "c": 1.0, "a": 1.0}, "c", {"a": 0.5, "d": 2.0}])
    there = bank.snapshot(3)[:, 1:, :, 3] == BLOCK
    counts = bank.snapshot(3)[:, 1:, 0, 7]
    assert torch.equal(there, torch.arange(there.shape[2]) < counts[:, :, None]) and counts.unique().numel() > 3
