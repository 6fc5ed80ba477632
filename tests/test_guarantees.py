"""The table of `docs/guarantees.md`: what happens where a user does something between two calls of a compiled model.

Every row is done to a model compiled by ``torch.compile(model, backend="gaws")``, with our watch and with
``options={"watch": False}``, and the next call is compared with eager's. The suite does it without Inductor (our
passes, guards and kernels, and eager for the rest); ``-m slow`` with it, which must give the same table. With
``GAWS_UPDATE_DOCS=1`` the slow test writes the table anew.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gawscompile.calibration.measure import graphs_compiled
from tests.actions import GROUPS, NUMBERS, Call, ids, small
from tests.graphs import rewriting

PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"
MARK = "<!-- the table: written by tests/test_guarantees.py -->\n"
ENTRIES = {"as compiled": True, "`watch=False`": False}

TORCHS_OWN = [words for words in GROUPS["Modules"] if "hook on" in words]
"""What ``torch.compile`` does not notice by itself: see the page's footnote."""

ROWS = [(group, words) for group, rows in GROUPS.items() for words in rows]
SEEN, NEW, SAME_ERROR, UNSEEN = "seen", "recompiles", "eager's error", "not noticed¹"


Pair = tuple[Any, Any]
shared: dict[Any, Pair] = {}


def pair(dora: bool, entry: str, inductor: bool) -> Pair:
    """A model and its compiled form, called twice: a graph's first call through its guards is its second in all."""
    model = small(dora)
    torch._dynamo.reset()
    watch = ENTRIES[entry]
    how: Any = {"backend": "gaws", "options": {"watch": watch}} if inductor else {"backend": rewriting([], watch=watch)}
    compiled = torch.compile(model, **how, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-4)
        compiled(ids())
    return model, compiled


def outcome(group: str, words: str, entry: str, inductor: bool) -> str:
    """Do one row, and say what became of the next call. An answer that is not eager's is an `AssertionError`.

    Rows that leave nothing behind but other numbers share a model, as long as they follow each other.
    """
    action: Any = GROUPS[group][words]
    key = (group, action.dora, entry, inductor)
    if group != NUMBERS or key not in shared:
        shared.clear()
        shared[key] = pair(action.dora, entry, inductor)
    model, compiled = shared[key]
    with torch.no_grad():
        before = model(ids())
    graphs = graphs_compiled()
    done = action(model)
    call = done if isinstance(done, Call) else Call(ids())
    with done if isinstance(done, contextlib.AbstractContextManager) else contextlib.nullcontext(), call.under():
        try:
            want = model(call.ids)
        except Exception as error:
            with pytest.raises(Exception):  # noqa: B017  (eager's, or the compiler's that has it as its cause)
                compiled(call.ids)
            return f"{SAME_ERROR}: {type(error).__name__}"
        got = compiled(call.ids)
        if words in TORCHS_OWN and not ENTRIES[entry]:
            torch.testing.assert_close(got, before, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(got, want, rtol=1e-2)
            return UNSEEN
        assert got.dtype == want.dtype and got.shape == want.shape
        loose = torch.bfloat16 in {want.dtype, *(p.dtype for p in model.parameters())} or torch.is_autocast_enabled(
            "cpu"
        )
        torch.testing.assert_close(got, want, **({"rtol": 0.1, "atol": 0.1} if loose else {"rtol": 1e-4, "atol": 1e-4}))
        new = graphs_compiled() - graphs
        again = compiled(call.ids)
    assert graphs_compiled() - graphs == new, "it recompiles again and again"
    torch.testing.assert_close(again, got)
    return NEW if new else SEEN


def table(inductor: bool) -> dict[tuple[str, str], list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        columns = [{row: outcome(*row, entry, inductor) for row in ROWS} for entry in ENTRIES]
    return {row: [column[row] for column in columns] for row in ROWS}


def printed(found: dict[tuple[str, str], list[str]]) -> str:
    lines = [f"| what is done | {' | '.join(ENTRIES)} |", f"|---|{'---|' * len(ENTRIES)}"]
    for group, rows in GROUPS.items():
        lines.append(f"| **{group}** |{' |' * len(ENTRIES)}")
        lines += [f"| {words} | {' | '.join(found[group, words])} |" for words in rows]
    return "\n".join(lines) + "\n"


def on_the_page() -> dict[tuple[str, str], list[str]]:
    found, group = {}, ""
    for line in PAGE.read_text().split(MARK)[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| **"):
            group = cells[0].strip("*")
        elif group and line.startswith("|"):
            found[group, cells[0]] = cells[1:]
    return found


def test_there_are_enough_rows():
    assert len(ROWS) >= 60 and list(on_the_page()) == ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_it_happens_as_the_page_says(row):
    entry = "as compiled"  # the guards of the other are Dynamo's own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert outcome(*row, entry, inductor=False) == on_the_page()[row][list(ENTRIES).index(entry)]


@pytest.fixture(autouse=True)
def forgetful_dynamo():
    """Not here: rows share what is compiled, and `pair` forgets."""


@pytest.mark.slow
def test_the_table_with_inductor():
    found = table(inductor=True)
    if os.environ.get("GAWS_UPDATE_DOCS"):
        head, _, rest = PAGE.read_text().partition(MARK)
        tail = rest[rest.index("\n¹") :]  # the footnote
        PAGE.write_text(head + MARK + printed(found) + tail)
    assert found == on_the_page()
