"""Threads, forks, and many processes with one cache, some of them killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gawscompile import cache
from tests.caches import environment
from tests.graphs import Pair, small_llama, tokens

PROGRAM = """
import sys, torch
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.ReLU(), torch.nn.Linear(40, 33)).eval()
x = torch.randn(2, 48)
with torch.no_grad():
    got = torch.compile(model, backend="gaws", options={"strict": True})(x)
    torch.testing.assert_close(got, model(x))
print("right")
"""


def crowd(folder: Path, count: int, kills: int, seed: int) -> list[int]:
    """Start `count` processes on one cache and kill `kills` of them at random moments. Return codes."""
    places = environment(folder)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=places, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    generator = random.Random(seed)
    for victim in generator.sample(started, kills):
        time.sleep(generator.uniform(0, 4))
        victim.send_signal(signal.SIGKILL)
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL or out == "right\n", err[-3000:]
    return [process.returncode for process in started]


def intact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Check every entry of the cache against its sum; how many kernels there are."""
    monkeypatch.setenv("GAWS_CACHE_DIR", str(folder / "gaws"))
    entries = [*cache.folder("kernels").glob("*.so"), *cache.folder("records").glob("*.json")]
    assert all(cache.get(path) is not None for path in entries if not path.name.startswith("."))
    return len(list(cache.folder("kernels").glob("[!.]*.so")))


@pytest.mark.slow
def test_several_processes_do_the_work_once(tmp_path, monkeypatch):
    assert crowd(tmp_path, count=3, kills=0, seed=0) == [0] * 3
    assert intact(tmp_path, monkeypatch) == 3  # two kernels, and the op that was there
    assert not list((tmp_path / "gaws" / "kernels").glob(".*"))


@pytest.mark.slow
def test_sixteen_processes_ten_rounds_with_kills(tmp_path, monkeypatch):
    for round_number in range(10):
        codes = crowd(tmp_path / str(round_number % 3), count=16, kills=4, seed=round_number)
        assert codes.count(0) >= 12
        assert intact(tmp_path / str(round_number % 3), monkeypatch) == 3


@pytest.mark.slow  # test_direct has two models of one class and threads
def test_threads_share_a_compiled_model():
    model = small_llama(layers=1)
    compiled = torch.compile(model, backend="gaws", options={"strict": True}, dynamic=True)
    inputs = [tokens(1, 2 + i, seed=i) for i in range(6)]
    with torch.no_grad():
        wanted = [model(ids, use_cache=False).logits for ids in inputs]
        compiled(inputs[0], use_cache=False)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    got = compiled(inputs[i], use_cache=False).logits
                    torch.testing.assert_close(got, wanted[i], rtol=1e-4, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.slow
def test_fork_after_compile():
    """A child calls, with one thread or all, and compiles anew; `test_forks` has more."""
    code = """
import os, torch
model = torch.nn.Linear(48, 40).eval()
x = torch.randn(2, 48)
with torch.no_grad():
    compiled = torch.compile(model, backend="gaws", options={"strict": True})
    want = model(x)
    torch.testing.assert_close(compiled(x), want)
    child = os.fork()
    if child == 0:
        torch.testing.assert_close(compiled(x), want)
        torch.set_num_threads(1)
        torch.testing.assert_close(compiled(x), want)
        other = torch.nn.Linear(48, 41).eval()  # compiled in the child: the build pool is made anew
        torch.testing.assert_close(torch.compile(other, backend="gaws", options={"strict": True})(x), other(x))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    torch.testing.assert_close(compiled(x), want)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_one_model_compiled_with_different_options():
    model, x = Pair().eval(), torch.randn(1, 3, 32)
    with torch.no_grad():
        want = model(x)
        for options in ({"strict": True}, {"strict": True, "verify": True}, {"strict": True, "max_fusion_size": 1}):
            compiled = torch.compile(model, backend="gaws", options=options)
            torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
