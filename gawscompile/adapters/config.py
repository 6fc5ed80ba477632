"""The configurations, with the names that published GAWS adapters use in ``adapter_config.json``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from gawscompile.adapters.splits import Kind, Splits, Wish, resolve
from gawscompile.adapters.support import AdapterType

INITS = ("zero", "kaiming", "none")
EMPTY: tuple[object, ...] = (None, False, "", "none", [], {})
"""Values with which a key that we do not know cannot mean anything."""


class CheckedConfig(PeftConfig):
    """A configuration that refuses what it does not know."""

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT calls this with what ``adapter_config.json`` holds.

        PEFT would drop unknown keys with a warning. One that says something could change the mathematics, so it is
        refused; one that is empty (``"bias": "none"``) is dropped.
        """
        unknown = {key: value for key, value in kwargs.items() if key not in inspect.signature(cls).parameters}
        if telling := {key: value for key, value in unknown.items() if value not in EMPTY}:
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(telling.items()))
            raise ValueError(f"adapter_config.json has keys that {cls.__name__} does not know: {listed}")
        return {key: value for key, value in kwargs.items() if key not in unknown}


@dataclass
class KroneckerConfig(CheckedConfig):
    """What `GAWSConfig` and `GAWSDConfig` share.

    target_modules: names, a regular expression or ``"all-linear"``, as in PEFT's LoRA, whose defaults for known
        architectures hold where it is None. `exclude_modules`, `modules_to_save`, `layers_to_transform` and
        `layers_pattern` are PEFT's.
    input_splits, output_splits: into how many slices the inputs and outputs of every module are cut.
    input_split_dim, output_split_dim: the same by the length of a slice. Whatever is given must agree; what is not
        given follows (GAWS: both counts are equal; GAWS-D: all slices are of one length).
    input_splits_pattern, output_splits_pattern: counts for single modules, from a name or a regular expression for
        the end of a module's path, as in PEFT's ``rank_pattern``. A module that one of them matches takes its splits
        from the patterns alone.
    diag: learn a row vector that scales the columns of G.
    init_weights: ``"zero"`` (starts as the base), ``"kaiming"`` (uniform) or ``"none"`` (small random normal). diag
        starts at one.
    fan_in_fan_out: read from checkpoints and not needed: how a base weight lies follows from the module's type.

    Raises `ValueError` on what cannot be meant; on loading also for keys that are not known.
    """

    kind: ClassVar[Kind]

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    input_splits: int | None = None
    output_splits: int | None = None
    input_split_dim: int | None = None
    output_split_dim: int | None = None
    input_splits_pattern: dict[str, int] = field(default_factory=dict)
    output_splits_pattern: dict[str, int] = field(default_factory=dict)
    diag: bool = False
    init_weights: str = "zero"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType(self.kind.upper())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform works with target_modules as a list, not as one string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no meaning without layers_to_transform")
        if self.init_weights not in INITS:
            raise ValueError(f"init_weights={self.init_weights!r}: it is one of {', '.join(map(repr, INITS))}")
        self.input_splits_pattern = self.input_splits_pattern or {}
        self.output_splits_pattern = self.output_splits_pattern or {}
        counts: dict[str, Any] = {name: getattr(self, name) for name in Wish.__dataclass_fields__}
        for pattern in ("input_splits_pattern", "output_splits_pattern"):
            counts |= {f"{pattern}[{key!r}]": value for key, value in getattr(self, pattern).items()}
        for name, value in counts.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: it is a whole number from 1 up")

    def splits_of(self, module: str, in_features: int, out_features: int) -> Splits:
        """The splits of the module at the path `module`. Raises `SplitError` where they are not valid for it."""
        patterns = self.input_splits_pattern, self.output_splits_pattern
        own = [pattern.get(get_pattern_key(list(pattern), module)) for pattern in patterns]
        if any(count is not None for count in own):
            wish = Wish(*own)
        else:
            wish = Wish(self.input_splits, self.output_splits, self.input_split_dim, self.output_split_dim)
        return resolve(self.kind, in_features, out_features, wish, module)


@dataclass
class GAWSConfig(KroneckerConfig):
    """ΔW = I_n ⊗ G: one G of N/n × K/n, the same for each of n slices (Alsuradi et al., Findings of ACL 2026)."""

    kind: ClassVar[Kind] = "gaws"


@dataclass
class GAWSDConfig(KroneckerConfig):
    """ΔW = G ⊗ I_d: G of n_out × n_in mixes whole slices of length d (Alsuradi et al., Findings of ACL 2026)."""

    kind: ClassVar[Kind] = "gawsd"
