"""``generate`` of a compiled model: the forwards that it calls run compiled, prompts by one graph, decoding by another.

transformers' ``generate`` calls the module that it is a method of, and PEFT's calls that of the model inside. So a
model that `torch.compile` wrapped generates in eager mode: nothing of the loop goes through the wrapper.
`CompiledModel` puts compiled entries in the place of those modules' calls while its ``generate`` runs:

    CompiledModel.generate → PeftModel.generate → LlamaForCausalLM.generate → self(…) → prompt or decode, compiled

Called directly, or by another thread, the model runs as before.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule, skip_code

from gawscompile.runtime import eager_generate

Entry = Callable[..., Any]

STEP = 128
"""The room in a static cache is a multiple of so many tokens: every size is a shape of its own."""

TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""Arguments of a forward whose dimension 1 is a number of tokens."""

CACHES = ("past_key_values", "cache")
LOOPS = ("assistant_model", "custom_generate")
"""Arguments of ``generate`` that hand it a cache, or another loop, which brings its own."""


def generating(model: Any) -> Any:
    """The module that ``model.generate`` calls in its loop, None where there is none or it is not known."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = hasattr(inner, "generation_config") and hasattr(inner, "prepare_inputs_for_generation")
    return inner if known and callable(getattr(model, "generate", None)) else None


class CompiledModel(OptimizedModule):
    """A model that generates, compiled: when it is called, as torch.compile does it, and when it generates."""

    _opt_mod_attributes = OptimizedModule._opt_mod_attributes | {"_calls"}

    def __init__(self, model: torch.nn.Module, context: Any, compiling: Callable[[Entry], Entry]) -> None:
        super().__init__(model, context)
        object.__setattr__(self, "_calls", Calls(model, compiling))

    def __reduce__(self) -> Any:
        return type(self), (self._orig_mod, self.dynamo_ctx, self._calls.compiling)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, whose forwards run compiled: prompts of any length by one graph, single tokens
        by another. Takes and returns what that does.

        Keys and values go into a static cache with room for all tokens that are asked for, unless the caller chose
        a cache (``cache_implementation="dynamic"``: one that grows), asked for attentions, or the model cannot have a
        static one.
        """
        with self._calls.compiled():
            model: Any = self._orig_mod
            return model.generate(*args, **with_cache(model, args, kwargs))


_here = threading.local()
"""`_here.calls`: the `Calls` whose ``generate`` runs in this thread, the innermost last."""


class Calls:
    """Compiled entries in the place of a model's calls, for the threads that generate."""

    def __init__(self, model: torch.nn.Module, compiling: Callable[[Entry], Entry]) -> None:
        self.model = model
        self.compiling = compiling
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Within, the modules that ``generate`` calls are compiled for this thread."""
        for module in self.modules():
            _dispatched(module)
        running: list[Calls] = vars(_here).setdefault("calls", [])
        running.append(self)
        try:
            yield
        finally:
            running.pop()

    def modules(self) -> list[torch.nn.Module]:
        """What ``generate`` calls: the model inside, and its encoder."""
        inner = generating(self.model)
        return [inner, inner.get_encoder()] if getattr(inner.config, "is_encoder_decoder", False) else [inner]

    def entry(self, module: torch.nn.Module, kwargs: dict[str, Any]) -> Entry:
        """The compiled call for arguments like these, whose lengths are marked as dynamic."""
        tokens = next((kwargs[name] for name in TOKENS if kwargs.get(name) is not None), None)
        phase = "decode" if tokens is not None and tokens.shape[1] == 1 else "prompt"
        for argument, value in kwargs.items():
            if argument in TOKENS or argument.endswith(("_ids", "_mask")):
                _mark_length(value)
        name = f"{phase}_{type(module).__name__}"
        with self._lock:
            if name not in self._entries:
                self._entries[name] = self.compiling(_named(name))
            return self._entries[name]


def _dispatched(module: torch.nn.Module) -> None:
    """Calls of `module` go to the entry of whoever generates in this thread, and are its own elsewhere. Not where the
    user compiled it (``module.compile()``).

    For good: what is written to a module in every ``generate`` would look like a change to its guards. Dynamo, where it
    traces a module, calls ``_call_impl``, and copies leave this out.
    """
    if module._compiled_call_impl is not None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        for calls in reversed(vars(_here).get("calls", [])):
            if any(one is module for one in calls.modules()):
                return calls.entry(module, kwargs)(module, args, kwargs)
        return module._call_impl(*args, **kwargs)

    skip_code(call.__code__)  # Dynamo goes on with what it calls
    setattr(call, eager_generate.ELSEWHERE, True)
    module._compiled_call_impl = call


def _mark_length(value: Any) -> None:
    """Tokens, masks and positions are ``[rows, length, …]``, and prepared masks ``[rows, heads, length, past]``."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return
    for tensor in (value, value._base):
        if tensor is not None and tensor.dim() == value.dim():
            length = 2 if tensor.dim() == 4 else 1
            if tensor.shape[length] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, length)


_numbers = itertools.count()


def _named(name: str) -> Entry:
    """A module's call as a function of that name. Dynamo keeps its variants, and counts them, by code."""

    def run(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    return run


def with_cache(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``generate``, with a static cache of the right size where the caller chose none."""
    inner = generating(model)
    config = kwargs.get("generation_config")

    def asked(name: str) -> Any:
        places = (kwargs.get(name), getattr(config, name, None), getattr(inner.generation_config, name, None))
        return next((value for value in places if value is not None), None)

    more: dict[str, Any] = {"disable_compile": True}  # on a GPU, transformers would compile by itself
    chosen = [*map(asked, ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit"))]
    chosen += map(kwargs.get, (*CACHES, *LOOPS))
    free = all(value is None for value in chosen) and asked("use_cache") is not False and not asked("is_assistant")
    free = free and not asked("output_attentions")  # over a static cache they have its length
    if free and getattr(inner, "_can_compile_fullgraph", False):
        more["cache_implementation"] = "static"
        if hasattr(inner.generation_config, "max_cache_len") and asked("max_cache_len") is None:
            more["max_cache_len"] = _room(inner, args, kwargs, asked)
    if config is None:
        return {**kwargs, **more}
    config = copy.copy(config)  # transformers takes either a configuration or arguments of its own
    for name, value in more.items():
        setattr(config, name, value)
    return {**kwargs, "generation_config": config}


def _room(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Callable[[str], Any]) -> int | None:
    """How many tokens a call of ``generate`` can have in its cache, rounded up; None where that is not known."""
    prompts = [*args[:1], *map(kwargs.get, ("inputs", *TOKENS))]
    prompt = next((prompt for prompt in prompts if isinstance(prompt, torch.Tensor)), None)
    new, most = asked("max_new_tokens"), asked("max_length")
    if prompt is None or (new is None and most is None):
        return None
    length = 1 if inner.config.is_encoder_decoder else prompt.shape[1]
    wanted: int = most if new is None else length + new
    limit = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None) or wanted
    return max(wanted, min(limit, -(-wanted // STEP) * STEP))
