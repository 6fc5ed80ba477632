"""Decoding one token at a time by hand, the same way for every backend.

``generate`` has its own ideas about caches and compilation, which differ by device and setting; a plain loop around
``model(token, cache)`` has none, so all that differs between two runs is the backend.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch

from gawscompile.calibration.measure import timed

CacheKind = Literal["static", "dynamic"]


def cache_keyword(model: Any) -> str:
    """How `model` calls its key-value cache: transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


class Decoder:
    """Decoding of `model` through `run`, which is `model` itself or its compiled form; `batch` equal rows at once.

    A ``static`` cache has room for `capacity` tokens, and every step attends over all of it under a mask; a ``dynamic``
    one grows by concatenation. With either, ``seek`` makes every step have the same shapes, so nothing recompiles.
    """

    def __init__(self, model: Any, run: Any, capacity: int, kind: CacheKind = "static", batch: int = 1) -> None:
        from transformers import DynamicCache, StaticCache

        self.run = run
        self.kind = kind
        self.capacity = capacity
        self.device = next(model.parameters()).device
        self.cache: Any = (
            StaticCache(config=model.config, max_cache_len=capacity)
            if kind == "static"
            else DynamicCache(config=model.config)
        )
        self._arguments = {cache_keyword(model): self.cache, "use_cache": True}
        self.model = model
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._past = 0
        self.token = torch.zeros((batch, 1), dtype=torch.long, device=self.device)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of one decode step."""
        return {"input_ids": self.token, **self._arguments}

    @torch.no_grad()
    def fill(self, ids: list[int]) -> None:
        """Puts the keys and values of `ids` into the cache, computed by the *uncompiled* model, and seeks to their end.

        Also allocates a static cache: done inside a compiled region that would be traced.
        """
        self.cache.reset()
        self.model(input_ids=torch.tensor([ids] * len(self.token), device=self.device), **self._arguments)
        self._past = len(ids)
        if self.kind == "dynamic":
            self._saved = [(layer.keys, layer.values) for layer in self.cache.layers]

    def seek(self, past: int | None = None) -> None:
        """Back to `past` tokens in the cache (default: what `fill` left). A dynamic cache goes only there."""
        past = self._past if past is None else past
        for index, layer in enumerate(self.cache.layers):
            if self.kind == "static":
                layer.cumulative_length.fill_(past)
            elif past != self._past:
                raise ValueError(f"a dynamic cache holds {self._past} tokens; it cannot seek to {past}")
            else:
                layer.keys, layer.values = self._saved[index]

    @torch.no_grad()
    def step(self, token: int) -> torch.Tensor:
        """Logits ``[vocabulary]`` after one more token."""
        self.token.fill_(token)
        return self.run(**self.inputs()).logits[0, -1]

    def timed_step(self) -> float:
        """Milliseconds of one step at the position that `fill` left; rewinding is not counted."""
        self.seek()
        return timed(lambda: self.step_again())

    @torch.no_grad()
    def step_again(self) -> Any:
        """One step on the token that is there, without reading the result: what the timings time."""
        return self.run(**self.inputs())

    def greedy(self, prompt: list[int], count: int, stop: int | None = None) -> list[int]:
        """Up to `count` tokens after `prompt`, each the likeliest; ends early after `stop`.

        The prompt goes in token by token, so every number in the answer is from the step under test and one compiled
        graph serves for all of it. Needs a static cache with room for both.
        """
        if self.kind != "static" or len(prompt) + count > self.capacity:
            raise ValueError(f"greedy needs a static cache for {len(prompt) + count} tokens, not {self.capacity}")
        if not self.cache.layers[0].is_initialized:
            self.fill(prompt[:1])
        self.cache.reset()
        for token in prompt:
            logits = self.step(token)
        answer: list[int] = []
        while len(answer) < count:
            answer.append(int(logits.argmax()))
            if answer[-1] == stop:
                break
            if len(answer) < count:
                logits = self.step(answer[-1])
        return answer
