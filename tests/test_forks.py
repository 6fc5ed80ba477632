"""Forks of a process that has compiled in several threads: children call what it compiled, compile anew, and end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRELUDE = """
import os, signal, sys, threading, time
import torch
from torch.nn.functional import linear

OPTIONS = {"strict": True}
COUNT = int(sys.argv[1])
torch.set_grad_enabled(False)


class Adapted(torch.nn.Module):
    # A LoRA, or a DoRA, then what Inductor makes a kernel of.

    def __init__(self, width, dora=False):
        super().__init__()
        self.base, self.dora = torch.nn.Linear(width, width), dora
        self.a, self.b = torch.nn.Parameter(torch.randn(4, width)), torch.nn.Parameter(torch.randn(width, 4))

    def forward(self, x):
        y = linear(x, self.base.weight) + 2.0 * linear(linear(x, self.a), self.b)
        if self.dora:
            y = y * (self.a[0, 0] / torch.linalg.norm(self.base.weight + 2.0 * self.b @ self.a, dim=1))
        return torch.softmax(y, -1) * x


def made(width, **more):
    model = Adapted(width, **more).eval()
    return model, torch.compile(model, backend="gaws", options=OPTIONS)


def forked(work, seconds=120):
    # A child that does `work` ends well, and in time.
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print("in the child:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            assert done[1] == 0, work.__name__
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"a child hangs: {work.__name__}")


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
"""

MANY = """
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile
x, t, stack = torch.randn(120 + COUNT, 256), torch.randn(120 + COUNT, 256), torch.randn(3, 120 + COUNT, 256)
model, compiled = made(256)


def threads():  # each compiles a model of its own, and all of them call one
    def work(width):
        torch.set_grad_enabled(False)  # every thread has its own
        (own, fast), y = made(width), torch.randn(80, width)
        close(fast(y), own(y))
        close(compiled(x), model(x))

    all_of_them = [threading.Thread(target=work, args=(width,)) for width in (64, 96)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()


want = model(x)
vmapped, (_, tangent) = torch.func.vmap(model)(stack), torch.func.jvp(model, (x,), (t,))


def transforms():  # of what is compiled: answers are right, and Dynamo leaves the model to eager torch from then on
    close(torch.func.vmap(compiled)(stack), vmapped)
    close(torch.func.jvp(compiled, (x,), (t,))[1], tangent)


def one_thread():
    graphs = counters["stats"]["unique_graphs"]
    torch.set_num_threads(1)  # which Dynamo notices: compiled again
    close(compiled(x), want)
    assert counters["stats"]["unique_graphs"] == graphs + 1


def one_thread_transforms():
    torch.set_num_threads(1)
    transforms()


def all_threads():
    close(compiled(x), want)
    transforms()


def another_model():
    (new, fast), y = made(64), torch.randn(200 + os.getpid() % 50, 64)  # of a size that was not compiled for
    close(fast(y), new(y))


close(compiled(x), want)
transforms()
torch._dynamo.reset()
close(compiled(x), want)
threads()
AsyncCompile.pool().submit(int).result()  # as it is where kernels were built and not found in Inductor's cache
kinds = (one_thread, all_threads, another_model, one_thread_transforms)
for i in range(COUNT):
    forked(kinds[i % len(kinds)])
    close(compiled(x), want)
print(COUNT, "children ended")
"""

WHILE_ANOTHER_REGISTERS = """
from gawscompile.observe.store import RECORDS
from gawscompile.runtime import ops
(model, compiled), x = made(128, dora=True), torch.randn(2, 128)
want = model(x)
close(compiled(x), want)
program = next(group.program for record in RECORDS.since(0) for group in record.groups)
stop = threading.Event()


def register():  # which takes the lock of the op's tables
    while not stop.is_set():
        ops.register(program)


def child():
    torch.set_num_threads(1)
    close(compiled(x), want)
    for p in model.parameters():  # what is hoisted is derived anew, which takes the other lock
        p.data.mul_(1.01)
    close(compiled(x), model(x))


worker = threading.Thread(target=register)
worker.start()
try:
    for _ in range(COUNT):
        forked(child)
        close(compiled(x), want)
finally:
    stop.set()
    worker.join()
print(COUNT, "children ended")
"""


def run(program: str, *arguments: str, timeout: float) -> str:
    """A script's output, with two threads whatever this process has."""
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(MANY, id="many"),
        pytest.param(WHILE_ANOTHER_REGISTERS, id="while_another_registers"),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 200])
def test_children_end(program, count):
    """Threads, vmap and jvp over compiled models come first. In a child Inductor's pool, which built kernels before the
    fork, has no threads, nor has GNU OpenMP's, and a lock that another thread held would stay held."""
    assert run(program, str(count), timeout=300 + 30 * count) == f"{count} children ended\n"
