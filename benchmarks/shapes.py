"""The models of the GAWS and zFLoRA papers in their published shapes, with random weights: speed needs no others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A transformers model by class and configuration; `layers` names the configuration's counts of layers."""

    model: str
    sizes: dict[str, Any]
    full: int
    layers: tuple[str, ...] = ("num_hidden_layers",)
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self, layers: int | None = None) -> Any:
        """The configuration with all of its layers, or the first `layers` of them."""
        import transformers

        count = self.full if layers is None else min(layers, self.full)
        kind = getattr(transformers, self.model).config_class
        return kind(**self.sizes, **self.extra, **dict.fromkeys(self.layers, count))

    def build(self, dtype: torch.dtype, layers: int | None = None) -> Any:
        """The model in eval mode, weights as its class initialises them.

        Raises `MemoryError` where the weights would take more than half of the machine's memory.
        """
        import transformers

        config = self.config(layers)
        kind = getattr(transformers, self.model)
        with torch.device("meta"):
            needed = sum(p.numel() for p in kind(config).parameters()) * dtype.itemsize
        if needed > total_memory() / 2:
            raise MemoryError(
                f"{self.model} with {layers or self.full} layers takes {needed / 2**30:.1f} GiB, and this machine has"
                f" {total_memory() / 2**30:.1f}: cut it with --layers N"
            )
        torch.manual_seed(0)
        with default_dtype(dtype):
            return kind(config).eval()


def total_memory() -> float:
    """Bytes of memory; without end where there is no /proc."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) * 1024
    return float("inf")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of `dtype` in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _llama(hidden: int, heads: int, layers: int) -> Shape:
    sizes = {"vocab_size": 128256, "hidden_size": hidden, "intermediate_size": 8192, "tie_word_embeddings": True}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": hidden // heads}
    return Shape("LlamaForCausalLM", {**sizes, **heads_}, layers, extra={"rms_norm_eps": 1e-5})


def _encoder(model: str, hidden: int, layers: int, **more: Any) -> Shape:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    return Shape(model, {**sizes, **more}, layers)


SHAPES = {
    "gpt2-large": Shape("GPT2LMHeadModel", {"n_embd": 1280, "n_head": 20}, 36, ("n_layer",)),
    "roberta-large": _encoder(
        "RobertaModel", 1024, 24, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
    ),
    "bert-base": _encoder("BertModel", 768, 12),
    "vit-base": _encoder("ViTModel", 768, 12),
    "t5-3b": Shape(
        "T5ForConditionalGeneration",
        {"vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32},
        24,
        ("num_layers", "num_decoder_layers"),
    ),
    "llama-3.2-1b": _llama(2048, 32, 16),
    "llama-3.2-3b": _llama(3072, 24, 28),
    "llama-7b": Shape(
        "LlamaForCausalLM",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        32,
        extra={"rms_norm_eps": 1e-6},
    ),
}
