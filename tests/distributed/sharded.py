"""Run by ``torchrun``, a process for each rank: a model that transformers shards, with PEFT's LoRA, beside one process.

    torchrun --nproc-per-node 2 -m tests.distributed.sharded FOLDER llama static dynamic

Prints all-reduces in a call of the bare model, of the adapted one under Inductor, and of that under gaws, and generates
with the caches that are named. Where none is named, the bare model runs in eager mode alone, and Inductor does not run
the adapted one. `FOLDER` is scratch, or has the model where that is smollm2.
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
from torch.distributed.tensor.debug import CommDebugMode
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
NEW = 64
MLP = {"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}
"""What two ranks can share of SmolLM2, which has three key heads."""


@torch.no_grad()
def adapted(base: Any, target_modules: Any = "all-linear", size: float = 0.2) -> Any:
    """`base` with a LoRA on all linears, whose numbers, of about a `size`, depend on their names alone; each rank keeps
    its shard."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=target_modules)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        numbers = torch.randn(parameter.shape, generator=generator) * size  # a DTensor's shape is that of the whole
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(numbers, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(numbers)
    return model


class Counted:
    """Counts the all-reduces of the graphs that Inductor lowers."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        ops = torch.ops._c10d_functional
        targets = {ops.all_reduce.default, ops.all_reduce_.default}
        self.count += sum(node.target in targets for node in graph.nodes)


def compiled(model: Any, backend: str, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The logits of `model` under a backend, and its all-reduces."""
    torch._dynamo.reset()
    counted = Counted()
    settings = {"fx_graph_cache": False, "post_grad_custom_post_pass": counted}
    with torch._inductor.config.patch(settings):
        logits = torch.compile(model, backend=backend)(input_ids=ids, use_cache=False).logits
    return logits, counted.count


def same_on_all_ranks(found: torch.Tensor) -> bool:
    others = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(others, found.contiguous())
    return all(torch.equal(one, found) for one in others)


@torch.no_grad()
def main(folder: str, name: str, *caches: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place, plan = Path(folder) / name, DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    size, near = 0.2, 1e-5
    if name == "smollm2":  # of real weights, with logits of 30 and more after 30 layers
        place, size, near = Path(folder), 0.02, 5e-3
        kind = transformers.LlamaForCausalLM
        bare = kind.from_pretrained(place).eval()
        settings = {"config": transformers.LlamaConfig.from_pretrained(place)}
        settings["config"].base_model_tp_plan = MLP
    else:
        config, kind = MODELS[name]
        torch.manual_seed(0)
        bare, settings = kind(config(**SIZES)).eval(), {}
        if dist.get_rank() == 0:
            bare.save_pretrained(place)
        dist.barrier()
    layers = bare.config.num_hidden_layers
    ids = torch.arange(7)[None] + 3
    unadapted = bare(ids).logits
    whole = adapted(bare, size=size)
    want = whole(ids).logits
    assert (want - unadapted).abs().max() > 0.01  # the adapter counts

    def sharded() -> Any:
        return kind.from_pretrained(place, distributed_config=plan, **settings).eval()

    base = sharded()
    with CommDebugMode() as eager:
        torch.testing.assert_close(base(ids).logits, unadapted, rtol=1e-4, atol=near)
    of_base = sum(eager.comm_counts[op] for op in (torch.ops.c10d_functional.all_reduce, torch.ops.c10d.allreduce_))
    if caches:  # the fast test leaves it out
        got, compiled_base = compiled(base, "gaws", ids)
        torch.testing.assert_close(got, unadapted, rtol=1e-4, atol=near)
        assert compiled_base == of_base
    model = adapted(sharded(), size=size)
    of_inductor = compiled(model, "inductor", ids)[1] if caches else None
    mark = len(RECORDS)
    got, of_gaws = compiled(model, "gaws", ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=near)
    assert same_on_all_ranks(got)
    assert of_gaws == of_base > 0 and (of_inductor is None or of_inductor > of_gaws), (of_base, of_inductor, of_gaws)
    entries = [entry for record in RECORDS.since(mark) for entry in record.linears if entry.adapters]
    assert len(entries) == 7 * layers and {entry.status for entry in entries} == {"fused"}, entries
    asked = {"input_ids": ids, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for cache in caches:
        torch._dynamo.reset()
        tokens = gawscompile.compile(model).generate(**asked, cache_implementation=cache)
        assert torch.equal(tokens, whole.generate(**asked)) and same_on_all_ranks(tokens), cache
    print(f"rank {dist.get_rank()} right: {of_base}, {of_inductor}, {of_gaws}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
