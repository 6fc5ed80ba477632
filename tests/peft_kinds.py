"""Every configuration class that PEFT can put on a linear, found by asking PEFT, with settings for small models."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch

SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 8},
    "ADAMSS": {"r": 16, "num_subspaces": 2},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "FROD": {"progressbar": False, "sparse_rate": 0.1},
    "GRALORA": {"r": 8},
    "IA3": {"feedforward_modules": []},
    "LOKR": {"r": 4, "decompose_factor": 4},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 16},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"u": 8},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 64},
}
"""By PEFT's name of the kind; what is not here takes its defaults, with a rank of 8 where it has one."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA lora_bias": ("LORA", {"lora_bias": True}),
    "LORA patterns": ("LORA", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}),
    "LORA rslora": ("LORA", {"use_rslora": True}),
    "LORA dora": ("LORA", {"use_dora": True}),
    "LORA bd": (
        "LORA",
        {
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj", "down_proj", "c_proj", "dense"],
                "target_modules_bd_b": ["q_proj", "v_proj", "gate_proj", "c_attn", "query", "value"],
                "nblocks": 2,
                "match_strict": False,
            }
        },
    ),
    "LOHA rank dropout": ("LOHA", {"rank_dropout": 0.1}),
    "LOKR both": ("LOKR", {"r": 4, "decompose_both": True, "decompose_factor": 4}),
    "IA3 feedforward": ("IA3", {"feedforward_modules": "target"}),
    "MISS bat": ("MISS", {"r": 8, "init_weights": "bat"}),
    "MISS mini": ("MISS", {"r": 8, "init_weights": "mini", "mini_r": 8}),
    "GRALORA hybrid": ("GRALORA", {"r": 8, "hybrid_r": 4}),
    "OFT cayley": ("OFT", {"oft_block_size": 16, "use_cayley_neumann": False}),
    "ROAD road_2": ("ROAD", {"group_size": 16, "variant": "road_2"}),
    "HRA Gram-Schmidt": ("HRA", {"apply_GS": True}),
    "DELORA bias": ("DELORA", {"bias": "all"}),
}
"""Settings that make another computation of a kind."""


def kinds() -> dict[str, type]:
    """PEFT's names of the kinds whose configurations name modules to adapt."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {
        kind.value: config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "target_modules" in {f.name for f in dataclasses.fields(config)} and config.__module__.startswith("peft.")
    }


def rows() -> Iterator[str]:
    yield from kinds()
    yield from VARIANTS


def adapted(name: str, model: torch.nn.Module, targets: list[str]) -> torch.nn.Module:
    """`model` with a random adapter of this row on its `targets`."""
    import peft

    kind, settings = VARIANTS.get(name, (name, SETTINGS.get(name, {})))
    config = kinds()[kind]
    settings = {key: targets if value == "target" else value for key, value in settings.items()}
    if "r" in {field.name for field in dataclasses.fields(config)} and kind not in ("OFT",):
        settings = {"r": 8, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config(target_modules=targets, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))
    return model
