"""The progress line: on a terminal, one line that goes away; elsewhere nothing at all."""

from __future__ import annotations

import io
import sys
import time

from gawscompile.backend import STAGES
from gawscompile.observe import progress
from gawscompile.observe.progress import Progress
from tests.graphs import Pair


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_says_the_stage_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "TICK", 0.02)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with Progress("graph 3") as shown:
        shown.say("early")
        time.sleep(0.1)
        shown.say("kernel 2 of 7" + "!" * 100)
        time.sleep(0.1)
    lines = screen.getvalue().split("\r\x1b[2K")
    assert lines[1].startswith("gaws: graph 3: early, 0 s") and lines[-2].startswith("gaws: graph 3: kernel 2 of 7!!")
    assert lines[-1] == "" and max(map(len, lines)) < 40


def test_a_short_compile_and_one_without_a_terminal_say_nothing(monkeypatch):
    for screen, patience in ((Terminal(), 60.0), (io.StringIO(), 0.0)):
        monkeypatch.setattr(progress, "PATIENCE", patience)
        monkeypatch.setattr(sys, "stderr", screen)
        with Progress("graph") as shown:
            shown.say("stage")
            time.sleep(0.02)
        assert screen.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("graph") as shown:
        shown.say("a process may have no stderr")


def test_a_compile_says_its_passes_and_kernels(monkeypatch):
    import torch

    from gawscompile import backend

    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, stage: said.append(stage))
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        torch.compile(Pair().eval(), backend=backend.gaws)(torch.randn(1, 6, 32))
    passes = [f"{name}, pass {n} of {len(STAGES)}" for n, name in enumerate(STAGES, 1)]
    assert said == ["torch's passes", *passes, "Inductor", "kernel 1 of 2", "kernel 2 of 2"]
