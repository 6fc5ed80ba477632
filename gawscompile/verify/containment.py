"""A rewrite that raises is undone, and all others stand.

The pipeline works on a copy of the graph. Where a rewrite raises, or leaves what `verify` refuses, the copy is thrown
away and the pipeline runs again over a new one, in which that rewrite may not go ahead (`Context.allows`); what it
leaves unfinished is spelled out as for a disabled pass (`unfinished.py`). The same goes for what a pass failed to
look at (`Context.looks_at`). Where no rewrite can be named, or too many fail, the whole graph is left to Inductor.
"""

from __future__ import annotations

import copy

from gawscompile.ir.records import GraphRecord, plain
from gawscompile.passes.context import Context, Rewrite

ROUNDS = 16
"""Rewrites of one graph at most that are barred one after the other: each costs another run of the pipeline."""


class Attempts:
    """The runs of the pipeline over one graph. `barred`: the rewrites that failed, and how."""

    def __init__(self, record: GraphRecord) -> None:
        self.barred: dict[Rewrite, str] = {}
        self._record, self._before = record, copy.deepcopy(record)  # a torch.cond's branches share one

    def another(self, context: Context, error: Exception) -> bool:
        """Whether to run again after `error`: what it comes from is barred, and the record is as it was before."""
        blamed = context.blamed()
        if blamed is None or blamed in self.barred or len(self.barred) == ROUNDS:
            return False
        self.barred[blamed] = said(context, error)
        vars(self._record).update(vars(copy.deepcopy(self._before)))
        return True


def said(context: Context, error: Exception) -> str:
    """``fuse_zflora, at layers.0.q_proj: KeyError: …``."""
    where = plain(context.module_path(context.at)) if context.at else "no node in particular"
    return f"{context.stage}, at {where}: {type(error).__name__}: {plain(str(error))}"
