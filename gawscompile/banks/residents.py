"""The adapters that a bank knows, and those of them whose factors lie in its pool.

When the pool is full, those that were not used for longest leave it. What came from a folder is read from there again;
what did not is written to a temporary folder first.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import nn

from gawscompile.banks import layouts
from gawscompile.banks.arena import Arena, whole
from gawscompile.banks.checkpoints import Adapter, Factors, read
from gawscompile.banks.dora import Scaled
from gawscompile.banks.kronecker import LONGEST, Chain
from gawscompile.banks.opening import BankError
from gawscompile.banks.reading import sizes_of
from gawscompile.banks.sharding import Split, part_of
from gawscompile.banks.spilling import spilled, unspilled
from gawscompile.ir.banked import FIELDS, between
from gawscompile.options import Options
from gawscompile.runtime import pages

WAIT = 30.0
"""Seconds that loading waits for forwards that still read memory which is to be used again."""


def device_of(bases: Mapping[str, nn.Module]) -> torch.device:
    """Where the weights are."""
    weight: Any = next(iter(bases.values())).weight
    device: torch.device = weight.device
    return device


def bytes_of(memory: int | str) -> int:
    """A number of bytes, or as "64MB". Raises `BankError`."""
    if isinstance(memory, int):
        return memory
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B\s*", memory, re.IGNORECASE)
    if match is None:
        raise BankError(f"memory={memory!r}: bytes as a number, or as '64MB' or '2GB'")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


@dataclass(eq=False)
class Held:
    """An adapter that the bank knows. `entries`: each module's in a schedule, ``[modules, parts, FIELDS]``, while it is
    resident."""

    name: str
    source: Path | None = None  # a folder to read it from; None: it is resident, and was never written anywhere
    config: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # by module
    scaled: dict[str, Scaled] = field(default_factory=dict)  # the same, where it is DoRA
    chains: dict[str, Chain] = field(default_factory=dict)  # the same, where it is one: without factors
    sizes: list[int] = field(default_factory=list)  # numbers of each run of the pool: A and B of each module
    scale: float = 1.0
    pinned: bool = False
    used: float = 0.0
    spilled: bool = False
    begins: list[int] = field(default_factory=list)
    entries: np.ndarray | None = None
    schedules: dict[float, np.ndarray] = field(default_factory=dict)  # of it alone for one row, by its factor
    number: int = field(default_factory=itertools.count(1).__next__)

    @property
    def taken(self) -> int:
        """Numbers of the pool that it takes, or would."""
        return sum(map(whole, self.sizes))


class Residents:
    """Adapters of the linears `bases` of a model of the name `base`, whose modules are `known`, in a pool of `size`
    numbers, `most` of them at once. `width`: how many entries a row can have. `modes`: for a GPU, whose entries are
    blocks of ranks (`layouts`), how many mode products a chain can have; None for a CPU. `split`: the linears of which
    this process has a part, and so of their adapters.

    `active` says whether an adapter may not leave, `changed` is told that one came or left; `became` that another
    adapter of the same name stands for one from now on. Two locks: `loading` of reading and of leaving, which may take
    long, and `lock` of all that a forward asks for. The first is taken first.
    """

    def __init__(
        self,
        bases: Mapping[str, nn.Module],
        known: Collection[str],
        base: str | None,
        size: int,
        dtype: torch.dtype,
        most: int | None,
        width: int,
        modes: int | None,
        active: Callable[[Held], bool],
        changed: Callable[[], None],
        became: Callable[[Held, Held], None],
        split: Mapping[str, Split],
    ) -> None:
        self.bases, self.known, self.base, self.dtype, self.most = bases, known, base, dtype, most
        self.modules, self.width, self.split = tuple(bases), width, split
        self.blocks, self.modes = modes is not None, modes or 0
        self.device = device_of(bases)
        self.arena = Arena(size, asynchronous=self.device.type == "cuda")
        with torch.inference_mode(False):  # adapters may be loaded outside of it
            self.pool = torch.empty(self.arena.size, dtype=dtype, device=self.device)
        if not self.blocks and Options.split(None)[0].huge_pages:
            pages.untouched(self.pool)
        self.held: dict[str, Held] = {}
        self.lock, self.loading = threading.RLock(), threading.RLock()
        self._active, self._changed, self._became = active, changed, became
        self._together: frozenset[str] = frozenset()  # names that are brought at once
        self._spill: Path | None = None

    def of(self, name: str) -> Held:
        """Raises `BankError` for a name that the bank does not know."""
        if name not in self.held:
            raise BankError(f"the bank has no adapter {name!r}: it has {', '.join(self.held) or 'none'}")
        return self.held[name]

    # ---- coming ---------------------------------------------------------------------------------------------

    def read(self, source: Any, config: Any, name: str) -> Adapter:
        """Raises `BankError`."""
        whole = read(source, self.bases, config=config, base=self.base, known=self.known, adapter_name=name)
        return part_of(whole, self.split)

    def put(
        self,
        name: str,
        adapter: Adapter,
        source: Path | None,
        scale: float = 1.0,
        pinned: bool = False,
        again: Held | None = None,
    ) -> None:
        """Bring an adapter into the pool, and make it known. Raises `BankError` where there is no room. `again`: what
        it was known as, where it comes back."""
        ranks = {path: factors.rank for path, factors in adapter.factors.items()}
        factors = {path: adapter.factors[path] for path in self.modules if path in adapter.factors}
        self._check(name, factors)
        sizes = [size for f in factors.values() for size in layouts.runs(f, self.blocks)]
        scaled = {p: f.scaled for p, f in factors.items() if isinstance(f, Factors) and f.scaled is not None}
        chains = {p: replace(f, modes=()) for p, f in factors.items() if isinstance(f, Chain)}
        held = Held(name, source, adapter.config, ranks, scaled, chains, sizes, scale, pinned)
        with self.loading:
            held.begins = self._room_for(held)
            try:
                self._fill(held, adapter)
                with self.lock:
                    if again is not None:  # also what was set meanwhile
                        held.scale, held.pinned, held.spilled = again.scale, again.pinned, again.spilled
                    self.replace(held)
            except BaseException:
                with self.lock:
                    self.leave(held)
                raise

    def replace(self, held: Held) -> None:
        """`held` is what its name means from now on, also where that is active. Raises `BankError` if it is to be read
        later and that is active. The caller holds `loading`."""
        with self.lock:
            before = self.held.get(held.name)
            if before is not None:
                held.used = before.used
                if held.entries is None and self._active(before):
                    raise BankError(f"{held.name} is active: it cannot be replaced by one that is read later")
                self._became(before, held)
                self.leave(before)
                if before.source != held.source:
                    forget(before)
            self.held[held.name] = held
            self._changed()

    def bring(self, names: list[str]) -> None:
        """Have adapters in the pool, all at once. Raises `BankError` where there is no room for all."""
        with self.loading:
            self._together = frozenset(names)
            try:
                for name in names:
                    self._bring(name)
            finally:
                self._together = frozenset()

    def _bring(self, name: str) -> None:
        with self.lock:
            held = self.of(name)
            held.used = time.time()
            if held.entries is not None:
                return
        adapter = unspilled(held.source) if held.spilled and held.source else self.read(held.source, None, name)
        self.put(name, adapter, held.source, again=held)

    def _room_for(self, held: Held) -> list[int]:
        """Runs for `held`; others leave the pool for it."""
        if held.taken > self.arena.size:
            need, have = (count * self.dtype.itemsize / 2**20 for count in (held.taken, self.arena.size))
            raise BankError(f"{held.name} takes {need:.1f} MB, and the bank has {have:.1f}: AdapterBank(memory=…)")
        end = time.monotonic() + WAIT
        while True:
            self._settle()
            with self.lock:
                resident = [one for one in self.held.values() if one.entries is not None]
                full = self.most is not None and len(resident) >= self.most
                begins = None if full else self.arena.take(held.sizes)
                if begins is not None:
                    return begins
                resting = self.arena.resting
                enough = not full and self.arena.coming >= held.taken  # once what rests is awake
                stay = [one for one in resident if one.pinned or self._active(one) or one.name in self._together]
                idle = [one for one in resident if one not in stay]
                last = min(idle, key=lambda one: one.used, default=None)
            if last is not None and not (resting and enough):
                self._evict(last)
            elif full or not resting:
                raise BankError(
                    f"no room for {held.name}: {len(resident)} resident adapters are active, pinned or wanted with it. "
                    "Give the bank more memory, or unload one"
                )
            elif time.monotonic() > end:
                raise BankError(f"no room for {held.name}: a forward has read what was unloaded for {WAIT:.0f} s")
            else:
                time.sleep(0.0005)

    def _settle(self) -> None:
        """Where a device reads the pool, wait for what it does with memory that no snapshot is left for. Forwards go on
        meanwhile."""
        if self.device.type == "cuda":
            with self.lock:
                quiet = self.arena.quiet()
            if quiet:
                torch.cuda.synchronize(self.device)
                with self.lock:
                    self.arena.wake(quiet)

    def _check(self, name: str, factors: Mapping[str, Factors | Chain]) -> None:
        """Raises `BankError` for an adapter that no row could have."""
        for path, f in factors.items():
            if self.blocks and isinstance(f, Chain):
                self._check_chain(f"{name}, {path}", f)
            count = layouts.count(f, self.blocks)
            if count > self.width:
                raise layouts.no_place(f"{name}, {path}", count, self.width, self.blocks)

    def _check_chain(self, who: str, chain: Chain) -> None:
        """The same for a Kronecker adapter on a GPU."""
        count = len(chain.modes)
        if count > self.modes:
            limit = f"takes at most {self.modes}" if self.modes else "was made for LoRA and DoRA alone"
            raise BankError(f"{who}: {count} mode product(s), and this bank {limit}: AdapterBank(max_modes={count})")
        place = between(self.modes, chain.modes[0].inputs, chain.modes[-1].outputs)
        large = any(mode.matrix.numel() >= 1 << 31 for mode in chain.modes)
        if large or sum(mode.outputs for mode in chain.modes[:-1]) > place:
            remedy = "AdapterBank(max_modes=…), or " if self.modes < LONGEST and not large else ""
            what = "its modes are larger, or pass on more numbers, than this bank has place for on a GPU"
            raise BankError(f"{who}: {what}: {remedy}serve it on a CPU")

    def _fill(self, held: Held, adapter: Adapter) -> None:
        """Copy the factors into their runs, and write their entries."""
        begins = iter(held.begins)
        found: list[np.ndarray] = []
        for path in self.modules:
            factors, parts = adapter.factors.get(path), np.zeros((0, FIELDS), np.int32)
            try:
                if factors is not None:
                    parts = layouts.fill(self.pool, begins, factors, self.blocks)
            except OverflowError as error:
                dtype = str(self.dtype).removeprefix("torch.")
                what = f"{held.name}: {path} has factors beyond the pool's {dtype}: AdapterBank(dtype=…)"
                raise BankError(what) from error
            found.append(parts)
        entries = np.zeros((len(found), max(1, *map(len, found)), FIELDS), np.int32)
        for mine, filled in zip(entries, found, strict=True):
            mine[: len(filled)] = filled
        if self.device.type == "cuda":  # whoever reads it may do so on another stream
            torch.cuda.current_stream(self.device).synchronize()
        held.entries = entries

    # ---- leaving ----------------------------------------------------------------------------------------------

    def leave(self, held: Held) -> None:
        """What `held` takes of the pool is free again. The caller holds both locks."""
        self.arena.give_back(held.begins, held.sizes[: len(held.begins)])
        held.begins, held.entries, held.schedules = [], None, {}
        self._changed()

    def _evict(self, held: Held) -> None:
        """An adapter leaves the pool; it can be read again."""
        if held.source is None:
            if self._spill is None:
                self._spill = Path(tempfile.mkdtemp(prefix="gawscompile-bank-"))
                finalize(self, _removed, self._spill, os.getpid())
            file = self._spill / f"{id(held)}-{time.monotonic_ns()}"
            spilled(held.config, self.factors(held), file)
            held.source, held.spilled = file, True
        with self.lock:
            if not held.pinned and not self._active(held):  # it may be by now
                self.leave(held)

    def factors(self, held: Held) -> dict[str, Factors | Chain]:
        """Of an adapter that is resident, by module; views of the pool, or copies. The caller holds `loading`."""
        assert held.entries is not None
        found: dict[str, Factors | Chain] = {}
        for index, path in enumerate(self.modules):
            mine = held.entries[index]
            if path in held.chains:
                modes, scale = layouts.modes_in(self.pool, mine)
                found[path] = replace(held.chains[path], modes=modes, scale=scale)
            elif path in held.ranks:
                sizes = sizes_of(self.bases[path])
                sizes = self.split[path].sizes(sizes) if path in self.split else sizes
                a, b, bias = layouts.taken(self.pool, mine, held.ranks[path], sizes, self.blocks)
                scale = float(mine.view(np.float32)[0, 4])
                found[path] = Factors(a, b, scale, bias, held.scaled.get(path))
        return found


def forget(held: Held) -> None:
    """Nobody reads an adapter again: a file of ours goes."""
    if held.spilled and held.source is not None:
        held.source.unlink(missing_ok=True)


def _removed(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not at the end of a fork
        shutil.rmtree(folder, ignore_errors=True)
