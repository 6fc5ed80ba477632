"""Weights on huge pages: decoding reads every weight once a token, and with pages of 4 KiB a good part of that time is
spent finding them (a miss of the TLB each, twice as dear inside a virtual machine).

Linux can put memory that is in use on pages of 2 MiB: addresses, numbers and what a process has in all stay as they
are (``madvise(MADV_COLLAPSE)``, Linux 6.1; `man 2 madvise`). It is done to blocks that hold weights of a compiled
graph and of which every page is there already, is anonymous and is this process's alone, so nothing grows: memory that
processes share after a fork, mapped files and holes are left as they are. ``options={"huge_pages": False}`` or
``GAWS_HUGE_PAGES=0`` turns it off; so does the machine's own setting ``never``.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

log = logging.getLogger("gawscompile")

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
PRESENT, FILE, EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
"""Bits of an entry of ``/proc/self/pagemap`` (Documentation/admin-guide/mm/pagemap.rst)."""


@dataclass
class Outcome:
    """What became of weights: bytes of them in all, bytes now on huge pages, and why not more, if that is known."""

    asked: int = 0
    huge: int = 0
    why: str = ""

    def __str__(self) -> str:
        text = f"{self.huge / 2**20:.0f} of {self.asked / 2**20:.0f} MiB of weights are on huge pages"
        return f"{text} ({self.why})" if self.why else text


def enlarge(tensors: Iterable[torch.Tensor]) -> Outcome:
    """Put the memory of `tensors` (on the CPU; others are passed over) on huge pages as far as that costs nothing."""
    spans = _spans(tensors)
    outcome = Outcome(sum(end - start for start, end in spans), why=_unavailable())
    if outcome.why:
        return outcome
    size = _page_size()
    inside = _inside(spans, size)
    ours = [start for start in inside if _ours(start, size)]
    if len(ours) < len(inside):
        outcome.why = "the rest is mapped from files (gawscompile.own_memory), shared or untouched"
    for first, last in _runs(ours, size):
        blocks = range(first, last, size)
        whole = _madvise(first, last - first)
        # a run fails as a whole where one block of it is refused: then each block is asked for
        for block in blocks:
            if whole or _madvise(block, size):
                outcome.huge += inside[block]
            else:
                outcome.why = f"the system refused: {os.strerror(ctypes.get_errno())}"
    return outcome


def own_memory(model: torch.nn.Module) -> int:
    """Copy what `model` still maps from checkpoint files into memory of its own; returns the bytes copied.

    Safetensors map weights whose dtype is the file's, and such memory is never on huge pages. Parameters and buffers
    stay the same objects, and what shared memory still does. The process grows by nothing, as what was mapped counted
    too; but several processes that serve one file share it only while it is mapped.
    """
    copies: dict[int, torch.UntypedStorage] = {}
    mapped = _mapped()
    for tensor in (*model.parameters(), *model.buffers()):
        address = tensor.untyped_storage().data_ptr() if tensor.device.type == "cpu" else 0
        if address not in copies and any(start <= address < end for start, end in mapped):
            copies[address] = tensor.untyped_storage().clone()
        if address in copies:
            like = (tensor.storage_offset(), tensor.size(), tensor.stride())
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(copies[address], *like)
    return sum(copy.nbytes() for copy in copies.values())


def _mapped() -> list[tuple[int, int]]:
    """Where files lie in this process's memory."""
    found = []
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, inode, *_ = line.split()
            if inode != "0":
                start, end = span.split("-")
                found.append((int(start, 16), int(end, 16)))
    return found


OUTCOMES: list[Outcome] = []
"""Of every compile in this process whose weights fill a huge page, for `explain`."""


@contextlib.contextmanager
def beside(tensors: list[torch.Tensor]) -> Iterator[None]:
    """`enlarge` in a thread while the block runs: the system call leaves Python's lock alone."""

    def run() -> None:
        try:
            outcome = enlarge(tensors)
        except Exception as error:  # an odd /proc, say: nothing depends on it
            outcome = Outcome(why=f"{type(error).__name__}: {error}")
        if outcome.why or outcome.huge:
            OUTCOMES.append(outcome)
            log.info("gaws: %s", outcome)

    thread = threading.Thread(target=run, name="gaws-pages", daemon=True)
    if tensors:
        thread.start()
    try:
        yield
    finally:
        if tensors:
            thread.join()


def _unavailable() -> str:
    if not sys.platform.startswith("linux"):
        return "only Linux is asked for them"
    try:
        setting = (SETTINGS / "enabled").read_text()
    except OSError:
        return "this kernel has none"
    return "the machine's setting is 'never'" if "[never]" in setting else ""


def _page_size() -> int:
    return int((SETTINGS / "hpage_pmd_size").read_text())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor`, or the tensors that one of another library wraps: a quantised weight's codes and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _spans(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """The tensors' storages as (start, end), in order, none counted twice."""
    found = set()
    for tensor in itertools.chain.from_iterable(map(_parts, tensors)):
        known = type(tensor) is torch.Tensor or isinstance(tensor, torch.nn.Parameter)  # bitsandbytes' are such
        if known and not is_fake(tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return sorted(span for span in found if span[0] < span[1] and span[0] not in _AS_WRITTEN)


def _inside(spans: list[tuple[int, int]], size: int) -> dict[int, int]:
    """The blocks of `size` that hold more weights than anything else, with how many bytes."""
    held: dict[int, int] = {}
    for start, end in spans:
        for block in range(start // size * size, end, size):
            held[block] = held.get(block, 0) + min(end, block + size) - max(start, block)
    return {block: held[block] for block in sorted(held) if 2 * held[block] > size}


def _ours(block: int, size: int) -> bool:
    """Every page of a block is in memory, anonymous, and no other process's."""
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(block // page * 8)
        entries = pagemap.read(size // page * 8)
    want = PRESENT | EXCLUSIVE
    return len(entries) == size // page * 8 and all(
        entry & (want | FILE) == want for entry in memoryview(entries).cast("Q")
    )


def _runs(blocks: list[int], size: int) -> list[tuple[int, int]]:
    """Neighbours among `blocks` as (start, end)."""
    runs = itertools.groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0] * size)
    found = ([block for _, block in group] for _, group in runs)
    return [(run[0], run[-1] + size) for run in found]


_AS_WRITTEN: set[int] = set()
"""Where memory begins that comes on huge pages by itself."""


def untouched(tensor: torch.Tensor) -> None:
    """Have memory that nobody has written to yet come on huge pages as it is written. `enlarge` passes over it."""
    begin = tensor.data_ptr()
    _AS_WRITTEN.add(begin)
    weakref.finalize(tensor, _AS_WRITTEN.discard, begin)
    why = _unavailable()
    try:
        size = 0 if why else _page_size()
        first, last = (-(-begin // size) * size, (begin + tensor.nbytes) // size * size) if size else (0, 0)
        if first < last and not _madvise(first, last - first, MADV_HUGEPAGE):
            why = f"the system refused: {os.strerror(ctypes.get_errno())}"
    except (OSError, ValueError) as error:  # an odd /sys
        why = f"{type(error).__name__}: {error}"
    if why:
        log.info("gaws: a bank's pool stays on small pages: %s", why)


def _madvise(start: int, length: int, advice: int = MADV_COLLAPSE) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(libc.madvise(start, length, advice) == 0)
