"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Fault:
    """In `file`, `old` (which occurs once) becomes `new`; `tests` are the narrowest that should notice."""

    file: str
    old: str
    new: str
    tests: str
    library: bool = False
    """Shows only where the library's matmul is planned."""
    unproven: str = ""
    """Why ``options={"verify": True}`` cannot refuse what it makes of a model; "" where it must."""
    by: Literal["fast", "slow", "fuzz"] = "fast"
    """Which tests these are; for the fuzzer, `tests` are its arguments."""
    needs: Literal["", "avx2 alone", "avx512", "avx512_bf16"] = ""
    """What a CPU must have to run the code that is wrong; "avx2 alone": and no more."""

    @property
    def shows_here(self) -> bool:
        has = {
            "": True,
            "avx2 alone": torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported(),
            "avx512": torch.cpu._is_avx512_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        }
        return has[self.needs]


FEW_TOKENS = "the zoo has no attention of many queries, and too few tokens for panels"
ONE_RANK = "the zoo is one process"
ON_GPUS = "no value on a CPU depends on it"
NO_GRADIENTS = "the zoo is run without gradients"
EITHER = "both plans are right"
A_KEY = "what is stale shows in a later process"
A_RACE = "who waits for nobody may still come second"
A_CHANGE = "it shows where parameters change between calls, and a proof is of one state"
AROUND = "a proof runs nothing of what Inductor prints around the kernels"
BY_SHAPE = "its operands' shapes are not what it says, and the check between passes refuses it before a proof does"
LAID_OUT = "a proof's tensors are laid out plainly"
