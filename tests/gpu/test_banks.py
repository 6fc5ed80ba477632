"""An adapter bank on the device: graphs that replay with what is active then, and the pool's layout there."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import gawscompile
from gawscompile.adapters import GAWSConfig
from gawscompile.banks.checkpoints import BankError
from gawscompile.calibration import gpu_timing
from gawscompile.observe.store import RECORDS
from tests.banks.common import by_row
from tests.gpu.conftest import renew
from tests.gpu.test_graphs import STRICT, alike

KINDS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
    {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_bias": True},
    {"r": 19, "lora_alpha": 20, "target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    {"r": 4, "lora_alpha": 4, "target_modules": ["k_proj", "gate_proj"], "use_dora": True},
]


@pytest.fixture
def judged(llama: Callable[..., Any]) -> tuple[Any, Any, gawscompile.AdapterBank]:
    """PEFT's own model with eight adapters of four kinds, and a copy of it whose adapters a bank has."""
    judge = llama()
    for number, name in enumerate("abcdefg"):
        judge.add_adapter(name, peft.LoraConfig(**KINDS[number % 4]), autocast_adapter_dtype=False)
    renew(judge, 5)
    for name, parameter in judge.named_parameters():
        if "lora_magnitude" in name:
            with torch.no_grad():
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model = copy.deepcopy(judge)
    return judge, model, gawscompile.AdapterBank(model, memory="4MB", max_ranks=64, max_rows=8)


@torch.no_grad()
def test_a_graph_replays_with_what_is_active(judged: Any, device: str):
    """Eight adapters in a batch of eight, then three, two for four rows each, one, and none: on one captured graph."""
    judge, model, bank = judged
    mark, ids = len(RECORDS), torch.randint(0, 64, (8, 1), device=device)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options=STRICT)
    recorded = gpu_timing.Recorded(lambda: compiled(input_ids=ids, use_cache=False).logits)
    groups = [group for record in RECORDS.since(mark) for group in record.groups]
    assert sum(group.spec.count("bank(bf16 x4)") for group in groups) == 7 * model.config.num_hidden_layers
    names = ["default", *"abcdefg"]
    few = list("bbdadaab")
    for choice in (names, few, ["c", "default"], ["f"], [{"b": 0.5, "c": -1.0, "d": 1.0}], [None]):
        bank.activate(choice)
        got = recorded.replay().clone()
        torch.cuda.synchronize()
        alike(got, by_row(judge, ids, choice))
    bank.activate("b")
    bank.scale("b", 2.0)
    want = by_row(judge, ids, [{"b": 2.0}])
    alike(recorded.replay(), want)
    alike(compiled(input_ids=ids, use_cache=False).logits, want)


@torch.no_grad()
def test_a_graph_replays_with_chains_of_modes(llama: Callable[..., Any], device: str):
    """GAWS and LoKr beside LoRA in a batch, then LoKr for all rows, then some and none."""
    judge = llama()
    small = {"target_modules": ["q_proj", "down_proj"]}
    configs = {"g": GAWSConfig(**small, input_splits=4), "k": peft.LoKrConfig(**small, r=16, alpha=24)}
    bank = gawscompile.AdapterBank(copy.deepcopy(judge), memory="4MB", max_ranks=64, max_rows=4, max_modes=2)
    model, judges = bank.model, {"default": judge}
    for name, config in configs.items():
        judges[name] = peft.get_peft_model(llama().unload(), config, autocast_adapter_dtype=False)
        for key, parameter in judges[name].named_parameters():
            if "GAWS" in key or "lokr_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        bank.load(name, judges[name])

    def want(ids: torch.Tensor, choices: list[Any]) -> torch.Tensor:
        rows = []
        for row, choice in enumerate(choices):
            with contextlib.ExitStack() as off:
                if choice is None:
                    off.enter_context(judge.disable_adapter())
                rows.append(judges[choice or "default"](input_ids=ids[row : row + 1], use_cache=False).logits)
        return torch.cat(rows)

    ids = torch.randint(0, 64, (4, 1), device=device)
    mark = len(RECORDS)
    compiled = torch.compile(model, backend="gaws", dynamic=False, options=STRICT)
    recorded = gpu_timing.Recorded(lambda: compiled(input_ids=ids, use_cache=False).logits)
    groups = [group for record in RECORDS.since(mark) for group in record.groups]
    assert sum(group.spec.count("bank(bf16 x4 modes=2)") for group in groups) == 7 * model.config.num_hidden_layers
    for choice in (["g", "k", "default", None], ["k"] * 4, [None, "g", "g", "k"], [None] * 4):
        bank.activate(choice)
        got = recorded.replay().clone()
        torch.cuda.synchronize()
        alike(got, want(ids, choice))


@torch.no_grad()
def test_eager_and_a_choice_of_one_thread(judged: Any, device: str):
    judge, model, bank = judged
    ids = torch.randint(0, 64, (2, 3), device=device)
    bank.activate("a")
    with bank.activated(["d", "c"]):
        alike(model(input_ids=ids).logits, by_row(judge, ids, ["d", "c"]))
    alike(model(input_ids=ids).logits, by_row(judge, ids, ["a"]))


def test_what_has_no_place_is_refused(judged: Any):
    _, _, bank = judged
    with pytest.raises(BankError, match="max_rows"):
        bank.activate(["a"] * 9)
    with pytest.raises(BankError, match="max_ranks"):
        bank.activate({"b": 1.0, "f": 1.0, "default": 1.0})


@torch.no_grad()
def test_an_adapter_comes_back_to_the_pool(judged: Any, device: str, tmp_path: Any):
    judge, model, bank = judged
    ids = torch.randint(0, 64, (1, 2), device=device)
    for name in "bcd":
        bank.save(name, tmp_path / name)
        bank.load(name, tmp_path / name, lazy=True)
        assert not bank.info(name).resident
        bank.activate(name)
        alike(model(input_ids=ids).logits, by_row(judge, ids, [name]))


@torch.no_grad()
def test_reduce_overhead(judged: Any, device: str):
    judge, model, bank = judged
    ids = torch.randint(0, 64, (1, 1), device=device)
    compiled = torch.compile(model, backend="gaws", dynamic=False, mode="reduce-overhead")
    for name in ("a",) if device == "cpu" else ("a", None, "b", "default", "d"):  # warms up, records, replays
        bank.activate(name)
        torch.compiler.cudagraph_mark_step_begin()
        alike(compiled(input_ids=ids, use_cache=False).logits.clone(), by_row(judge, ids, [name]))
