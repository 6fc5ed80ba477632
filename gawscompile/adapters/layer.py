"""The adapted projections: a Linear or Conv1D with I_n ⊗ G or G ⊗ I_d beside it, never as a dense matrix.

Both kinds spell their product as one ``F.linear`` over regrouped inputs, the same whether gradients are on or off, so
that one pattern finds each in a graph:

- GAWS: ``F.linear(x.unflatten(-1, (n, K/n)) * diag, G).flatten(-2)``
- GAWS-D: ``F.linear(x.unflatten(-1, (n_in, d)).mT.contiguous(), G * diag).mT.flatten(-2)``

(``matmul(G, slices)`` would be shorter, but torch makes an ``mm`` or a ``bmm`` of it according to ``requires_grad``.)
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters.config import KroneckerConfig
from gawscompile.adapters.splits import Kind, Splits
from gawscompile.adapters.tuner import is_packed, replaces_linear

BASE = "__base__"
"""Stands for "no adapter" in a mixed batch's `adapter_names`, as in PEFT."""
NORMAL_STD = 0.02


def features(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, of what quantises one, or of a Conv1D, whose weight is [inputs, outputs]."""
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape
        return rows, columns
    assert isinstance(layer, nn.Linear) or replaces_linear(layer)
    return layer.in_features, layer.out_features  # type: ignore[return-value]


class KroneckerLinear(nn.Module, BaseTunerLayer):
    """A projection with any number of adapters of one kind; inputs ``[..., K]``, outputs ``[..., N]``.

    Inputs are cast to an adapter's dtype, and the sum to the dtype of the base's output, as PEFT's LoRA does.
    """

    kind: ClassVar[Kind]
    other_param_names = ("splits",)

    def __init__(self, base_layer: nn.Module, adapter: str, config: KroneckerConfig, splits: Splits) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(self.get_base_layer())
        self.diag = nn.ParameterDict()
        self.splits: dict[str, Splits] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter
        self.make_containers()
        self.update_layer(adapter, config, splits)

    @abstractmethod
    def make_containers(self) -> None:
        """Makes the dict of G's."""

    @abstractmethod
    def make_g(self, adapter: str, rows: int, columns: int) -> None:
        """Puts an uninitialised G into its place."""

    @abstractmethod
    def g(self, adapter: str) -> torch.Tensor:
        """The adapter's G."""

    @abstractmethod
    def apply_adapter(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """ΔW x for ``[..., K]`` in the adapter's dtype, as ``[..., N]``."""

    def update_layer(self, adapter: str, config: KroneckerConfig, splits: Splits) -> None:
        """Adds an adapter, on the base weight's device, in its dtype if that is one of floats, else in fp32."""
        if adapter == BASE:
            raise ValueError(f"an adapter cannot be called {BASE!r}, which stands for no adapter in a mixed batch")
        rows, columns = splits.shape(self.kind, self.in_features, self.out_features)
        self.make_g(adapter, rows, columns)
        self.splits[adapter] = splits
        if config.diag:
            self.diag[adapter] = nn.Parameter(torch.empty(columns))
        # An adapter for inference is about to be loaded. Until then it must not change any output, and not at all if
        # loading fails.
        self.reset(adapter, "zero" if config.inference_mode else config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset(self, adapter: str, init: str) -> None:
        """Initialises G and diag by the name of an init of `KroneckerConfig`."""
        g = self.g(adapter)
        if init == "zero":
            nn.init.zeros_(g)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(g, a=math.sqrt(5))
        else:
            nn.init.normal_(g, std=NORMAL_STD)
        if adapter in self.diag:
            nn.init.ones_(self.diag[adapter])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output plus every active adapter's; with `adapter_names`, one adapter for each row of a batch."""
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed_batch(x, names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.splits:
                # from x itself: a cast of a cast would round for an adapter of another dtype
                own = self._cast_input_dtype(x, self.g(adapter).dtype)
                result = result + self.apply_adapter(own, adapter)
        return result.to(dtype)

    def _mixed_batch(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Row i of the batch with adapter ``names[i]`` alone, or none where it is ``__base__``."""
        if len(x) != len(names):
            raise ValueError(f"adapter_names has {len(names)} names for a batch of {len(x)}")
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter first")
        result = self.base_layer(x, *args, **kwargs).clone()  # others may hold the base's output
        for adapter in dict.fromkeys(names):
            if adapter in self.splits:
                rows = [row for row, name in enumerate(names) if name == adapter]
                part = self._cast_input_dtype(x[rows], self.g(adapter).dtype)
                result[rows] = (result[rows] + self.apply_adapter(part, adapter)).to(result.dtype)
        return result

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW, dense, laid out like the base weight: for merging, never for a forward pass."""
        g = self.g(adapter)
        if adapter in self.diag:
            g = g * self.diag[adapter]
        if self.kind == "gaws":
            delta = torch.kron(torch.eye(self.splits[adapter].inputs, dtype=g.dtype, device=g.device), g)
        else:
            length = self.in_features // self.splits[adapter].inputs
            delta = torch.kron(g, torch.eye(length, dtype=g.dtype, device=g.device))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @staticmethod
    def _rounded_once(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The sum in the wider dtype, in the weight's."""
        return (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)

    def _base_weight(self) -> nn.Parameter:
        layer = self.get_base_layer()
        if is_packed(layer):
            kind = type(layer.weight if "weight" in layer._parameters else layer).__name__
            raise TypeError(f"a quantised weight ({kind}) takes no adapter into itself: leave it unmerged")
        assert isinstance(layer.weight, nn.Parameter)
        return layer.weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds ΔW of the named (default: active) adapters to the base weight.

        `safe_merge` raises `ValueError` and merges nothing of an adapter that would leave numbers that are not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.splits:
                continue
            weight = self._base_weight()
            merged = self._rounded_once(weight.data, self.get_delta_weight(adapter))
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {adapter!r} would leave weights that are not finite")
            weight.data = merged
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes every merged ΔW out of the base weight again."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight = self._base_weight()
            weight.data = self._rounded_once(weight.data, -self.get_delta_weight(adapter))


class GAWSLinear(KroneckerLinear):
    """ΔW = I_n ⊗ G; `GAWS` holds one ``nn.Linear(K/n, N/n, bias=False)`` per adapter."""

    kind = "gaws"
    adapter_layer_names = ("GAWS", "diag")

    def make_containers(self) -> None:
        self.GAWS = nn.ModuleDict()

    def make_g(self, adapter: str, rows: int, columns: int) -> None:
        self.GAWS[adapter] = nn.Linear(columns, rows, bias=False)

    def g(self, adapter: str) -> torch.Tensor:
        return self.GAWS[adapter].weight  # type: ignore[return-value]

    def apply_adapter(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        count = self.splits[adapter].inputs
        slices = x.unflatten(-1, (count, self.in_features // count))
        if adapter in self.diag:
            slices = slices * self.diag[adapter]
        return F.linear(slices, self.g(adapter)).flatten(-2)


class GAWSDLinear(KroneckerLinear):
    """ΔW = G ⊗ I_d; `GAWSD` holds one parameter ``[n_out, n_in]`` per adapter."""

    kind = "gawsd"
    adapter_layer_names = ("GAWSD", "diag")

    def make_containers(self) -> None:
        self.GAWSD = nn.ParameterDict()

    def make_g(self, adapter: str, rows: int, columns: int) -> None:
        self.GAWSD[adapter] = nn.Parameter(torch.empty(rows, columns))

    def g(self, adapter: str) -> torch.Tensor:
        return self.GAWSD[adapter]

    def apply_adapter(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        count = self.splits[adapter].inputs
        slices = x.unflatten(-1, (count, self.in_features // count))
        g = self.g(adapter)
        if adapter in self.diag:
            g = g * self.diag[adapter]
        return F.linear(slices.mT.contiguous(), g).mT.flatten(-2)
