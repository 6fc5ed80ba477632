"""A small Llama with LoRA adapters by PEFT, which judges in eager mode, and a copy of it whose adapters a bank has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gawscompile.banks.bank import AdapterBank
from gawscompile.ir.records import GraphRecord

KINDS: dict[str, dict[str, Any]] = {
    "a": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "use_rslora": True, "lora_bias": True},
    "c": {
        "r": 33,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "gate_proj", "up_proj"],
        "rank_pattern": {"up_proj": 4},
        "alpha_pattern": {"gate_proj": 3},
    },
    "d": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}
LAYERS = 2


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(names: str = "abcd", dtype: torch.dtype = torch.float32) -> PeftModel:
    first, *rest = names
    cast = {"autocast_adapter_dtype": dtype == torch.float32}
    model = get_peft_model(llama(dtype=dtype), LoraConfig(**KINDS[first]), adapter_name=first, **cast)
    for name in rest:
        model.add_adapter(name, LoraConfig(**KINDS[name]), **cast)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_adapter(first)
    return model.eval()


def with_bank(model: PeftModel, **settings: Any) -> tuple[PeftModel, AdapterBank]:
    """A copy of `model` whose adapters a bank has taken over."""
    mine = copy.deepcopy(model)
    return mine, AdapterBank(mine, **{"memory": "8MB", **settings})


def logits(model: PeftModel, ids: Tensor, choice: Any) -> Tensor:
    """PEFT's own answer for one choice of `AdapterBank.activate`, in eager mode. Mixes are sums of what each adds."""
    parts = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
    layers = [layer for layer in model.modules() if hasattr(layer, "scaling") and hasattr(layer, "lora_A")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        if not parts:
            with model.disable_adapter():
                return model(ids).logits
        for layer in layers:
            for name, weight in parts.items():
                if name in layer.scaling:
                    layer.scaling[name] *= weight
        model.base_model.set_adapter(list(parts))
        return model(ids).logits
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def by_row(judge: Any, ids: Tensor, choices: Sequence[Any], answer: Callable[..., Tensor] = logits) -> Tensor:
    """The same for a batch, row by row. `answer`: what a judge makes of one choice."""
    each = len(ids) // len(choices)
    return torch.cat([answer(judge, ids[i : i + 1], choices[i // each]) for i in range(len(ids))])


def agree(
    run: Any,
    bank: AdapterBank,
    judge: Any,
    ids: Tensor,
    choices: Sequence[Any],
    rows: Sequence[list[Any]],
    answer: Callable[..., Tensor] = logits,
) -> None:
    """`run` follows the bank from choice to choice, for all rows and by row, as `judge` answers."""
    for choice in choices:
        bank.activate(choice)
        close(run(ids).logits, answer(judge, ids, choice))
    for own in rows:
        bank.activate(own)
        close(run(ids).logits, by_row(judge, ids, own, answer))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def in_kernels(records: list[GraphRecord], term: str = "bank(f32)", layers: int = LAYERS) -> bool:
    """Whether what the bank adds runs in the kernels of all linears of a Llama but the head, in one graph."""
    (record,) = records
    return sum(group.spec.count(term) for group in record.groups) == 7 * layers
