"""The arithmetic of splits: which are valid for a projection, and which ones a configuration means.

With K inputs and N outputs, and `inputs` and `outputs` the numbers of equal slices of each (METHODS, section GAWS):

- ``gaws``: one G of N/n × K/n for all n slices, so both counts are the same n;
- ``gawsd``: G of `outputs` × `inputs` mixes slices, which must all be of one length d = K/inputs = N/outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gaws", "gawsd"]


class SplitError(ValueError):
    """Splits that a projection cannot have; the message names it, its shape and what would be valid."""


@dataclass(frozen=True, order=True)
class Splits:
    """How many equal slices the inputs and the outputs of one projection are cut into."""

    inputs: int
    outputs: int

    def shape(self, kind: Kind, in_features: int, out_features: int) -> tuple[int, int]:
        """(rows, columns) of G."""
        if kind == "gaws":
            return out_features // self.outputs, in_features // self.inputs
        return self.outputs, self.inputs

    def parameters(self, kind: Kind, in_features: int, out_features: int, diag: bool = False) -> int:
        """How many numbers G has, and diag (one per column of G) with it."""
        rows, columns = self.shape(kind, in_features, out_features)
        return rows * columns + (columns if diag else 0)


@dataclass(frozen=True)
class Wish:
    """What a configuration says about one projection; None where it says nothing."""

    input_splits: int | None = None
    output_splits: int | None = None
    input_split_dim: int | None = None
    output_split_dim: int | None = None

    def __str__(self) -> str:
        said = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in said.items()) or "no splits"


def all_splits(kind: Kind, in_features: int, out_features: int) -> list[Splits]:
    """Every valid choice for a projection, by falling size of G."""
    common = math.gcd(in_features, out_features)
    divisors = [count for count in range(1, common + 1) if common % count == 0]
    if kind == "gaws":
        return [Splits(count, count) for count in divisors]
    return [Splits(in_features // length, out_features // length) for length in divisors]


def resolve(kind: Kind, in_features: int, out_features: int, wish: Wish, module: str) -> Splits:
    """The splits that `wish` means for `module`; what is not said follows from what is.

    Raises `SplitError` where nothing is said, two statements disagree, or the slices would not be equal.
    """

    def refuse(why: str) -> SplitError:
        return SplitError(
            f"{module} ({in_features} inputs, {out_features} outputs): {why}. Valid are "
            + _listing(kind, in_features, out_features)
        )

    found: dict[str, int | None] = {}
    for side, features, count, length in (
        ("input", in_features, wish.input_splits, wish.input_split_dim),
        ("output", out_features, wish.output_splits, wish.output_split_dim),
    ):
        for name, value in ((f"{side}_splits", count), (f"{side}_split_dim", length)):
            if value is not None and (value < 1 or features % value):
                raise refuse(f"{name}={value} does not divide its {features} {side}s")
        if count is not None and length is not None and count * length != features:
            raise refuse(f"{side}_splits={count} and {side}_split_dim={length} disagree, {count}·{length} ≠ {features}")
        found[side] = features // length if length is not None else count
    inputs, outputs = found["input"], found["output"]
    if inputs is None and outputs is None:
        raise refuse("the configuration names no splits (input_splits or input_split_dim)")
    if kind == "gaws":
        inputs = outputs if inputs is None else inputs
        outputs = inputs if outputs is None else outputs
        if inputs != outputs:
            raise refuse(f"GAWS needs as many input slices as output slices, not {inputs} and {outputs} ({wish})")
    else:
        length = in_features // inputs if inputs is not None else out_features // (outputs or 1)
        if in_features % length or out_features % length:
            raise refuse(f"{wish} makes slices of {length}, which do not fit both its inputs and its outputs")
        inputs = in_features // length if inputs is None else inputs
        outputs = out_features // length if outputs is None else outputs
    assert inputs is not None and outputs is not None
    if kind == "gawsd" and in_features * outputs != out_features * inputs:
        raise refuse(f"{inputs} input and {outputs} output slices are not all of one length ({wish})")
    if kind == "gaws" and (in_features % inputs or out_features % outputs):
        raise refuse(f"{inputs} slices do not divide both its inputs and its outputs ({wish})")
    return Splits(inputs, outputs)


def _listing(kind: Kind, in_features: int, out_features: int) -> str:
    found = all_splits(kind, in_features, out_features)
    if kind == "gaws":
        return f"counts of {', '.join(str(splits.inputs) for splits in found)} (for inputs and outputs alike)"
    pairs = ", ".join(f"{splits.inputs}→{splits.outputs}" for splits in found)
    return f"input→output counts of {pairs} (slices of {', '.join(str(in_features // s.inputs) for s in found)})"
