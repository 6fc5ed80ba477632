"""Listings: differences turn one into the other, and what is printed is Python."""

from __future__ import annotations

import ast
import random
import shutil
import subprocess

import pytest
import torch

from gawscompile.observe.listing import Line, applied, difference, source, spell, unified


def lines(*names: str) -> list[Line]:
    return [Line(name.strip("'"), f"{name} = f()", "a" if name < "m" else "b") for name in names]


@pytest.mark.parametrize("seed", range(40))
def test_hunks_turn_one_listing_into_the_other(seed):
    pick = random.Random(seed)
    before = lines(*(chr(97 + i) for i in range(20) if pick.random() < 0.7))
    after = [line._replace(text=line.text + "'") if pick.random() < 0.2 else line for line in before]
    after = [line for line in after if pick.random() < 0.8]
    for i in range(pick.randint(0, 4)):
        after.insert(pick.randint(0, len(after)), Line(f"new{i}", f"new{i} = f()", "c"))
    if seed % 4 == 0:
        pick.shuffle(after)  # passes keep the order; a user's need not
    hunks = difference(before, after)
    assert applied(before, hunks) == after
    assert sum(len(h.added) for h in hunks) <= len(after)
    assert not difference(after, after)


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch")
def test_a_diff_can_be_applied_by_patch(tmp_path):
    before, after = lines(*"abcdefgh"), lines(*"abxcdhyz")
    (tmp_path / "a").write_text("".join(f"{line.text}\n" for line in before))
    body = "".join(f"{line}\n" for line in unified(before, difference(before, after)))
    done = subprocess.run(
        ["patch", "--unified", "a"], cwd=tmp_path, input=f"--- a\n+++ a\n{body}", text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "a").read_text() == "".join(f"{line.text}\n" for line in after)


def test_arguments_are_spelled_as_python():
    values = [1, -2.5, float("inf"), None, True, "a'b\n", torch.float32, torch.device("cpu"), [1, (2,)], slice(1, None)]
    for value in values:
        assert eval(spell(value), {"torch": torch, "float": float}) == value
    assert spell(float("nan")) == 'float("nan")'


def test_a_module_by_any_name_stays_in_its_comment():
    names = ("evil\n) -> 0: import os #", "\u2028b", "")
    listed = [Line(*line) for line in zip("xyo", ('x: "f32[2]",', "y = x", "return y"), names, strict=True)]
    text = "\n".join(source(listed))
    assert len(text.splitlines()) == len(text.split("\n"))
    (function,) = ast.parse(text).body
    assert [type(one) for one in function.body] == [ast.Assign, ast.Return]
