"""Ctrl-C in the middle of a compile: the next run, in the same process and in a new one, is as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.caches import seeded
from tests.test_processes import intact

PROGRAM = """
import os, signal, sys, threading, time
import torch
from torch._dynamo import output_graph
from torch._inductor import codecache, graph
from gawscompile import backend
from gawscompile import cache
from gawscompile.codegen import build
from gawscompile.observe.store import RECORDS
from gawscompile.runtime import ops

torch.set_grad_enabled(False)
torch.manual_seed(0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


def ctrl_c_in_a_terminal():  # the C++ compiler gets it too
    threading.Thread(target=lambda: (time.sleep(0.3), os.killpg(0, signal.SIGINT))).start()


POINTS = {
    "tracing": (output_graph.OutputGraph, "compile_and_call_fx_graph", ctrl_c),
    "a pass": (backend.STAGES["lower"], "run", ctrl_c),
    "Inductor's lowering": (graph.GraphLowering, "run", ctrl_c),
    "Inductor's code": (codecache.PyCodeCache, "load_by_key_path", ctrl_c),
    "waiting for kernels": (ops, "build_all", ctrl_c),
    "building them": (build, "_compile", ctrl_c_in_a_terminal),
    "writing an entry": (cache, "write_atomic", ctrl_c),
    "registering them": (ops, "register", ctrl_c),
}


def interrupting(owner, name, how):
    # The next call of `owner.name` is interrupted, and no other.
    real = getattr(owner, name)

    def call(*args, **kwargs):
        setattr(owner, name, real)
        how()
        return real(*args, **kwargs)

    setattr(owner, name, call)


for number, (what, point) in enumerate(POINTS.items()):
    width = 48 + 4 * number  # kernels of its own
    model, x = torch.nn.Sequential(torch.nn.Linear(width, 40), torch.nn.GELU()).eval(), torch.randn(2, width)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    if sys.argv[1] == "interrupted":
        interrupting(*point)
        try:
            compiled(x)
            raise SystemExit(f"{what}: was not interrupted")
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:  # registered by C++, which can raise nothing else
            assert what == "registering them" and "KeyboardInterrupt" in str(error), (what, error)
    mark = len(RECORDS)
    torch.testing.assert_close(compiled(x), model(x))
    if what not in ("waiting for kernels", "registering them"):  # where Dynamo is through, or the record is there
        assert sum(len(record.groups) for record in RECORDS.since(mark)) == 1, what
print(len(POINTS), "right")
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    ours = seeded(tmp_path / "gaws")
    for what in ("interrupted", "after it"):
        command, environment = (
            [sys.executable, "-c", PROGRAM, what],
            {**os.environ, "GAWS_CACHE_DIR": str(ours)},
        )
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, start_new_session=True
        )
        assert done.stdout == "8 right\n", done.stderr[-3000:]
        assert "Exception ignored" not in done.stderr
        assert intact(tmp_path, monkeypatch) == 9  # a kernel each, and the op
        assert not [path for path in (tmp_path / "gaws").rglob(".*") if path.is_file()]
