"""Errors against fp64, ours beside the better-known compilers'."""

from __future__ import annotations

import math
from typing import Any

import torch

SEEDS = 20


def error_ratio(model: Any, twin: Any, inputs: dict[str, torch.Tensor], calls: dict[str, Any]) -> float:
    """The geometric mean, over seeds, of (our error / the larger of eager's and Inductor's), all against fp64.

    `twin` is the same model and becomes the reference, in fp64 with eager attention and experts. Every seed writes new
    numbers into the live parameters of all, so each variant is compiled once.
    """
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    wide_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    wide = twin.double()
    if hasattr(wide.config, "_attn_implementation"):
        wide.set_attn_implementation("eager")
    if hasattr(wide.config, "_experts_implementation"):
        wide.config._experts_implementation = "eager"  # the grouped matmul of the default knows no fp64
    variants = {
        "eager": model,
        "inductor": torch.compile(model, dynamic=False),
        "gaws": torch.compile(model, backend="gaws", dynamic=False, options={"strict": True}),
    }
    start = {key: value.clone() for key, value in model.state_dict().items()}
    logs = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.state_dict().items():
                if parameter.is_floating_point() and parameter.dim() >= 2:
                    spread = start[key].float().std()
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()}, strict=False)
            reference = _outputs(wide(**wide_inputs, **calls))
            errors = {name: (_outputs(run(**inputs, **calls)) - reference).norm() for name, run in variants.items()}
        logs.append(math.log(errors["gaws"] / max(errors["eager"], errors["inductor"])))
    return math.exp(sum(logs) / len(logs))


def _outputs(result: Any) -> torch.Tensor:
    return (result.logits if "logits" in result else result.last_hidden_state).double()
