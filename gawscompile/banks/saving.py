"""An adapter of a bank as files that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gawscompile.banks.checkpoints import B_BIAS, BASE_BIAS, MAGNITUDE, A, B, Factors
from gawscompile.banks.kronecker import Chain
from gawscompile.banks.opening import CONFIG, PREFIX, WEIGHTS, BankError


def write(
    name: str,
    factors: Mapping[str, Factors | Chain],
    config: Mapping[str, Any],
    bases: Mapping[str, nn.Module],
    folder: Path,
) -> None:
    """Write the adapter `name`, whose `factors` lie in a pool, into `folder`. Raises `BankError` for biases that PEFT's
    files cannot say apart."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    of_b, of_base = bool(config.get("lora_bias")), config.get("bias", "none") != "none"
    for path, f in factors.items():
        if isinstance(f, Chain):
            tensors |= {f"{PREFIX}{path}.{part}": tensor.clone() for part, tensor in f.tensors().items()}
            continue
        own: Any = bases[path].bias
        parts = {A: f.a, B: f.b if f.scaled is None else f.scaled.unfolded(f.b)}
        if f.bias is not None and of_b:
            if f.scale == 0 or of_base:
                raise BankError(f"{name}: the bias of {path} is a sum of two, and PEFT's files have them apart")
            parts[B_BIAS] = f.bias / f.scale
        elif f.bias is not None and of_base and own is not None:
            parts[BASE_BIAS] = f.bias + own.detach()
        tensors |= {f"{PREFIX}{path}.{part}": tensor.to(f.a.dtype).clone() for part, tensor in parts.items()}
        if f.scaled is not None:  # as exact as it was read
            tensors[f"{PREFIX}{path}.{MAGNITUDE}"] = f.scaled.m
    settings = {**config, "target_modules": config.get("target_modules") or list(factors)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
