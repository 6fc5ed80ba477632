"""The modules of a bank: a linear with the bank's adapters beside it, and what a model's forward shares."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gawscompile.runtime.banked import BANKED, SCHEDULE


class Shared(nn.Module):
    """What all modules of a bank read: its pool, its number (on a GPU its table), and the snapshot of the forward that
    is under way.

    A submodule of each of them, so that compiled code finds its tensors where guards look. They go into no checkpoint,
    and stay where they are when the model is moved or cast.
    """

    pool: Tensor
    state: Tensor

    def __init__(self, pool: Tensor, state: Tensor, modules: int, width: int, modes: int) -> None:
        super().__init__()
        self.register_buffer("pool", pool, persistent=False)
        self.register_buffer("state", state, persistent=False)
        self.count, self.width = modules, width
        self.modes = (modes,) if modes else ()  # what a GPU's kernels are told beside the rest
        self.traced: Tensor | None = None  # `current`, for graphs
        self._here = threading.local()  # in eager mode, several threads may be in the model at once

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Shared:
        return self

    def __deepcopy__(self, memo: Any) -> Shared:
        raise TypeError("a model with an adapter bank cannot be copied: copy the model first, and give each a bank")

    def snapshot(self, rows: Any) -> Tensor:
        """What the bank adds to a batch of so many rows, for all modules."""
        return SCHEDULE(self.state, rows, self.count, self.width)

    @property
    def current(self) -> Tensor | None:
        """The snapshot of the forward that this thread, or the graph that is being traced, is in."""
        return self.traced if torch.compiler.is_dynamo_compiling() else getattr(self._here, "snapshot", None)

    @current.setter
    def current(self, snapshot: Tensor | None) -> None:
        self.traced = snapshot  # also for graphs of parts of a model that runs eager around them
        if not torch.compiler.is_dynamo_compiling():
            self._here.snapshot = snapshot


def with_snapshots(model: nn.Module, shared: Shared) -> None:
    """Each forward of `model` takes one snapshot: its class becomes one of the same name, with such a forward. So does
    its encoder's, which ``generate`` calls alone, where it is not within the model's.

    Neither by hooks, which torch.compile calls outside of the graph, nor by a function in the place of the method:
    what that reads in its closure, guards would look at in every call.
    """
    whole: Any = model
    encoder = whole.get_encoder() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else model
    for one in dict.fromkeys((encoder, model)):
        kind = type(one)
        vars(one)["bank_shared"] = shared  # no submodule: a Sequential would call it
        vars(one)["bank_outermost"] = one is model
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        methods = {"forward": _forward(kind), "forward_with_bank": kind.forward}
        one.__class__ = type(kind.__name__, (kind,), {**methods, **names})


def _forward(kind: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared = self.bank_shared
        if not self.bank_outermost and shared.current is not None:
            return self.forward_with_bank(*args, **kwargs)
        shared.current = shared.snapshot(_rows(args, kwargs))
        try:
            return self.forward_with_bank(*args, **kwargs)
        finally:
            shared.current = None

    return forward


INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_values", "input_features")
"""Arguments of a forward whose first dimension is the batch's rows."""


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = [kwargs.get(name) for name in INPUTS]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1


class BankedLinear(nn.Module):
    """A linear, x ``[rows, …, k]`` → ``[rows, …, n]`` of the linear's dtype, and what the bank adds to it for each row.

    Raises `ValueError` where x's tokens are no whole rows of the batch."""

    def __init__(self, base_layer: nn.Module, bank: Shared, index: int, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank
        self.index = index  # among the modules of the bank
        self.out_features, self.in_features = sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.added(x, self.base_layer(x), self.bias)

    def added(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """`y`, which the base has made of x with its `bias`, and what the bank adds to it."""
        schedule = self.bank.current
        if schedule is None:  # it is called outside of the model's forward
            schedule = self.bank.snapshot(x.shape[0])
        return y + BANKED(x, self.bank.pool, schedule[self.index], y, bias, *self.bank.modes).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's: models look at its dtype."""
        found: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias  # type: ignore[return-value]
