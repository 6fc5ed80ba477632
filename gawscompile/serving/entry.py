"""``gawscompile.compile``: torch.compile with our backend, and a ``generate`` that runs compiled."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from gawscompile.backend import register
from gawscompile.runtime import polyfills
from gawscompile.serving import generation


def compile(model: Any, *, options: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """``torch.compile(model, backend="gaws", options=…, …)``; `settings` are torch.compile's.

    Where `model` generates (transformers' models, PEFT around them), so does what is returned, compiled: see
    `gawscompile.serving.generation.CompiledModel`.

    Raises `ValueError` for `backend` and `mode` (give the options that a mode stands for: `torch._inductor.
    list_mode_options`).
    """
    if taken := [name for name in ("backend", "mode") if name in settings]:
        raise ValueError(f"gawscompile.compile takes no {' and no '.join(taken)}; pass what the mode means as options")
    register()
    polyfills.install()  # the backend may have loaded before PEFT was imported
    compiling = functools.partial(_compiled, dict(options or {}), settings)
    compiled = compiling(model)
    if isinstance(model, torch.nn.Module) and generation.generating(model) is not None:
        return generation.CompiledModel(model, compiled.dynamo_ctx, compiling)
    return compiled


def _compiled(options: dict[str, Any], settings: dict[str, Any], target: Any) -> Any:
    """torch.compile takes a ``guard_filter_fn`` out of the options that it is given: each call gets its own."""
    return torch.compile(target, backend="gaws", options={**options}, **settings)
