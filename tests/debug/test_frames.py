"""What is said of Dynamo: guards counted by time, and a remedy for every cause."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gawscompile.debug import frames


def test_guards_are_those_of_later_compiles_though_torch_keeps_only_the_last(monkeypatch):
    kept = [SimpleNamespace(start_time=float(t), guard_count=t) for t in range(100)][-64:]
    kept.append(SimpleNamespace(start_time=None, guard_count=None))  # of a compile that failed early
    monkeypatch.setattr(frames, "get_compilation_metrics", lambda: kept)
    assert frames.guards(98.0) == 98 + 99 and frames.guards(100.0) == 0


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("0/0: tensor 'x' size mismatch at index 0. expected 1, actual 2", "dynamic=True"),
        ("0/0: GLOBAL_STATE changed: grad_mode", "no_grad"),
        ("0/0: self.scaling['default'] == 2.0", "hotswap"),
        ("0/0: something else", "recompile_limit"),
    ],
)
def test_a_recompile_has_its_cause_and_a_remedy(monkeypatch, reason, remedy):
    twice = [SimpleNamespace(recompile_reason=reason)] * 2 + [SimpleNamespace(recompile_reason=None)]
    monkeypatch.setattr(frames, "get_compilation_metrics", lambda: twice)
    (found,) = frames.recompiled()
    assert (found.kind, found.count, found.cause) == ("recompile", 2, reason) and remedy in found.remedy
