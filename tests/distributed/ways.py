"""Run by ``torchrun``, a process for each rank: torch's own ways to spread a model with PEFT's LoRA over processes.

    torchrun --nproc-per-node 2 -m tests.distributed.ways by_hand replicated sequence fsdp ddp ddp_steps
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gawscompile
from gawscompile.debug.explain import Report
from gawscompile.observe.store import RECORDS
from tests.distributed.sharded import MODELS, SIZES, adapted

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWWISE = ("o_proj", "down_proj")


def explained(model: Any, want: torch.Tensor, **inputs: Any) -> Report:
    """`explain`, and a right answer by the same graph."""
    torch._dynamo.reset()
    report = gawscompile.explain(model, **inputs)
    torch._dynamo.reset()
    found = torch.compile(model, backend="gaws")(**inputs)
    torch.testing.assert_close(getattr(found, "logits", found), want, rtol=1e-4, atol=1e-5)
    return report


def llama() -> Any:
    config, kind = MODELS["llama"]
    torch.manual_seed(0)
    return adapted(kind(config(**SIZES)).eval())


def styles(name: str, **rows: Any) -> dict[str, Any]:
    """A projection with its LoRA, sharded as PEFT does it."""
    if name.rpartition(".")[2] in ROWWISE:
        return {f"{name}.base_layer": RowwiseParallel(**rows), f"{name}.lora_A.default": RowwiseParallel(**rows)}
    return {f"{name}.base_layer": ColwiseParallel(), f"{name}.lora_B.default": ColwiseParallel()}


def by_hand(mesh: Any) -> None:
    """``parallelize_module``; the head stays whole."""
    ids = torch.arange(7)[None] + 3
    model = llama()
    want = model(ids).logits
    paths = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in SEVEN]
    plan: dict[str, Any] = {}
    for path in paths:
        plan |= styles(path)
    report = explained(parallelize_module(model, mesh, plan), want, input_ids=ids, use_cache=False)
    assert all(entry.status == "fused" for entry in report.linears), str(report)
    shards = {entry.path.rpartition(".")[2]: (entry.shape, entry.shard) for entry in report.linears}
    assert shards["q_proj"] == ((32, 64), "colwise: 1 of 2 parts of 64x64"), shards
    assert shards["down_proj"] == ((64, 48), "rowwise: 1 of 2 parts of 64x96"), shards
    assert shards["lm_head"] == ((96, 64), "replicated"), shards
    assert "collectives of a call: 2 × all_reduce sum" in str(report) and "over ranks" in str(report), str(report)


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down_proj = torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = torch.nn.LayerNorm(64), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x))


def sequence(mesh: Any) -> None:
    """Sequence parallelism: a rank has a part of the tokens, all of which the MLP gathers once."""
    torch.manual_seed(0)
    model = adapted(Block().eval(), target_modules=list(SEVEN))
    x = torch.randn(1, 6, 64)
    want = model(x)
    plan: dict[str, Any] = {"base_model.model.norm": SequenceParallel()}
    whole = {"desired_input_layouts": Replicate(), "use_local_output": True}
    plan["base_model.model.mlp"] = PrepareModuleInput(input_layouts=Shard(1), **whole)
    for name in ("gate_proj", "up_proj", "down_proj"):
        plan |= styles(f"base_model.model.mlp.{name}", **({"output_layouts": Shard(1)} if name in ROWWISE else {}))
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    parallelize_module(model, mesh, plan)
    report = explained(model, want[:, mine], x=x[:, mine].contiguous())
    groups = {entry.path.rpartition(".")[2]: entry.group for entry in report.linears if entry.status == "fused"}
    assert groups == {"gate_proj": 0, "up_proj": 0, "down_proj": 1}, str(report)
    counts = Counter(one.split()[0] for record in RECORDS.since(len(RECORDS) - 1) for one in record.collectives)
    assert counts == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}, counts  # as many as without LoRA


def replicated(mesh: Any) -> None:
    """Factors that every rank has whole, beside a base in parts: the base's collectives remain the only ones."""
    torch.manual_seed(0)
    model = adapted(Mlp().eval(), target_modules=list(SEVEN))
    x = torch.randn(2, 3, 64)
    want = model(x)
    name = "base_model.model.{}_proj.base_layer"
    plan: dict[str, Any] = {
        name.format("gate"): ColwiseParallel(output_layouts=Replicate()),
        name.format("up"): ColwiseParallel(output_layouts=Replicate()),
        name.format("down"): RowwiseParallel(input_layouts=Replicate()),
    }
    report = explained(parallelize_module(model, mesh, plan), want, x=x)
    assert len(report.linears) == 9 and all(entry.status == "fused" for entry in report.linears), str(report)
    counts = Counter(one.split()[0] for record in RECORDS.since(len(RECORDS) - 1) for one in record.collectives)
    assert counts == {"all_gather_into_tensor": 2, "all_reduce": 1}, counts  # as many as without LoRA


def fsdp(mesh: Any) -> None:
    """FSDP2: parameters are gathered by hooks, between graphs."""
    ids = torch.arange(7)[None] + 3
    model = llama()
    want = model(ids).logits
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    report = explained(model, want, input_ids=ids, use_cache=False)
    assert len(report.linears) == 8 and all(entry.status == "fused" for entry in report.linears), str(report)
    assert {entry.shard for entry in report.linears} == {"kept by ranks in parts, gathered for a call"}, str(report)
    assert "FSDP" in str(report.notes) and any("graph break" in one.kind for one in report.troubles), str(report)


def ddp(mesh: Any) -> None:
    """Encoders under DDP and DataParallel: each rank has rows of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=96, **sizes)).eval()
    model = adapted(bert)
    ids = torch.arange(8)[None] + 3 + dist.get_rank()
    want = model(ids).last_hidden_state
    for spread in (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel):
        torch._dynamo.reset()
        mark = len(RECORDS)
        with torch.enable_grad():
            whole = spread(copy.deepcopy(model))
        got = torch.compile(whole, backend="gaws")(input_ids=ids).last_hidden_state
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        entries = [entry for record in RECORDS.since(mark) for entry in record.linears if entry.adapters]
        assert len(entries) == 7 and all(entry.status == "fused" for entry in entries), (spread, entries)


@torch.enable_grad()
def ddp_steps(mesh: Any) -> None:
    """Training under DDP, in one bucket and in some of 2 kB, which hold one factor or two: gradients are the mean over
    all ranks' rows, and the factors stay alike."""
    for small in (False, True):
        _ddp_steps(small)


def _ddp_steps(small: bool) -> None:
    torch.manual_seed(0)
    model = adapted(Block(), target_modules=list(SEVEN)).train()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    mark = len(RECORDS)
    spread = torch.nn.parallel.DistributedDataParallel(model, **({"bucket_cap_mb": 0.002} if small else {}))
    if small:
        dist._DEFAULT_FIRST_BUCKET_BYTES = 1024  # Dynamo's first bucket: 1 MB otherwise, which holds this whole model
    run = torch.compile(spread, backend="gaws", dynamic=False)
    trained = [[p for p in one.parameters() if p.requires_grad] for one in (model, twin)]
    optimizers = [torch.optim.AdamW(factors, lr=1e-2, fused=True) for factors in trained]
    for step in range(3):
        torch.manual_seed(step)
        rows = torch.randn(dist.get_world_size(), 2, 3, 64)
        run(rows[dist.get_rank()]).square().mean().backward()
        twin(rows).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-5)
    records = RECORDS.since(mark)
    entries = [entry for record in records for entry in record.linears if entry.adapters]
    assert entries and all(entry.status == "fused" for entry in entries), entries
    assert (len(records) > 1) == small, records  # torch.compile makes a graph of each bucket
    if not small:
        assert [entry.backward for entry in entries] == [False, False, False, True]  # x needs no gradient


@torch.no_grad()
def main(*names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        globals()[name](mesh)
    print(f"rank {dist.get_rank()} right: {names}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
