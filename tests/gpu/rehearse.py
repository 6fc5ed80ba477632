"""Runs `benchmarks.gpu` on the stand-in, with models of a handful of features, so that every line of it runs once.

    python -m tests.gpu.rehearse --out FOLDER

Nothing of what it writes says anything about a GPU.
"""

from __future__ import annotations

import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "GAWS_GPU_STAND_IN": "1", "CUDA_VISIBLE_DEVICES": ""}  # before Triton's import

import torch

from benchmarks import common, gpu, gpu_cells
from benchmarks.shapes import SHAPES, Shape
from tests.gpu import stand_in

LLAMA = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "head_dim": 16}


def main() -> int:
    torch.set_num_threads(1)
    stand_in.install()
    llama = {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}
    for name in ("llama-3.2-1b", "llama-3.2-3b"):
        SHAPES[name] = Shape("LlamaForCausalLM", llama, 2)
    SHAPES["gpt2-large"] = Shape("GPT2LMHeadModel", {"n_embd": 16, "n_head": 1, "vocab_size": 24}, 2, ("n_layer",))
    common.PAST, common.PREFILL = 2, 3
    gpu_cells.ROUNDS, gpu_cells.REPLAYS, gpu_cells.RANK = 1, {"decode": 1, "prefill": 1}, 2
    gpu.WORKER = ["-m", "tests.gpu.rehearse"]
    return gpu.main()


if __name__ == "__main__":
    sys.exit(main())
