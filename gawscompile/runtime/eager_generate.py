"""A warning for whoever generates with a model that torch.compile wrapped: ``generate`` does not use what it compiled.

``torch.compile(model, backend="gaws").generate(…)`` finds the method of the model inside, which calls that model and
not what it was compiled to. Torch and transformers say nothing, and the tokens come at eager's speed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

log = logging.getLogger("gawscompile")

_SAID = "_gaws_said_eager_generate"

ELSEWHERE = "_gaws_eager_elsewhere"
"""An attribute of calls that are compiled for `gawscompile.compile`'s ``generate`` alone."""


@functools.cache
def install() -> None:
    """Once in a process: methods that torch.compile's wrapper hands out are the model's own, but for ``generate``."""
    find = OptimizedModule.__getattr__

    def __getattr__(self: OptimizedModule, name: str) -> Any:
        found = find(self, name)
        return _telling(self, found) if name == "generate" and callable(found) and _is_ours(self) else found

    OptimizedModule.__getattr__ = __getattr__  # type: ignore[method-assign]


def _is_ours(compiled: OptimizedModule) -> bool:
    callback = getattr(compiled.dynamo_ctx, "callback", None)
    return getattr(innermost_backend(callback), "compiler_name", "") == "gaws" if callable(callback) else False


def _telling(compiled: OptimizedModule, generate: Callable[..., Any]) -> Callable[..., Any]:
    """The same method; called, it says once that it runs in eager mode."""

    @functools.wraps(generate)
    def told(*args: Any, **kwargs: Any) -> Any:
        model: Any = compiled._orig_mod
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if _SAID not in vars(compiled) and not _is_compiled(inner, kwargs):
            vars(compiled)[_SAID] = True
            log.warning(
                "gaws: generate of %s runs in eager mode: it calls the model itself, not what torch.compile made of it."
                " Remedy: model = gawscompile.compile(model), whose generate is compiled.",
                type(inner).__name__,
            )
        return generate(*args, **kwargs)

    return told


def _is_compiled(inner: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the user compiled what ``generate`` calls: the module, its forward, or by transformers' own means."""
    asked = kwargs.get("compile_config") or getattr(kwargs.get("generation_config"), "compile_config", None)
    call = inner._compiled_call_impl
    theirs = call is not None and not hasattr(call, ELSEWHERE)
    return bool(theirs or asked or hasattr(inner.forward, "_torchdynamo_orig_callable"))
