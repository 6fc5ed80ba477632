"""Small random models of many architectures, each with a LoRA on every linear that PEFT's ``all-linear`` finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.graphs import randomise, tokens

LAYERS = 2


@dataclass(frozen=True)
class Architecture:
    """How to make one, what to call it with, and what must become of its adapters.

    `adapted`: linears with a LoRA in a model of `LAYERS` layers, from its configuration. `refused`: reason → how many
    of them are left to Inductor for it. `calls` are keyword arguments that make caches and labels go away.
    """

    make: Callable[[], Any]
    adapted: int
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: {"input_ids": tokens(2, 7)}
    refused: dict[str, int] = field(default_factory=dict)
    calls: dict[str, Any] = field(default_factory=dict)
    targets: Any = "all-linear"

    def build(self, dtype: torch.dtype = torch.float32, prepare: Callable[[Any], None] = lambda base: None) -> Any:
        """In eval mode, base in `dtype`, factors in fp32 as PEFT keeps them, B random. `prepare` may quantise it."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = self.make().to(dtype).eval()
        prepare(base)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=self.targets)
        return randomise(get_peft_model(base, config).eval())


SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
WIDE = {**SMALL, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
NO_CACHE = {"use_cache": False}


def make(name: str, **sizes: Any) -> Callable[[], Any]:
    """A transformers model by the name of its class, from its configuration's class with `sizes`."""

    def build() -> Any:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**sizes))

    return build


def decoder(name: str, per_layer: int, sizes: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(make(name, **sizes), per_layer * LAYERS, calls=NO_CACHE, **more)


def seq2seq() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(2, 7), "decoder_input_ids": tokens(2, 5, seed=1)}


OLD = {"vocab_size": 128, "n_embd": 64, "n_layer": LAYERS, "n_head": 4}
HEADS = (("attention_heads", 4), ("ffn_dim", 96))
BART = {"vocab_size": 128, "d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
BART |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in HEADS}
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_heads": 4}
ENCODER = {**SMALL, "intermediate_size": 96}

ARCHITECTURES = {
    "Llama": decoder("LlamaForCausalLM", 7, WIDE),
    "Mistral": decoder("MistralForCausalLM", 7, {**WIDE, "sliding_window": 4}),
    "Qwen3": decoder("Qwen3ForCausalLM", 7, WIDE),
    "Gemma 2": decoder(
        "Gemma2ForCausalLM",
        7,
        {**WIDE, "sliding_window": 4, "attn_implementation": "eager", "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": decoder("Gemma3ForCausalLM", 7, {**WIDE, "sliding_window": 4}),
    "Phi-3": decoder("Phi3ForCausalLM", 4, {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}),
    "GPT-2": decoder("GPT2LMHeadModel", 4, OLD),
    "GPT-NeoX": decoder("GPTNeoXForCausalLM", 4, ENCODER),
    "OPT": decoder("OPTForCausalLM", 6, {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Falcon": decoder("FalconForCausalLM", 4, SMALL),
    "Bloom": decoder("BloomForCausalLM", 4, {"vocab_size": 128, "hidden_size": 64, "n_layer": LAYERS, "n_head": 4}),
    "Mixtral": decoder(
        "MixtralForCausalLM",
        4,
        {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "gpt-oss": decoder(
        "GptOssForCausalLM",
        4,
        {**WIDE, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "BERT": Architecture(make("BertModel", **ENCODER), 6 * LAYERS + 1),
    "RoBERTa": Architecture(make("RobertaModel", **ENCODER), 6 * LAYERS + 1),
    "DeBERTa": Architecture(
        make("DebertaV2Model", **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
        8 * LAYERS,  # positions have keys and queries of their own
    ),
    # encoder: q, k, v, o, wi, wo; decoder: twice the attention
    "T5": Architecture(make("T5Model", **T5), (6 + 10) * LAYERS, inputs=seq2seq, calls=NO_CACHE),
    "BART": Architecture(make("BartModel", **BART), (6 + 10) * LAYERS, inputs=seq2seq, calls=NO_CACHE),
    "ViT": Architecture(
        make("ViTModel", **{k: v for k, v in ENCODER.items() if k != "vocab_size"}, image_size=32, patch_size=8),
        6 * LAYERS + 1,
        inputs=lambda: {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    ),
}
