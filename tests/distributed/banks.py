"""Run by ``torchrun``: a bank on a model that transformers shards, switched while it generates.

    torchrun --nproc-per-node 2 -m tests.distributed.banks FOLDER SWITCHES
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import DynamicCache, LogitsProcessorList
from transformers.distributed import DistributedConfig

import gawscompile
from gawscompile.banks.opening import BankError
from gawscompile.demo.decoding import cache_keyword
from gawscompile.observe.store import RECORDS
from tests.banks.common import logits
from tests.distributed.sharded import MODELS, SIZES, same_on_all_ranks
from tests.graphs import randomise

KINDS = {
    "a": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "b": peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], lora_bias=True),
}
CHOICES = ("a", None, "b", {"a": 0.5, "b": -1.0})


class Switching:
    """Chooses another adapter before each token, and keeps what the model said after it."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.choices = itertools.cycle(("a", None, "b"))
        self.now = next(self.choices)
        bank.activate(self.now)
        self.said: list[tuple[Any, torch.Tensor]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.said.append((self.now, scores.clone()))
        self.now = next(self.choices)
        self.bank.activate(self.now)
        return scores


def eager(judge: Any, ids: torch.Tensor, said: list[tuple[Any, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """What PEFT says in one process, token by token, each by the adapter that was active then; keys and values of the
    tokens before are by those that were active then."""
    cache = {cache_keyword(judge): DynamicCache(config=judge.config), "use_cache": True}
    for choice, _ in said:
        if choice is not None:
            judge.set_adapter(choice)
        with judge.disable_adapter() if choice is None else contextlib.nullcontext():
            scores = judge(input_ids=ids, **cache).logits[:, -1]
        yield scores
        ids = scores.argmax(-1, keepdim=True)


@torch.no_grad()
def main(folder: str, switches: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config, kind = MODELS["llama"]
    torch.manual_seed(0)
    bare = kind(config(**SIZES, eos_token_id=None)).eval()
    place = Path(folder)
    if rank == 0:
        bare.save_pretrained(place / "base")
    first, *rest = KINDS
    judge = peft.get_peft_model(bare, KINDS[first], adapter_name=first)
    for name in rest:
        judge.add_adapter(name, KINDS[name])
    randomise(judge, scale=0.3).eval()
    if rank == 0:
        judge.save_pretrained(place)
    dist.barrier()
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = kind.from_pretrained(place / "base", distributed_config=plan).eval()
    bank = gawscompile.AdapterBank(model, memory="1MB")
    for name in KINDS:
        bank.load(name, place / name)
    try:
        bank.save("a", place / "again")
    except BankError as error:
        assert "each rank" in str(error)
    else:
        raise AssertionError("a part of an adapter was saved")
    mark = len(RECORDS)
    compiled = gawscompile.compile(model)
    ids = torch.arange(7)[None] + 3
    for choice in CHOICES:
        bank.activate(choice)
        got = compiled(input_ids=ids, use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, logits(judge, ids, choice)[:, -1], rtol=1e-4, atol=1e-4)
    record, *others = RECORDS.since(mark)
    assert not others  # nothing was compiled again
    assert sum("bank(" in group.spec for group in record.groups) == 4, record.groups
    assert record.collectives.count("all_reduce sum 0") == 3, record.collectives  # as many as the base has
    if int(switches):
        torch._dynamo.reset()
        switching = Switching(bank)
        compiles = counters["stats"]["unique_graphs"]
        settings = {"max_new_tokens": int(switches), "do_sample": False}
        tokens = gawscompile.compile(model).generate(
            input_ids=ids, pad_token_id=0, logits_processor=LogitsProcessorList([switching]), **settings
        )
        assert same_on_all_ranks(tokens) and len(switching.said) == int(switches)
        assert counters["stats"]["unique_graphs"] <= compiles + 3
        for (_, scores), want in zip(switching.said, eager(judge, ids, switching.said), strict=True):
            torch.testing.assert_close(scores, want, rtol=1e-3, atol=1e-4)
            assert same_on_all_ranks(scores)
    print(f"rank {rank} right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
