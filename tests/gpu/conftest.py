"""These tests run on a GPU, or, in the process of `test_rehearsal`, on its stand-in; anywhere else they are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gawscompile import backend

STAND_IN = os.environ.get("GAWS_GPU_STAND_IN") == "1"
if STAND_IN:
    from tests.gpu import stand_in

    torch.set_num_threads(1)
    stand_in.install()


backend.register()  # a machine with a GPU may have a bare checkout


def missing() -> str | None:
    """Why nothing here can run, if so."""
    if STAND_IN:
        return None
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "no GPU"
        return f"torch sees no GPU: torch {torch.__version__} is built for {built}, torch.cuda.is_available() is False"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"no Triton: {error}"
    major, minor = torch.cuda.get_device_capability()
    return f"compute capability {major}.{minor} is below 8.0, bf16's" if torch.version.cuda and major < 8 else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    for item in items:
        if item.path.parent.name != "gpu" or item.path.name == "test_rehearsal.py":
            continue
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif STAND_IN and item.get_closest_marker("device_only"):
            item.add_marker(pytest.mark.skip(reason="only a device can show it"))


def rehearsable(names: list[str], few: int) -> list[str]:
    """All of `names` on a device, and a few on the stand-in, whose kernels are interpreted."""
    return names[:few] if STAND_IN else names


@pytest.fixture
def device() -> str:
    """Where tensors go."""
    from gawscompile.calibration import gpu_timing

    return gpu_timing.DEVICE


@pytest.fixture
def llama(device: str) -> Callable[..., Any]:
    """Makes a small Llama in bf16 with LoRA on every linear, on the device."""
    import peft
    import transformers

    def make(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        width = 16 if STAND_IN else 256
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1 if STAND_IN else 2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=width // 2,
            initializer_range=0.2,
        )
        base = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16)
        lora = peft.LoraConfig(r=2 if STAND_IN else 16, lora_alpha=8, target_modules="all-linear")
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
        renew(model, seed)
        return model

    return make


def renew(model: Any, seed: int) -> None:
    """New numbers in the factors B, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
