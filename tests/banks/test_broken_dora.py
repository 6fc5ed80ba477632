"""Broken checkpoints of DoRA, each with an error that names file and key, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gawscompile.banks.checkpoints import WEIGHTS
from tests.banks.checkpoints import adapted, base, saved
from tests.banks.damage import (
    QB,
    Checkpoint,
    Damage,
    Q,
    damaged,
    holds,
    key,
    lacks,
    ones,
    put,
    refused,
    says,
    turned,
)

M = key("layers.0.q", "lora_magnitude_vector")


def row_of_zeros(good: Checkpoint) -> None:
    """The factors take a row of the base weight away."""
    good.config.update(lora_alpha=good.config["r"])  # a scale of one: nothing is rounded
    good.tensors[Q][0] = -base().layers[0].q.weight[2].detach()
    good.tensors[QB][2] = torch.tensor([1.0, 0, 0, 0])


DORA: dict[str, tuple[Damage, str, list[str]]] = {
    "a magnitude missing": (lacks(M), WEIGHTS, [M, "missing beside", "again"]),
    "a magnitude alone": (lacks(Q, QB), WEIGHTS, [Q, "missing", "again"]),
    "a magnitude too long": (turned(M, lambda m: ones(13)), WEIGHTS, [M, "[13]", "[12]", "this base model"]),
    "a magnitude a row": (turned(M, lambda m: ones(1, 12)), WEIGHTS, [M, "[1, 12]", "[12]"]),
    "NaN in a magnitude": (turned(M, put(3, float("nan"))), WEIGHTS, [M, "NaN", "diverged"]),
    "a magnitude of whole numbers": (turned(M, lambda m: m.int()), WEIGHTS, [M, "int32", "float32"]),
    "a magnitude in two spellings": (
        holds(f"{M}.weight", ones(12)), WEIGHTS, [M, f"{M}.weight", "another spelling", "keep one"]
    ),
    "a magnitude of another adapter": (holds(f"{M}.b.weight", ones(12)), WEIGHTS, [M, "keep"]),
    "a magnitude's bias": (holds(f"{M}.bias", ones(12)), WEIGHTS, [f"{M}.bias", "keep"]),
    "a magnitude of a module that is not there": (
        holds(key("layers.7.q", "lora_magnitude_vector"), ones(12)), WEIGHTS, ["layers.7.q", "does not have"]
    ),
    "magnitudes without use_dora": (says(use_dora=False), WEIGHTS, ["magnitude_vector", "correct its bias, lora_bias"]),
    "a row of zeros": (row_of_zeros, WEIGHTS, [M, "row of zeros", "without DoRA"]),
}


@pytest.fixture(scope="module")
def good_dora(tmp_path_factory) -> Path:
    return saved(adapted(use_dora=True), tmp_path_factory.mktemp("dora"))


@pytest.mark.parametrize("kind", DORA)
def test_a_broken_folder_of_dora_is_refused(kind, good_dora, tmp_path):
    damage, name, parts = DORA[kind]
    refused(damaged(good_dora, damage, tmp_path / "damaged"), name, parts)
