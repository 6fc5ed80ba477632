"""Kronecker adapters as tensors that are known to be sound: GAWS and GAWS-D (`gawscompile.adapters`) and PEFT's LoKr.

Each is a chain of mode products (`ir.operators.Mode`). GAWS, ``I_n ⊗ G``, and GAWS-D, ``G ⊗ I_d``, are one. LoKr,
``w1 ⊗ w2`` (Yeh et al. 2023), is two to four, as w1 and w2 may be products of two factors each. Then the narrow factor
of w2 comes first and the other one last: what w1 has to mix is as small as it can be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gawscompile.banks.opening import FINITE, FLAG, PREFIX, RANK, TARGETS, UNHEARD, BankError, Kind, Rule, by_pattern
from gawscompile.banks.reading import Key, Reader
from gawscompile.ir.operators import Mode
from gawscompile.ir.records import plain

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B = "lokr_w2", "lokr_w2_a", "lokr_w2_b"
DIAG = "diag"
G = {"GAWS": "GAWS.weight", "GAWSD": "GAWSD"}
PARTS = {**{kind: (g, DIAG) for kind, g in G.items()}, "LOKR": (W1, W1_A, W1_B, W2, W2_A, W2_B)}
"""What a checkpoint of each type has for a module."""

LONGEST = 4
"""Modes that a chain can have."""

FOREIGN = {
    "lokr_t2": "it is of a convolution: train LoKr on linears only",
    "": "it is no part of such an adapter on a linear: train without modules_to_save",
}
"""Why a bank does not take a key, by what is in it."""

COUNT: Rule = (lambda value: value is None or (type(value) is int and value > 0), "a whole number above 0")
SPLITS = ("input_splits", "output_splits", "input_split_dim", "output_split_dim")
PATTERNS = ("input_splits_pattern", "output_splits_pattern")


def _defaults(package: str, name: str) -> Callable[[], dict[str, Any]]:
    def defaults() -> dict[str, Any]:
        return dict(getattr(importlib.import_module(package), name)().to_dict())

    return defaults


def _gaws(words: str, config: str) -> Kind:
    honoured = {**TARGETS, **dict.fromkeys(SPLITS, COUNT), **dict.fromkeys(PATTERNS, by_pattern(RANK)), "diag": FLAG}
    inert = (*UNHEARD, "fan_in_fan_out", "init_weights")
    return Kind(words, (), honoured, inert, _defaults("gawscompile.adapters", config))


LOKR = Kind(
    "LoKr",
    ("r", "alpha"),
    {
        **TARGETS,
        "r": RANK,
        "alpha": FINITE,
        "rank_pattern": by_pattern(RANK),
        "alpha_pattern": by_pattern(FINITE),
        "decompose_both": FLAG,
        "decompose_factor": (lambda value: type(value) is int and (value > 0 or value == -1), "above 0, or -1"),
    },
    (*UNHEARD, "init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"),
    _defaults("peft", "LoKrConfig"),
)
KINDS = {"GAWS": _gaws("GAWS", "GAWSConfig"), "GAWSD": _gaws("GAWS-D", "GAWSDConfig"), "LOKR": LOKR}


@dataclass(frozen=True)
class Chain:
    """What a Kronecker adapter adds to one linear module: ``y += scale * M_p … M_1 x``.

    `names`: what its checkpoints call the factor of each mode. `diag`: what the columns of the only factor have been
    multiplied by, if that is so. Factors are in the dtypes that they are stored in, multiplied ones in fp32.
    """

    modes: tuple[Mode, ...]
    names: tuple[str, ...]
    scale: float = 1.0
    diag: Tensor | None = None

    rank = 0
    """For `Info`: a chain has none."""

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = (self.modes[0].matrix if self.diag is None else self.diag).dtype
        return found

    def tensors(self) -> dict[str, Tensor]:
        """As its checkpoints have them: `diag` is divided out again. A column that it makes zero says nothing, and
        stays so."""
        found: dict[str, Tensor] = {name: mode.matrix for name, mode in zip(self.names, self.modes, strict=True)}
        if self.diag is None:
            return found
        ((name, g),) = found.items()
        return {name: torch.where(self.diag == 0, 0.0, g.float() / self.diag.float()).to(g.dtype), DIAG: self.diag}


class KroneckerReader(Reader):
    """GAWS, GAWS-D and LoKr."""

    @property
    def kind(self) -> str:
        return str(self.settings["peft_type"])

    def factors(self) -> dict[str, Chain]:
        keys = self.keys()
        read = self._lokr if self.kind == "LOKR" else self._gaws
        found = {path: read(path, parts) for path, parts in keys.items()}
        if not found:
            raise BankError(f"{self.at} holds no factors: save the adapter again with save_pretrained")
        self.as_targeted(found, keys, PARTS[self.kind][0])
        return found

    def key(self, key: str) -> Key:
        pieces = key.removeprefix(PREFIX).split(".")
        for part in PARTS[self.kind]:
            first, *end = part.split(".")
            for size in (1, 2):  # without the adapter's name and with it
                at = len(pieces) - len(end) - size
                if at > 0 and pieces[at] == first and pieces[at + size :] == end:
                    return Key(".".join(pieces[:at]), part, pieces[at + 1] if size == 2 else None)
        why = next(why for piece, why in FOREIGN.items() if piece in key)
        raise self.error(key, f"is not taken, as {why}")

    def _gaws(self, path: str, keys: dict[str, str]) -> Chain:
        from gawscompile.adapters import GAWSConfig, GAWSDConfig

        own, g = self.kind == "GAWS", G[self.kind]
        some = next(iter(keys.values()))
        n, k, _ = self.layer(path, some)
        said = {name: self.settings[name] for name in (*SPLITS, *PATTERNS) if self.settings.get(name)}
        config = (GAWSConfig if own else GAWSDConfig)(**said)
        try:
            splits = config.splits_of(path, k, n)
        except ValueError as error:
            what = f"does not fit its config{self.other}: {plain(str(error))}"
            raise self.error(some, f"{what}. Give an adapter of this base model") from error
        self.complete(path, keys, {g, DIAG} if self.settings.get(DIAG) else {g}, DIAG)
        rows, columns = splits.shape("gaws" if own else "gawsd", k, n)
        slices = f"in {splits.inputs} and {splits.outputs} slices in the config{self.other}"
        why = f"{plain(path)} has {k} inputs and {n} outputs, {slices}"
        matrix = self.sound(keys[g], (rows, columns), why)
        diag = self.sound(keys[DIAG], (columns,), why) if DIAG in keys else None
        if diag is not None:
            matrix = matrix.float() * diag.float()
        mode = Mode(splits.inputs, matrix, 1) if own else Mode(1, matrix, k // splits.inputs)
        return Chain((mode,), (g,), 1.0, diag)

    def _lokr(self, path: str, keys: dict[str, str]) -> Chain:
        from peft.tuners.lokr.layer import factorization

        some = next(iter(keys.values()))
        n, k, _ = self.layer(path, some)
        if type(self.modules[path]) is not nn.Linear:
            raise self.error(some, "is of a Conv1D, for which PEFT has no LoKr: give LoKr of nn.Linear")
        rank: int = self.said_of(path, "rank_pattern", "r")
        alpha: float = self.said_of(path, "alpha_pattern", "alpha")
        factor = self.settings.get("decompose_factor", -1)
        (m, wide), (high, tall) = factorization(k, factor), factorization(n, factor)
        narrow = bool(self.settings.get("decompose_both")) and rank < max(high, m) / 2, rank < max(tall, wide) / 2
        due = {*((W1_A, W1_B) if narrow[0] else (W1,)), *((W2_A, W2_B) if narrow[1] else (W2,))}
        self.complete(path, keys, due, "r, rank_pattern, decompose_both or decompose_factor")
        shapes = {W1: (high, m), W1_A: (high, rank), W1_B: (rank, m)}
        shapes |= {W2: (tall, wide), W2_A: (tall, rank), W2_B: (rank, wide)}
        why = f"{plain(path)} has {k} inputs and {n} outputs, and rank {rank} in the config{self.other}"
        of = {part: self.sound(key, shapes[part], why) for part, key in keys.items()}
        inner = rank if narrow[1] else wide
        places = {W2_B: (m, 1), W1: (1, inner), W1_B: (1, inner), W1_A: (1, inner), W2: (high, 1), W2_A: (high, 1)}
        names = tuple(part for part in places if part in of)  # in the order in which they are applied
        modes = tuple(Mode(places[part][0], of[part], places[part][1]) for part in names)
        return Chain(modes, names, self.scales.get(path, alpha / rank))
