"""llama.cpp as a peer: a model and its LoRA written as GGUF, in as many bits as they have, run by llama-cpp-python.

An optional extra that is built from source: ``pip install 'gawscompile[llama]'``. Llama-type models alone, whose
weights llama.cpp takes as they are, but for the rows of q and k, which it wants in another order. The vocabulary is
left out: tokens go in as numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import quantized
from gawscompile.calibration import measure

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
PERMUTED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


class Peer:
    """`model` (a bare Llama, or a PeftModel with one active LoRA) in llama.cpp, with room for `capacity` tokens.

    Raises `ImportError` without llama-cpp-python and gguf, `ValueError` for a model of another type.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        import llama_cpp

        self._folder = tempfile.TemporaryDirectory(prefix="gaws-gguf-")
        base, lora = Path(self._folder.name) / "base.gguf", Path(self._folder.name) / "lora.gguf"
        write_base(model, base)
        adapted = hasattr(model, "peft_config")
        if adapted:
            write_lora(model, lora)
        threads = torch.get_num_threads()
        # keys and values as exact as the weights; llama.cpp has no quick attention over bf16 ones
        cached = llama_cpp.GGML_TYPE_F32 if model.dtype == torch.float32 else llama_cpp.GGML_TYPE_F16
        self.llama = llama_cpp.Llama(
            str(base),
            n_ctx=capacity,
            n_batch=capacity,
            n_ubatch=capacity,
            n_threads=threads,
            n_threads_batch=threads,
            lora_path=str(lora) if adapted else None,
            type_k=cached,
            type_v=cached,
            use_mmap=False,
            verbose=False,
        )

    def logits(self, ids: list[int], past: int = 0) -> torch.Tensor:
        """``[vocabulary]``, of the last of `ids`, which follow the first `past` tokens in the cache."""
        self._eval(ids, past)
        found = numpy.ctypeslib.as_array(self.llama._ctx.get_logits(), (self.llama.n_vocab(),))
        return torch.from_numpy(found.copy())

    def timed(self, ids: list[int], past: int) -> float:
        """Milliseconds."""
        return measure.timed(lambda: self._eval(ids, past))

    def _eval(self, ids: list[int], past: int) -> None:
        self.llama.n_tokens = past
        self.llama.eval(ids)


def steps(model: Any, prompt: list[int], prefill: list[int]) -> tuple[Callable[[], float], Callable[[], float]]:
    """A timed decode step after `prompt`, and a timed prefill."""
    peer = Peer(model, len(prompt) + len(prefill))
    peer.logits(prompt)
    return lambda: peer.timed([0], len(prompt)), lambda: _prefill(peer, prompt, prefill)


def _prefill(peer: Peer, prompt: list[int], prefill: list[int]) -> float:
    """Behind the prompt's place in the cache, which the decode steps need."""
    taken = peer.timed(prefill, 0)
    peer.logits(prompt)
    return taken


def write_base(model: Any, path: Path) -> None:
    """`model`'s base: matrices in their dtype, or in llama.cpp's format of as many bits, and vectors in fp32."""
    import gguf

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config
    if config.model_type != "llama":
        raise ValueError(f"llama.cpp is a peer for Llama-type models here, not for {config.model_type}")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    of_bits = {16: kinds.BF16, 8: kinds.Q8_0, 4: kinds.Q4_0}
    for name, tensor, bits in weights(inner):
        kind = of_bits.get(bits) if tensor.dim() == 2 else None
        data = tensor.detach().float().numpy()
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    _finish(writer)


def weights(inner: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """llama.cpp's names of a bare or adapted Llama's base, numbers, and the bits of each as it is kept."""
    modules = dict(inner.named_modules())

    def weight(name: str) -> tuple[torch.Tensor, int]:
        module = modules[name]
        module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if bits := quantized.bits(module):
            return quantized.dense(module), bits
        return module.weight, 8 * module.weight.element_size()

    yield "token_embd.weight", *weight("model.embed_tokens")
    yield "output_norm.weight", *weight("model.norm")
    if inner.lm_head.weight is not inner.model.embed_tokens.weight:
        yield "output.weight", *weight("lm_head")
    for i in range(inner.config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            numbers, bits = weight(f"model.layers.{i}.{theirs}")
            yield f"blk.{i}.{ours}.weight", permuted(numbers, theirs, inner.config), bits


def permuted(rows: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    """q's and k's rows in pairs that are turned together, as llama.cpp has them; others as they are."""
    if name not in PERMUTED:
        return rows
    heads = getattr(config, PERMUTED[name])
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def write_lora(model: Any, path: Path) -> None:
    """The active LoRA of a PeftModel."""
    import gguf

    (adapter,) = model.active_adapters
    config = model.get_base_model().config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(model.peft_config[adapter].lora_alpha))
    for i, layer in enumerate(model.get_base_model().model.layers):
        for theirs, ours in LAYER.items():
            module = layer.get_submodule(theirs)
            if hasattr(module, "lora_A"):
                a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                for name, factor in (("lora_a", a), ("lora_b", permuted(b, theirs, config))):
                    writer.add_tensor(f"blk.{i}.{ours}.weight.{name}", factor.detach().float().numpy())
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
