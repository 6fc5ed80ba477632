"""`valid_splits`: what a model's projections can be cut into, and what each choice costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gawscompile.adapters.config import GAWSConfig, GAWSDConfig
from gawscompile.adapters.layer import features
from gawscompile.adapters.model import targets
from gawscompile.adapters.splits import Kind, Splits, all_splits
from gawscompile.adapters.tuner import check_supported
from gawscompile.calibration.measure import table

CONFIGS = {"gaws": GAWSConfig, "gawsd": GAWSDConfig}


@dataclass(frozen=True)
class Choice:
    """One valid choice for all modules of one shape; `parameters` counts all of them together."""

    splits: Splits
    parameters: int


@dataclass(frozen=True)
class ShapeSplits:
    """The modules of one shape and their valid choices, by falling number of parameters for ``gaws``."""

    in_features: int
    out_features: int
    modules: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class ValidSplits:
    """The result of `valid_splits`; as text, a table for each shape."""

    kind: Kind
    shapes: tuple[ShapeSplits, ...]

    @property
    def common(self) -> dict[int, int]:
        """Choices that fit *every* module as one global setting → parameters of the whole model.

        For ``gaws`` the setting is `input_splits`, for ``gawsd`` `input_split_dim`.
        """
        tables = [{self._setting(shape, c): c.parameters for c in shape.choices} for shape in self.shapes]
        shared = set(tables[0]).intersection(*tables[1:]) if tables else set()
        return {setting: sum(one[setting] for one in tables) for setting in sorted(shared)}

    def _setting(self, shape: ShapeSplits, choice: Choice) -> int:
        return choice.splits.inputs if self.kind == "gaws" else shape.in_features // choice.splits.inputs

    def __str__(self) -> str:
        headers = ["input splits", "output splits", "input dim", "output dim", "parameters"]
        parts = []
        for shape in self.shapes:
            named = shape.modules[0] + (f" and {len(shape.modules) - 1} more" if len(shape.modules) > 1 else "")
            rows = []
            for choice in shape.choices:
                inputs, outputs = choice.splits.inputs, choice.splits.outputs
                dims = shape.in_features // inputs, shape.out_features // outputs
                rows.append([f"{value}" for value in (inputs, outputs, *dims)] + [f"{choice.parameters:,}"])
            parts.append(f"{shape.in_features} → {shape.out_features}: {named}\n{table(headers, rows)}")
        setting = "input_splits" if self.kind == "gaws" else "input_split_dim"
        fits = ", ".join(f"{key} ({count:,} parameters)" for key, count in self.common.items())
        return "\n\n".join([*parts, f"One {setting} for all: {fits}"])


def valid_splits(model: nn.Module, kind: Kind = "gaws", target_modules: Any = "all-linear") -> ValidSplits:
    """Every valid split of the modules of `model` that `target_modules` names (as in `GAWSConfig`), by shape.

    Only shapes are read: a model on the meta device does. Raises `TypeError` for modules that cannot be adapted and
    `ValueError` where no module matches.
    """
    if kind not in CONFIGS:
        raise ValueError(f"kind={kind!r}: it is one of {', '.join(map(repr, CONFIGS))}")
    found = targets(CONFIGS[kind](target_modules=target_modules), model)
    if not found:
        raise ValueError(f"no module of the model matches target_modules={target_modules!r}")
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, layer in found.items():
        check_supported(name, layer)
        by_shape.setdefault(features(layer), []).append(name)
    shapes = []
    for (inputs, outputs), names in sorted(by_shape.items()):
        choices = [
            Choice(splits, len(names) * splits.parameters(kind, inputs, outputs))
            for splits in all_splits(kind, inputs, outputs)
        ]
        shapes.append(ShapeSplits(inputs, outputs, tuple(names), tuple(choices)))
    return ValidSplits(kind, tuple(shapes))
