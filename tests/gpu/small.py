"""The benchmark's models with a handful of features, and few of everything else: for its Python, not its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import common, gpu_cells
from benchmarks.shapes import SHAPES, Shape

LLAMA = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "head_dim": 16}
GPT2 = {"n_embd": 16, "n_head": 1, "vocab_size": 24}
RANKS = {16: 2, 64: 3, 8: 1}


def shrink(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Makes everything small, by `put`, which works as `setattr`."""
    llama = Shape("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}, 2)
    gpt2 = Shape("GPT2LMHeadModel", GPT2, 2, ("n_layer",))
    shapes = SHAPES | {"llama-3.2-1b": llama, "llama-3.2-3b": llama, "gpt2-large": gpt2}
    for module in (common, gpu_cells):
        put(module, "SHAPES", shapes)
    put(common, "PAST", 2)
    put(common, "PREFILL", 3)
    put(gpu_cells, "ROUNDS", 1)
    put(gpu_cells, "REPLAYS", {"decode": 1, "prefill": 1})
    put(gpu_cells, "RANK", RANKS[gpu_cells.RANK])
    variants = tuple((backend, kind, RANKS[rank]) for backend, kind, rank in gpu_cells.VARIANTS)
    put(gpu_cells, "VARIANTS", variants)
