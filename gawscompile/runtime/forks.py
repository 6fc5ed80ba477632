"""What a forked child finds: of all threads it has the one that forked, but every lock and pool as it was.

Python's forks (``os.fork``, `multiprocessing`) run what is registered here, once the backend is loaded:

- Our locks are held while a process forks, so that no other thread is in the middle of what they protect
  (`held_across`). `runtime/dispatch.cpp` does the same for its own.
- GNU's OpenMP keeps a pool of threads for every thread that ran a parallel region, and a child would wait for those
  threads for ever. So the forking thread ends its pool first (OpenMP 5.0's ``omp_pause_resource_all``). The next
  parallel region makes a new one, in the parent and in the child. Eager torch gains by it too.
- Inductor builds C++ kernels on a pool of threads, and torch 2.13 does not make that anew in a child. Where the parent
  had built a kernel, the first kernel that a child needs waits for a thread that is gone. A child may well need one:
  after ``torch.set_num_threads`` Dynamo compiles again.

One limit stays. Dynamo holds a lock while it compiles: where another thread compiles during the fork, the child can run
what was compiled, but would wait for ever where it compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

PAUSE_HARD = 2  # omp_pause_hard: give the threads up


class Lock(Protocol):
    """`threading.Lock` or `threading.RLock`."""

    def acquire(self) -> bool: ...

    def release(self) -> None: ...


def held_across(lock: Lock) -> None:
    """Let nobody but the thread that forks hold `lock` while it does: in the child it is free. For locks that are held
    briefly, and never by a thread that forks."""
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


@functools.cache
def install() -> None:
    """Once in a process: see above."""
    pause = _openmp()
    if pause is not None:
        os.register_at_fork(before=functools.partial(pause, PAUSE_HARD))
    os.register_at_fork(after_in_child=_forget_builders)


def _openmp() -> Callable[[int], Any] | None:
    """OpenMP's function that ends the calling thread's pool; None where the runtime has none, or is not Linux's."""
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(AttributeError, OSError):
        pause: Callable[[int], Any] = ctypes.CDLL(None).omp_pause_resource_all
        return pause
    return None


def _forget_builders() -> None:
    """Inductor's pool of threads; the next kernel to be built makes another."""
    with contextlib.suppress(ImportError, AttributeError):  # another version's business
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.pool.cache_clear()
