"""``gawscompile.compile``: torch.compile for serving, without the guards that cost most and protect least.

Before every call Dynamo checks what it assumed of the model. PEFT's LoRA has eight modules per projection, and most of
these checks are of torch's own: that an ``nn.Linear`` inside an adapter is still one and holds a parameter of the same
shape. `torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe` leaves those out. All that PEFT keeps in modules of its
own stays guarded: the active adapters, scaling, disabling, merging, and which adapters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gawscompile.backend import register


def compile(model: Any, *, options: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """``torch.compile(model, backend="gaws", options=…, …)`` with `inference_guards`; `settings` are torch.compile's.

    Stay right: whatever is written to a parameter, ``set_adapter``, ``disable_adapter``, scaling, ``merge_adapter``,
    adding and deleting adapters. Not noticed any more: hooks and other attributes that are put on an ``nn.Linear``,
    ``nn.Embedding``, ``nn.Dropout`` … itself after it was compiled. A parameter of another shape or dtype is an error
    of the op or of Inductor's wrapper, which check it; a submodule that is replaced is noticed.

    Raises `ValueError` for `backend` and `mode` (give the options that a mode stands for: `torch._inductor.
    list_mode_options`) and for options that hold a ``guard_filter_fn``: this is one.
    """
    if "guard_filter_fn" in (options or {}):
        raise ValueError("gawscompile.compile is a guard_filter_fn; for your own, torch.compile(backend='gaws')")
    if taken := [name for name in ("backend", "mode") if name in settings]:
        raise ValueError(f"gawscompile.compile takes no {' and no '.join(taken)}; pass what the mode means as options")
    register()
    return torch.compile(
        model, backend="gaws", options={**(options or {}), "guard_filter_fn": inference_guards}, **settings
    )


def inference_guards(entries: Sequence[Any]) -> list[bool]:
    """A ``guard_filter_fn``: drops the guards on torch's own modules, unless gradients are on.

    With gradients a parameter's ``requires_grad`` decides what the graph computes, so there all guards stay.
    """
    if torch.is_grad_enabled():
        return [True] * len(entries)
    return list(torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe(entries))
