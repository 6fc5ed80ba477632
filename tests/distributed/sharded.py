"""Run by ``torchrun``, a process for each rank: a model that transformers shards, with PEFT's LoRA, beside one process.

    torchrun --nproc-per-node 2 -m tests.distributed.sharded FOLDER llama
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

import gawscompile
from gawscompile.observe.store import RECORDS

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
}
CACHES: dict[str, tuple[str | None, ...]] = {"llama": (), "qwen2": ("static",), "mistral": (None,)}
"""Of the `generate` that is compiled too; it takes minutes."""
NEW = 24


def adapted(base: Any) -> Any:
    """`base` with a LoRA on all linears, whose numbers depend on their names alone; each rank keeps its shard."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    found = 0
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        numbers = torch.randn(parameter.shape, generator=generator) / 5  # a DTensor's shape is that of the whole
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                shard = distribute_tensor(numbers, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(shard.to_local())
            else:
                parameter.copy_(numbers)
        found += 1
    assert found
    return model


def collectives(model: Any, ids: torch.Tensor) -> tuple[int, list[Any]]:
    """All-reduces in the code that Inductor printed for one call of `model` under gaws, and the graphs' records."""
    from torch._inductor.utils import run_and_get_code

    mark = len(RECORDS)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(torch.compile(model, backend="gaws"), input_ids=ids, use_cache=False)
    return sum(code.count("all_reduce_.default(") + code.count("all_reduce.default(") for code in codes), [
        record for record in RECORDS.since(mark)
    ]


@torch.no_grad()
def main(folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config, kind = MODELS[name]
    torch.manual_seed(0)
    whole = kind(config(**SIZES)).eval()
    place = Path(folder) / name
    if dist.get_rank() == 0:
        whole.save_pretrained(place)
    dist.barrier()
    ids = torch.arange(7)[None] + 3
    settings = {"input_ids": ids, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    want = adapted(whole).generate(**settings)

    def sharded() -> Any:
        plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
        return kind.from_pretrained(place, distributed_config=plan).eval()

    bare, _ = collectives(sharded(), ids)
    model = adapted(sharded())
    joined, records = collectives(model, ids)
    assert joined == bare > 0, (joined, bare)
    entries = [entry for record in records for entry in record.linears if entry.adapters]
    assert len(entries) == 7 and {entry.status for entry in entries} == {"fused"}, entries
    torch._dynamo.reset()
    compiled = gawscompile.compile(model)
    for cache in CACHES[name]:
        got = compiled.generate(**settings, cache_implementation=cache)
        assert torch.equal(got, want), (cache, got, want)
    logits = model(ids).logits
    others = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(others, logits)
    assert all(torch.equal(one, logits) for one in others)
    print(f"rank {dist.get_rank()} right: {joined} collectives", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
