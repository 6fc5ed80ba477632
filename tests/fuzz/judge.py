"""The judgement: is a rewritten graph as good as the original one?

Numbers are compared to fp64, our error beside the original's, over as many draws as it takes to tell; all else (shapes,
dtypes, strides, who shares memory with whom, what was written to) must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.fuzz.reference import Ran, strides

WORSE = 4.0
"""Our error is at most so many times the original's …"""

FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""… or this part of the answer, by the output's dtype: some units in the last place, and many of fp64's, where the
original is the reference."""

DRAWS = 16
"""Draws after which the judgement stands; where the first looks well, it is the only one."""


def structure(ours: Ran, theirs: Ran) -> str | None:
    """What differs beside numbers."""
    if len(ours.outputs) != len(theirs.outputs):
        return f"{len(ours.outputs)} outputs where {len(theirs.outputs)} are due"
    for i, (got, want) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        if not isinstance(want, torch.Tensor):
            if got != want:
                return f"output {i} is {got}, not {want}"
        elif _kind(got) != _kind(want):
            return f"output {i} is {_kind(got)}, not {_kind(want)} (shape, dtype, strides)"
    for i, (got, want) in enumerate(zip(_shared(ours), _shared(theirs), strict=True)):
        if got != want:
            return f"output {i} shares memory with {_names(got)}, not with {_names(want)}"
    return None


def _kind(t: Any) -> tuple[Any, ...]:
    return tuple(t.shape), t.dtype, strides(t)


def _shared(ran: Ran) -> list[tuple[tuple[str, int], ...]]:
    """For each output: the inputs, and the outputs before it, whose memory it shares, and at which distance."""
    named = [(f"input {i}", t) for i, t in enumerate(ran.inputs)]
    named += [(f"output {i}", t) for i, t in enumerate(ran.outputs)]
    tensors = [(name, t) for name, t in named if isinstance(t, torch.Tensor) and t.numel()]
    found = []
    for i, out in enumerate(ran.outputs):
        alike: list[tuple[str, int]] = []
        for name, t in tensors if isinstance(out, torch.Tensor) and out.numel() else ():
            if name == f"output {i}":
                break
            if t.untyped_storage()._cdata == out.untyped_storage()._cdata:
                alike.append((name, out.storage_offset() - t.storage_offset()))
        found.append(tuple(alike))
    return found


def _names(alike: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name} (at {by:+})" if by else name for name, by in alike) or "none"


@dataclass
class _Errors:
    """Sums of squares, of one output over draws."""

    ours: float = 0.0
    theirs: float = 0.0
    answer: float = 0.0

    def worse(self, dtype: torch.dtype) -> bool:
        # an error of subnormal numbers is no error
        return self.ours**0.5 > WORSE * self.theirs**0.5 + FLOOR[dtype] * self.answer**0.5 + 1e-30


@dataclass
class Judgement:
    """Of one case, draw after draw."""

    errors: dict[str, _Errors] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, ours: Ran, theirs: Ran, exact: Ran, spread: bool = False, vanish: bool = False) -> str | None:
        """One more draw. Returns what is wrong however many draws there are: integers, NaN, inf. `spread` and `vanish`:
        NaN and inf may be where the original has none, and need not be where it has them."""
        for name, got, want, ref in _numbers(ours, theirs, exact):
            if not want.is_floating_point():
                if not torch.equal(got, want):
                    return f"{name}: {want.dtype} differ"
                continue
            limit = torch.finfo(want.dtype).max
            finite = ref.isfinite() & (ref.abs() < limit)
            lost = got.isfinite() & ~want.isfinite() & ~finite & (not vanish)
            made = ~got.isfinite() & want.isfinite() & finite & (not spread)
            if lost.any() or made.any():
                which = lost if lost.any() else made
                values = (t[which].flatten()[0].item() for t in (got, want, ref))
                return "{}: {} where the original is {} and fp64 {}".format(name, *values)
            both = got.isfinite() & want.isfinite() & finite
            found, self.dtypes[name] = self.errors.setdefault(name, _Errors()), want.dtype
            found.ours += ((got.double() - ref)[both] ** 2).sum().item()
            found.theirs += ((want.double() - ref)[both] ** 2).sum().item()
            found.answer += (ref[both] ** 2).sum().item()
        return None

    def doubt(self) -> str | None:
        """The output whose error is too large, as far as the draws tell."""
        for name, found in self.errors.items():
            if found.worse(self.dtypes[name]):
                sizes = [f"{value**0.5:.3g}" for value in (found.ours, found.theirs, found.answer)]
                return "{}: error {}, the original's {}, where the answer is {} (norms)".format(name, *sizes)
        return None


def _numbers(ours: Ran, theirs: Ran, exact: Ran) -> list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    found = []
    for kind in ("outputs", "inputs"):
        for i, values in enumerate(zip(*(getattr(ran, kind) for ran in (ours, theirs, exact)), strict=True)):
            if all(isinstance(value, torch.Tensor) for value in values):
                found.append((f"{kind[:-1]} {i}", *values))
    return found
