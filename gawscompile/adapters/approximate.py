"""The nearest GAWS, GAWS-D or sum of Kronecker products to a trained adapter, and how far off it is.

Nearest means least in Frobenius norm. With I_n fixed that is a projection: for I_n ⊗ G the mean of the n blocks on
ΔW's diagonal, for G ⊗ I_d the mean over each block's own diagonal. With both factors free it is the truncated SVD of
ΔW rearranged, one row per block (Van Loan and Pitsianis, "Approximation with Kronecker Products", 1993).

A LoRA has no reason to be near any of these, so nothing here is done silently: a fit outside the tolerance is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from gawscompile.adapters.config import KroneckerConfig
from gawscompile.adapters.layer import features
from gawscompile.adapters.listing import CONFIGS
from gawscompile.adapters.splits import Kind, Splits
from gawscompile.adapters.tuner import PREFIX, check_supported
from gawscompile.calibration.measure import table

Target = Literal["gaws", "gawsd", "kronecker"]
WORST = 5
LEAVES = {"gaws": "GAWS.weight", "gawsd": "GAWSD"}
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""LoRA's ``init_lora_weights`` that write to the base: beside a fresh one such an adapter means something else."""
PROBES = 4


class ApproximationError(ValueError):
    """Some module is outside the tolerance; `result` is the whole fit, for those who want to look."""

    def __init__(self, message: str, result: Approximation) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class ModuleFit:
    """One module: ‖ΔW − fit‖ / ‖ΔW‖ in Frobenius norm (0 where ΔW is 0), and the size before and after."""

    module: str
    error: float
    splits: Splits
    parameters: int
    parameters_before: int


@dataclass
class Approximation:
    """A fit of every adapted module.

    For ``gaws`` and ``gawsd``, `config` and `state_dict` (keys as on disk) are an adapter, to be put on a base by
    `attach` or saved by `save_pretrained`. For ``kronecker``, `factors` holds (A ``[terms, n_out, n_in]``,
    B ``[terms, N/n_out, K/n_in]``) per module, whose ΔW is Σ A_t ⊗ B_t: no GAWS adapter can hold that.
    """

    to: Target
    terms: int
    fits: list[ModuleFit]
    config: KroneckerConfig | None = None
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest relative error of a module."""
        return max(fit.error for fit in self.fits)

    @property
    def worst(self) -> list[ModuleFit]:
        """The modules with the largest errors, worst first."""
        return sorted(self.fits, key=lambda fit: -fit.error)[:WORST]

    def summary(self, markdown: bool = False) -> str:
        """A table of the errors by the last part of the modules' names."""
        groups: dict[str, list[ModuleFit]] = {}
        for fit in self.fits:
            groups.setdefault(fit.module.rpartition(".")[2], []).append(fit)
        rows = []
        for name, fits in groups.items():
            errors = sorted(fit.error for fit in fits)
            numbers = [f"{value:.3f}" for value in (errors[0], errors[len(errors) // 2], errors[-1])]
            sizes = [f"{sum(fit.parameters_before for fit in fits):,}", f"{sum(fit.parameters for fit in fits):,}"]
            rows.append([name, str(len(fits)), *numbers, *sizes])
        headers = ["relative error", "modules", "least", "median", "most", "parameters before", "after"]
        return table(headers, rows, markdown)

    def attach(self, base: nn.Module, adapter: str = "default") -> Any:
        """`base`, which must be bare, as a PeftModel with this adapter in eval mode. `ValueError` for ``kronecker``."""
        model = get_peft_model(base, self._config(), adapter_name=adapter)
        set_peft_model_state_dict(model, self.state_dict, adapter_name=adapter)
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the adapter as PEFT would, for ``PeftModel.from_pretrained``. `ValueError` for ``kronecker``."""
        from safetensors.torch import save_file

        config = self._config()
        config.save_pretrained(str(folder))
        save_file(self.state_dict, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})

    def _config(self) -> KroneckerConfig:
        if self.config is None:
            raise ValueError("a sum of Kronecker products is no GAWS adapter; its factors are in `factors`")
        return self.config


def approximate(
    model: nn.Module,
    to: Target = "gaws",
    splits: int | Mapping[str, int] | None = None,
    split_dim: int | None = None,
    terms: int = 1,
    tolerance: float = 0.1,
    adapter: str = "default",
) -> Approximation:
    """The nearest adapter of kind `to` to ΔW of `adapter` in `model`, which is left as it is.

    splits: the number of input splits, for all modules or by pattern as in ``input_splits_pattern``; or
    split_dim: the length of an input slice, which for ``gawsd`` and ``kronecker`` is the output's too (B is square).
    terms: how many Kronecker products to add up, for ``kronecker`` only: a sum of GAWS of one split is one GAWS.
    tolerance: the largest relative error that any module may have.

    Each ΔW is formed in fp64, one at a time, and must be what its layer adds to the base's output. Raises
    `ApproximationError` outside the tolerance, `SplitError` for splits that do not fit, `ValueError` where `model` has
    no such adapter or it is more than a ΔW (DoRA, trained biases or whole modules, PiSSA's changed base, …).
    """
    if to not in ("gaws", "gawsd", "kronecker"):
        raise ValueError(f"to={to!r}: it is one of 'gaws', 'gawsd', 'kronecker'")
    if terms < 1 or (terms > 1 and to != "kronecker"):
        raise ValueError(f"terms={terms}: several terms of {to} with one split add up to one; use to='kronecker'")
    kind: Kind = "gaws" if to == "gaws" else "gawsd"
    chosen: dict[str, Any] = {"input_splits_pattern" if isinstance(splits, Mapping) else "input_splits": splits}
    chosen["input_split_dim"] = split_dim
    root = _base_model(model)
    _check_nothing_else(root, model, adapter)
    layers = _adapted_layers(root, adapter)
    config = CONFIGS[kind](**chosen, target_modules=_exactly(list(layers), root))
    result = Approximation(to, terms, [], config if to != "kronecker" else None)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        check_supported(name, base)
        found = config.splits_of(name, *features(base))
        delta = _delta(name, layer, adapter)
        if to == "kronecker":
            a, b, error = nearest_kronecker(delta, found, terms)
            result.factors[name] = a.float(), b.float()
            size = a.numel() + b.numel()
        else:
            g, error = nearest(delta, kind, found)
            result.state_dict[f"{PREFIX}{name}.{LEAVES[kind]}"] = g.float().contiguous()
            size = g.numel()
        result.fits.append(ModuleFit(name, error, found, size, _size(layer, adapter)))
    outside = [fit for fit in result.fits if not fit.error <= tolerance]
    if outside:
        listed = "\n".join(f"  {fit.module}: {fit.error:.3f}" for fit in result.worst)
        raise ApproximationError(
            f"{len(outside)} of {len(layers)} modules are further than {tolerance:g} from the nearest {to} adapter"
            f" (relative Frobenius error); the worst:\n{listed}\nAt such errors the adapter computes something else."
            f" To accept it, pass tolerance={result.error:.2g} or more; fewer splits fit better.",
            result,
        )
    return result


def nearest(delta: torch.Tensor, kind: Kind, splits: Splits) -> tuple[torch.Tensor, float]:
    """(G, relative error) of the nearest I_n ⊗ G or G ⊗ I_d to ``delta [N, K]``, in its dtype."""
    rows, columns = delta.shape
    blocks = delta.reshape(splits.outputs, rows // splits.outputs, splits.inputs, columns // splits.inputs).clone()
    # the entries where the pattern is not zero, with what shares one number of G in the last dimension
    over = (0, 2) if kind == "gaws" else (1, 3)
    kept = blocks.diagonal(dim1=over[0], dim2=over[1])
    g = kept.mean(-1)
    kept -= g.unsqueeze(-1)
    return g, _relative(blocks.norm(), delta.norm())


def nearest_kronecker(delta: torch.Tensor, splits: Splits, terms: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A ``[terms, outputs, inputs]``, B ``[terms, N/outputs, K/inputs]``, relative error) nearest to ``delta [N, K]``.

    `terms` beyond the rank of the rearranged matrix are left out.
    """
    rows, columns = delta.shape
    height, width = rows // splits.outputs, columns // splits.inputs
    blocks = delta.reshape(splits.outputs, height, splits.inputs, width).permute(0, 2, 1, 3)
    left, values, right = torch.linalg.svd(blocks.reshape(splits.outputs * splits.inputs, -1), full_matrices=False)
    terms = min(terms, len(values))
    root = values[:terms].sqrt()
    a = (left[:, :terms] * root).T.reshape(terms, splits.outputs, splits.inputs)
    b = (right[:terms] * root[:, None]).reshape(terms, height, width)
    return a, b, _relative(values[terms:].norm(), values.norm())


def _relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return 0.0 if whole == 0 else float(difference / whole)


def _base_model(model: Any) -> nn.Module:
    """The model whose modules' paths are those of a bare base."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def _check_nothing_else(root: nn.Module, model: Any, adapter: str) -> None:
    """Raises `ValueError` where `adapter` is more than a ΔW on linears, as its configuration and modules say."""
    config = getattr(getattr(model, "_orig_mod", model), "peft_config", {}).get(adapter)
    bias, init = getattr(config, "bias", "none"), str(getattr(config, "init_lora_weights", ""))
    if bias not in ("none", False):
        raise ValueError(f"adapter {adapter!r} has trained biases of the base (bias={bias!r}), which no ΔW holds")
    if init.startswith(BASE_CHANGING):
        raise ValueError(
            f"init_lora_weights={init!r} changed the base itself: convert the adapter to a plain LoRA first"
            " (PEFT: path_initial_model_for_weight_conversion)"
        )
    for name, module in root.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            raise ValueError(f"adapter {adapter!r} has a trained copy of {name} (modules_to_save), which no ΔW holds")


def _adapted_layers(root: nn.Module, adapter: str) -> dict[str, Any]:
    """Path in the base model → adapted layer with `adapter`. Raises `ValueError` where there is none or no ΔW."""
    found = {}
    for name, module in root.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in module._all_available_adapter_names():
            if not hasattr(module, "get_delta_weight"):
                raise ValueError(f"{name} ({type(module).__name__}) has no ΔW: its adapter does not add to the weight")
            found[name] = module
    if not found:
        raise ValueError(f"the model has no adapter {adapter!r}")
    return found


def _exactly(names: list[str], root: nn.Module) -> list[str] | str:
    """`target_modules` for these modules and no others: a listed name also stands for every path that ends with it."""
    others = {name for name, _ in root.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return names


@torch.no_grad()
def _delta(name: str, layer: Any, adapter: str) -> torch.Tensor:
    """ΔW ``[N, K]`` of one layer in fp64. Raises `ValueError` unless it is all that the adapter does there."""
    alone = copy.deepcopy(layer).double().eval()
    if alone.merged:
        alone.unmerge()
    alone.enable_adapters(True)
    alone.set_adapter(adapter)
    base = alone.get_base_layer()
    inputs, outputs = features(base)
    kind = f"{name} ({type(layer).__module__.split('.')[-2]}'s {type(layer).__name__})"
    try:
        delta = alone.get_delta_weight(adapter)
        delta = delta.T if isinstance(base, Conv1D) else delta
        x = torch.randn(PROBES, inputs, dtype=torch.float64, device=delta.device)
        added, product = alone(x) - base(x), x @ delta.T
    except Exception as error:
        raise ValueError(f"{kind}: its ΔW cannot be had: {type(error).__name__}: {error}") from error
    if not (delta.shape == (outputs, inputs) and delta.isfinite().all()):
        raise ValueError(f"{kind}: its ΔW is not a finite matrix of {outputs} × {inputs}")
    if not (added - product).norm() <= 1e-6 * (added.norm() + 1e-6 * base(x).norm()):
        raise ValueError(f"{kind}: what it adds to the base's output is not ΔW x, so no fit of ΔW stands for it")
    return delta


def _size(layer: BaseTunerLayer, adapter: str) -> int:
    count = 0
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute)
        if adapter in held:
            entry = held[adapter]
            count += sum(p.numel() for p in entry.parameters()) if isinstance(entry, nn.Module) else entry.numel()
    return count
