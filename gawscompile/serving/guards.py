"""``gawscompile.compile``: torch.compile for serving, whose guards cost least while nothing changes.

Before every call Dynamo checks what it assumed of the model, and PEFT's LoRA adds eight modules per projection to it.
Nearly all of these checks look at attributes of modules: that an ``nn.Linear`` inside an adapter is still one and holds
a parameter of the same shape, that an adapter's scaling is what it was. `inference_guards` has them checked only once
something changed, and finds out whether anything did in one call (`serving/unchanged.py`). Guards on what that cannot
see (what lies in globals, in closures, in objects with attribute access of their own) are checked before every call.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._ordered_set import OrderedSet

from gawscompile.backend import register
from gawscompile.runtime import bound, polyfills
from gawscompile.serving import generation, unchanged, watched

log = logging.getLogger("gawscompile")


def compile(model: Any, *, options: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """``torch.compile(model, backend="gaws", options=…, …)`` with `inference_guards`; `settings` are torch.compile's.

    Where `model` generates (transformers' models, PEFT around them), so does what is returned, compiled: see
    `gawscompile.serving.generation.CompiledModel`.

    Nothing is noticed less than there: parameters that are written to, replaced, or of another dtype or shape by now,
    ``set_adapter``, ``disable_adapter``, scaling, ``merge_adapter``, adapters added and deleted, hooks, attributes.

    Raises `ValueError` for `backend` and `mode` (give the options that a mode stands for: `torch._inductor.
    list_mode_options`) and for options that hold a ``guard_filter_fn``: this is one.
    """
    if "guard_filter_fn" in (options or {}):
        raise ValueError("gawscompile.compile is a guard_filter_fn; for your own, torch.compile(backend='gaws')")
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
    """torch.compile takes the filter out of the options that it is given, so each call gets options of its own."""
    return torch.compile(
        target, backend="gaws", options={"bind": True, **options, "guard_filter_fn": inference_guards}, **settings
    )


def inference_guards(entries: Sequence[Any]) -> list[bool]:
    """A ``guard_filter_fn``: guards on modules and parameters are checked only once something changed.

    One guard in their place, `gawscompile.serving.unchanged.Unchanged`, sees whether anything did. With gradients all
    guards stay: a parameter's ``requires_grad`` decides what the graph computes then. So do they where changes cannot
    be seen (`unchanged.available`), and where guards are kept in files (``caching_precompile``).
    """
    for entry in entries:
        if isinstance(entry.value, torch.Tensor) and (bytes_ := unchanged.missing(entry.value)):
            raise RuntimeError(
                f"{entry.name}: its storage lacks {bytes_} bytes of what its shape needs; give it memory"
            )
    everything = [True] * len(entries)
    if torch.is_grad_enabled() or torch._dynamo.config.caching_precompile or not unchanged.available():
        return everything
    guards = [entry.orig_guard for entry in entries]
    known = watched.Known((entry.orig_guard.originating_source, entry.value) for entry in entries)
    keep = [
        not watched.followable(entry.orig_guard.originating_source)
        or not known.sees(entry.guard_type, entry.orig_guard, entry.value)
        for entry in entries
    ]
    carrier = next((guard for guard, kept in zip(guards, keep, strict=True) if kept), None)
    replaced = [guard for guard, kept in zip(guards, keep, strict=True) if not kept]
    if carrier is None or not replaced:
        return everything
    carrier.create_fn = _also(carrier.create_fn, replaced)
    return keep


def _also(create: Callable[[Any, Any], Any], replaced: list[Any]) -> Callable[[Any, Any], Any]:
    """`create`, which makes a guard that stays; and the one guard in the place of `replaced`.

    Dynamo makes guards twice where it is given a filter: all of them for the filter to see, then those that it keeps.
    """

    @functools.wraps(create.func if isinstance(create, functools.partial) else create)
    def both(builder: Any, guard: Any) -> Any:
        made = create(builder, guard)
        try:
            _install(builder, replaced)
        except Exception as error:  # another Dynamo than we know
            log.warning("gaws: all guards stay, and are checked in every call: %s: %s", type(error).__name__, error)
            for one in replaced:
                one.create(builder)
        return made

    return both


def _install(builder: Any, replaced: list[Any]) -> None:
    manager = builder.check_fn_manager
    _, guards = manager.build_guards(replaced, OrderedSet(), builder.f_code, manager.output_graph, False)
    sources = [source for guard in replaced for source in watched.looks_at(guard)]
    guard = unchanged.Unchanged(guards.root, sources, builder.scope["G"])
    parameters = [one.originating_source for one in replaced if one.create_fn_name() == "TENSOR_MATCH"]
    bound.tie(guard, {source.name for source in parameters})
    said = [f"{len(replaced)} guards on modules and their parameters (gawscompile.compile)"]
    builder.guard_manager.root.add_epilogue_lambda_guard(guard, said, None)
