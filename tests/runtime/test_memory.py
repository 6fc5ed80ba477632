"""Memory of what kernels write: kept from tensor to tensor, never of two tensors at once, and bounded."""

from __future__ import annotations

import ctypes
import gc
import resource
import subprocess
import sys
import threading

import pytest
import torch

from gawscompile.runtime import ops

MEGABYTE = 1 << 20
MOST = 128 * MEGABYTE


@pytest.fixture(scope="module", autouse=True)
def loaded():
    ops.ensure_loaded().gaws_release()  # other tests may have trained


def kept() -> int:
    count = ops.ensure_loaded().gaws_kept
    count.restype = ctypes.c_int64
    gc.collect()
    return count()


def filled(value: float, megabytes: float) -> torch.Tensor:
    """What the op writes: every number is `value`."""
    rows = int(megabytes * MEGABYTE) // 4 // 256
    weight = torch.full((256, 1), float(value))
    (y,) = torch.ops.gaws.project(torch.ones(rows, 1), [weight], "gemv_cpp | k=1 x=f32; n=256 w=f32 out=f32")
    return y


def test_a_dead_tensors_memory_is_the_next_ones():
    first = filled(1, 8)
    address = first.data_ptr()
    del first
    second = filled(2, 7)
    assert second.data_ptr() == address
    assert (second == 2).all()


def test_a_small_tensor_leaves_a_large_block():
    first = filled(1, 31)
    address = first.data_ptr()
    del first
    small = [filled(2, megabytes) for megabytes in (2, 5, 14)]
    assert address not in {one.data_ptr() for one in small}
    assert filled(3, 20).data_ptr() == address


def test_a_live_tensors_memory_is_its_own():
    first = filled(1, 8)
    view = first[-1:]
    del first
    others = [filled(2, 8) for _ in range(3)]
    assert (view == 1).all() and all((other == 2).all() for other in others)
    assert len({other.data_ptr() for other in others}) == 3


def test_a_tensor_may_grow_and_leave_its_memory_behind():
    tensor = filled(3, 2)
    tensor.resize_(3 * tensor.shape[0], 256)
    assert (tensor[: tensor.shape[0] // 3] == 3).all()
    tensor.fill_(4)
    assert (filled(1, 2) == 1).all() and (tensor == 4).all()


def test_pages_are_not_zeroed_anew():
    filled(0, 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for value in range(8):
        filled(value, 24)
    pages = 8 * 24 * MEGABYTE // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 4


def test_what_is_kept_is_bounded_and_neither_small_nor_huge():
    alive = [filled(value, 30) for value in range(6)]
    before, small = kept(), filled(0, 0.5)
    del small
    assert kept() == before
    del alive
    assert MOST - 30 * MEGABYTE < kept() <= MOST
    before, huge = kept(), filled(0, 40)
    del huge
    assert kept() == before


def test_many_threads():
    wrong: list[float] = []

    def work(value: float) -> None:
        for size in (2, 3, 5, 2, 4):
            wrong.extend([value] * (not (filled(value, size) == value).all()))

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TRAINING = """
from tests.runtime.test_memory import MEGABYTE, filled, kept, ops
import torch

ops.ensure_loaded()

def backward():
    lent = torch.ops.gaws.lend([torch.ones(1)], 1)
    assert not lent and len(torch.ops.gaws.lend([], 0)) == 1

backward()
large = filled(1, 40)
del large
assert kept() == 40 * MEGABYTE
two = [filled(1, 36), filled(2, 36)]  # the first in the block of 40
assert kept() == 0
del two
assert kept() == 76 * MEGABYTE
larger = filled(1, 100)
assert kept() == 0, "with these there would be more than was in use at once"
del larger
assert kept() == 100 * MEGABYTE
six = filled(1, 6)
del six
several = [filled(1, 100), filled(2, 6), filled(3, 5)]
del several
assert kept() == 111 * MEGABYTE
backward()
few = filled(1, 3)
assert kept() == 106 * MEGABYTE, "the smallest block made room"
del few
backward()
few = filled(1, 3)
assert kept() == 0, "as no step of late needed more"
"""

NO_MORE = """
import resource
from pathlib import Path
from tests.runtime.test_memory import MEGABYTE, filled, kept, ops, torch

ops.ensure_loaded()
torch.ops.gaws.lend([torch.ones(1)], 1), torch.ops.gaws.lend([], 0)
large = filled(1, 300)
del large
assert kept() == 300 * MEGABYTE
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * MEGABYTE,) * 2)
assert filled(2, 400)[-1, -1] == 2
"""


@pytest.mark.slow  # a process with little memory
def test_where_memory_runs_out_what_is_kept_makes_room():
    subprocess.run([sys.executable, "-c", NO_MORE], check=True, timeout=120)


def test_in_training_as_much_is_kept_as_once_was_in_use():
    subprocess.run([sys.executable, "-c", TRAINING], check=True, timeout=120)
