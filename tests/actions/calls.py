"""Actions that are of a call: how it is made, and under which modes."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch

from tests.actions.table import Call, factors, ids, row

CALLS = "Calls"


@row(CALLS, "another batch size and length")
def _(model: Any) -> Call:
    return Call(ids(3, 5))


@row(CALLS, "one token")
def _(model: Any) -> Call:
    return Call(ids(1, 1))


@row(CALLS, "no rows")
def _(model: Any) -> Call:
    return Call(ids(2, 3)[:0])


@row(CALLS, "ids that are no contiguous tensor")
def _(model: Any) -> Call:
    return Call(ids(4, 6)[::2, ::2])


@row(CALLS, "int32 ids")
def _(model: Any) -> Call:
    return Call(ids().to(torch.int32))


@row(CALLS, "`inference_mode`")
def _(model: Any) -> Call:
    return Call(ids(), torch.inference_mode)


@row(CALLS, "autocast to bf16")
def _(model: Any) -> Call:
    @contextlib.contextmanager
    def under() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            yield

    return Call(ids(), under)


@row(CALLS, "gradients on")
def _(model: Any) -> Call:
    return Call(ids(), torch.enable_grad)


@row(CALLS, "another number of threads")
def _(model: Any) -> Any:
    return _threads(1 if torch.get_num_threads() > 1 else 2)


@contextlib.contextmanager
def _threads(number: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@row(CALLS, "a deep copy of the model written to")
def _(model: Any) -> None:
    other = copy.deepcopy(model)
    for p in factors(other):
        p.data.mul_(7.0)


@row(CALLS, "the model saved and its state dict kept")
def _(model: Any) -> None:
    torch.save(model.state_dict(), io.BytesIO())
