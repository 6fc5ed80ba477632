"""The ways in which people compile with us: ``torch.compile``, without a watch, too, and ``gawscompile.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import gawscompile
from gawscompile.ir.records import GraphRecord
from gawscompile.observe.store import RECORDS

OPTIONS = {"strict": True}
WAYS = [pytest.param("watch=False", marks=pytest.mark.slow), "gawscompile.compile"]
"""They differ in when guards are checked: the fast tests take the second alone."""


def compiled(way: str, model: Any, **settings: Any) -> Any:
    """A module or a function, compiled in one of the two ways."""
    if way == "watch=False":
        return torch.compile(model, backend="gaws", options={**OPTIONS, "watch": False}, **settings)
    return gawscompile.compile(model, options=OPTIONS, **settings)


def settings(way: str) -> dict[str, Any]:
    """What others hand to torch.compile for us (`accelerate`, ``module.compile``) to have the same."""
    return {"backend": "gaws", "options": {**OPTIONS, "watch": way != "watch=False"}}


@contextmanager
def fusing(adapted: int | None = None) -> Iterator[None]:
    """What runs inside compiles, and adapters are fused; `adapted`: so many of them in every graph that has linears
    with one."""
    mark = len(RECORDS)
    yield
    counts = [fused(record) for record in RECORDS.since(mark)]
    assert any(counts)
    assert adapted is None or set(counts) <= {0, adapted}, counts


def fused(record: GraphRecord) -> int:
    """Linears of a graph that run in a generated kernel, adapter and all."""
    return sum(entry.status == "fused" and entry.adapters > 0 for entry in record.linears)
