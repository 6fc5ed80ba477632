"""`AdapterBank`: many adapters of one model (LoRA, DoRA, GAWS, LoKr), resident, switched, mixed and scaled without
compiling anew.

    bank = gawscompile.AdapterBank(model, memory="2GB")
    bank.load("legal", "adapters/legal")
    model = gawscompile.compile(model)
    bank.activate("legal")         # or None, {"legal": 0.7, "terse": 0.3}, or a list with one of these for each row

What a compiled graph reads of a bank are three tensors: the pool with all factors, the number of the bank, and a
snapshot that each forward takes of what is active. So a switch is a change of what the next snapshot says. Whoever runs
a forward sees one state of the bank from its first projection to its last.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn

from gawscompile.banks import layouts, listing, schedules
from gawscompile.banks.kronecker import LONGEST, Chain
from gawscompile.banks.layer import Shared
from gawscompile.banks.listing import Info
from gawscompile.banks.models import active_of, adapters_of, attach, linears
from gawscompile.banks.opening import BankError
from gawscompile.banks.reading import sizes_of
from gawscompile.banks.residents import Held, Residents, bytes_of, device_of, forget
from gawscompile.banks.saving import write
from gawscompile.banks.schedules import Rows
from gawscompile.banks.sharding import splits
from gawscompile.banks.tables import Table
from gawscompile.ir.banked import BLOCK, FIELDS, UNIT, between
from gawscompile.ir.types import DTYPE_NAMES
from gawscompile.planning import devices
from gawscompile.planning.targets import CPP, target_of
from gawscompile.runtime.banked import SOURCES, Source, publish, retract, switch, taken

__all__ = ["AdapterBank", "BankError", "Info"]

Choice = str | None | Mapping[str, float]
"""Of one row: an adapter's name, none, or several with their weights."""


class AdapterBank(Source):
    """LoRA, DoRA and Kronecker adapters beside the linears of `model`, which is changed in place and remains the one to
    call, compile and generate with.

    `model`: a base model, or a PeftModel, whose adapters the bank takes over (its ``set_adapter``,
    ``load_adapter``, ``delete_adapter`` and ``disable_adapter`` speak to the bank then).
    `memory`: bytes of the pool, or "64MB", "2GB". On a CPU, what no adapter has used yet costs nothing.
    `modules`: "all-linear" (all but the output layer), or names or ends of names, as PEFT's ``target_modules``.
    `dtype`: of the factors in the pool; by default that of a PeftModel's factors, else the model's.
    `max_mix`: adapters that one row can mix. `max_adapters`: resident ones, if that is to be limited too.
    `max_modes`: mode products of each of them, for LoKr, which has two to four: a row has place for
    ``max_mix * max_modes``. All others count as one. No less than the PeftModel's adapters have. On a GPU, kernels
    compute Kronecker adapters only if it is given, or the PeftModel has some: 1 for GAWS and GAWS-D, 2 to 4 for LoKr.
    On a GPU, `max_ranks`: ranks of all adapters of one row together, in blocks of 16, and a mode product counts as a
    block; `max_rows`: rows that can have adapters of their own.

    When the pool is full, the adapters that were not used for longest leave it, but for pinned and active ones. They
    are read again, from where they came, when they are needed. Methods may be called by any thread.

    Raises `BankError` (a `ValueError`) for what it cannot take, before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: int | str = "1GB",
        modules: str | Sequence[str] = "all-linear",
        dtype: torch.dtype | None = None,
        max_mix: int = 4,
        max_adapters: int | None = None,
        max_modes: int | None = None,
        max_ranks: int = 256,
        max_rows: int = 64,
    ) -> None:
        peft: Any = model if hasattr(model, "get_base_model") else None
        if peft is None and hasattr(model, "peft_config"):
            raise BankError("the model has adapters that no PeftModel holds: give the PeftModel, or remove them first")
        given = adapters_of(peft) if peft is not None else {}
        inner: nn.Module = model if peft is None else peft.get_base_model()
        bases, left = linears(inner, modules)
        split = splits(inner, bases)
        if given and split:
            raise BankError("the PeftModel's adapters are sharded over ranks: give its base model, and load folders")
        for name, adapter in given.items():
            if missing := sorted(adapter.factors.keys() - bases.keys()):
                raise BankError(f"adapter {name!r} adapts {missing[0]}, which modules={modules!r} leaves out")
        theirs = [factors for adapter in given.values() for factors in adapter.factors.values()]
        dtypes = {factors.dtype for factors in theirs}
        weight: Any = next(iter(bases.values())).weight
        dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else weight.dtype)
        if dtype not in DTYPE_NAMES:
            raise BankError(f"dtype={dtype}: factors of a bank are of {', '.join(map(str, DTYPE_NAMES))}")
        limits = {"max_mix": max_mix, "max_adapters": max_adapters, "max_modes": max_modes}
        limits |= {"max_ranks": max_ranks, "max_rows": max_rows}
        for limit, value in limits.items():
            if value is not None and value < 1:
                raise BankError(f"{limit}={value}: it counts from 1 on")
        if max_modes is not None and max_modes > LONGEST:
            raise BankError(f"max_modes={max_modes}: no adapter has more than {LONGEST}")
        size = bytes_of(memory) // dtype.itemsize
        if size < UNIT:
            raise BankError(f"memory={memory!r} holds no adapter")
        self.model, self.modules, self.max_mix, self.left_out = model, tuple(bases), max_mix, left
        known = tuple(name for name, _ in inner.named_modules())
        base = getattr(getattr(inner, "config", None), "_name_or_path", None) or None
        device = device_of(bases)
        on_gpu = target_of(devices.of(device.type)) is not CPP
        longest = max([max_modes or 1, *(layouts.count(factors, False) for factors in theirs)])
        modes = max([max_modes or 0, *(len(chain.modes) for chain in theirs if isinstance(chain, Chain))])
        self._width = -(-max_ranks // BLOCK) if on_gpu else max_mix * longest  # entries of a row
        self._between = np.array([between(modes, k, n) for n, k in map(sizes_of, bases.values())])
        self._all = Residents(
            *(bases, known, base, size, dtype, max_adapters, self._width, modes if on_gpu else None),
            *(self._active, self._changed, self._became, split),
        )
        self._lock = self._all.lock
        self._table = Table((len(bases), max_rows + 1, self._width, FIELDS), device) if on_gpu else None
        self._rows: dict[object, Rows] = {None: ((),)}  # what is active: for all threads, and for single ones
        self._made: dict[Any, Any] = {}  # schedules of the present state, where forwards read them
        self._here: ContextVar[object] = ContextVar("adapters", default=None)  # a key of `_rows`
        self._fetching: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._number = secrets.randbits(62)  # no other process has a bank of this number
        for name, adapter in given.items():
            self._all.put(name, adapter, None)
        active = [name for name in active_of(peft) if name in given] if peft is not None else []
        self.activate(dict.fromkeys(active, 1.0) if active else None)
        state = torch.tensor([self._number]) if self._table is None else self._table.tensor
        self.shared = Shared(self._all.pool, state, len(bases), self._width, modes if on_gpu else 0)
        SOURCES[self._number if self._table is None else state.data_ptr()] = self
        finalize(self, retract, self._number).atexit = False
        attach(self, model, inner, bases, self.shared, split)

    # ---- adapters -----------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        source: Any,
        *,
        config: Any = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
        pinned: bool = False,
        lazy: bool = False,
    ) -> None:
        """Read an adapter, check all of it, and only then make it known as `name`, in the place of one that may have
        that name.

        `source`: a folder as PEFT saves it, a state dict (with its `config`), or a PeftModel (its adapter
        `adapter_name`, by default the one that is called `name`, or its only one). Forwards may run meanwhile, and
        adapters be switched. With `lazy`, a folder is read when it is first needed, and costs no memory until then.

        Raises `BankError`, naming file and key; the bank is what it was then.
        """
        if not name or not isinstance(name, str):
            raise BankError(f"{name!r}: an adapter's name is a string")
        folder = Path(source).resolve() if isinstance(source, (str, Path)) else None
        if not lazy:
            adapter = self._all.read(source if folder is None else folder, config, adapter_name or name)
            self._all.put(name, adapter, folder, float(scale), pinned)
            with self._lock:  # so that the first forward after a switch to it finds its schedule
                held = self._all.held.get(name)
                if held is not None and held.entries is not None:
                    self._scheduled((((held, 1.0),),), 1)
            return
        if folder is None or not folder.is_dir():
            raise BankError(f"{name}: only a folder can be read later, not {source!r}")
        with self._all.loading:
            self._all.replace(Held(name, folder, scale=float(scale), pinned=pinned))

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises `BankError` for one that is active."""
        with self._all.loading, self._lock:
            held = self._all.of(name)
            if self._active(held):
                raise BankError(f"{name} is active: activate another adapter, or None, before it is unloaded")
            self._all.leave(held)
            forget(held)
            del self._all.held[name]

    def prefetch(self, name: str) -> Future[None]:
        """Begin to bring an adapter into the pool, in the background."""
        with self._lock:
            self._all.of(name)
            if self._fetching is None or self._process != os.getpid():  # a fork has no threads
                self._fetching, self._process = ThreadPoolExecutor(1, "gawscompile-bank"), os.getpid()
        return self._fetching.submit(self._all.bring, [name])

    def pin(self, name: str, pinned: bool = True) -> None:
        """A pinned adapter does not leave the pool."""
        with self._lock:
            self._all.of(name).pinned = pinned

    def scale(self, name: str, scale: float) -> None:
        """Multiply what an adapter adds by `scale`, in place of the factor that it was given before (1.0 at first)."""
        with self._lock:
            self._all.of(name).scale = float(scale)
            self._changed()

    # ---- what is active -----------------------------------------------------------------------------------

    def activate(self, adapters: Choice | Sequence[Choice]) -> None:
        """What forwards that begin from now on use: one adapter, None, several with weights, or a list with one of
        these for each row of the batch.

        A batch of a multiple of rows has each of them for as many rows one after the other (beams). An adapter that
        left the pool comes back first. Raises `BankError`.
        """
        if isinstance(adapters, str):  # the way that servers take between two tokens: as little code as there can be
            with self._lock:
                held = self._all.held.get(adapters)
                if held is not None and held.entries is not None:
                    held.used = time.time()
                    self._rows[None] = (((held, 1.0),),)
                    self._changed(switched=True)
                    return
        self._choose(adapters, None)

    @contextlib.contextmanager
    def activated(self, adapters: Choice | Sequence[Choice]) -> Iterator[None]:
        """Within, forwards of this thread (or task) use `adapters`, whatever is activated for all meanwhile."""
        before, mine = self._here.get(), object()
        self._choose(adapters, mine)
        self._here.set(mine)
        try:
            yield
        finally:
            if self._here.get() is mine:
                self._here.set(before)
            with self._lock:
                del self._rows[mine]
                self._changed()

    def _choose(self, adapters: Choice | Sequence[Choice], key: object) -> None:
        """Have `adapters` in the pool, and make them active."""
        single = adapters is None or isinstance(adapters, (str, Mapping))
        choices = [cast(Choice, adapters)] if single else list(cast("Sequence[Choice]", adapters))
        if not choices:
            raise BankError("a list of adapters has one for each row, and this one is empty")
        if self._table is not None and key is None:
            self._table.check(len(choices))
        parts = [_parts(choice) for choice in choices]
        for choice, part in zip(choices, parts, strict=True):
            if len(part) > self.max_mix:
                raise BankError(f"{choice}: a row mixes up to {self.max_mix} adapters (AdapterBank(max_mix=…))")
        names = list(dict.fromkeys(name for part in parts for name, _ in part))

        def resident() -> bool:
            with self._lock:
                held = {name: self._all.of(name) for name in names}
                if any(one.entries is None for one in held.values()):
                    return False
                rows = tuple(tuple((held[name], weight) for name, weight in part) for part in parts)
                self._check(rows)
                for one in held.values():
                    one.used = time.time()
                self._rows[key] = rows
                self._changed(switched=key is None)
                return True

        if resident():  # nobody who loads is waited for
            return
        with self._all.loading:  # none leaves again before all are active
            self._all.bring(names)
            if not resident():
                raise RuntimeError(f"{names} were brought and are not there: a fault of gawscompile")

    def _active(self, held: Held) -> bool:
        return any(one is held for rows in self._rows.values() for row in rows for one, _ in row)

    def _became(self, before: Held, held: Held) -> None:
        changed = {
            key: tuple(tuple((held if one is before else one, weight) for one, weight in row) for row in rows)
            for key, rows in self._rows.items()
        }
        for rows in changed.values():
            self._check(rows)
        self._rows.update(changed)

    def _check(self, rows: Rows) -> None:
        """Raises `BankError` where a row's adapters have more entries than a schedule has places for."""
        on_gpu = self._table is not None
        for row in rows:
            entries = schedules.most(row, on_gpu)
            who = " and ".join(held.name for held, _ in row)
            if entries > self._width:
                raise layouts.no_place(who, entries, self._width, on_gpu)
            if on_gpu and row and (schedules.passed_on(row) > self._between).any():
                remedy = "AdapterBank(max_modes=…)" if self._all.modes < LONGEST else "mix fewer of them"
                raise BankError(f"{who}: their modes pass on more numbers than a row has place for: {remedy}")

    def _changed(self, switched: bool = False) -> None:
        """Forget the schedules that were made. `switched`: only what is active for all threads has changed, and
        compiled graphs keep those of single adapters. The caller holds the lock."""
        self._made.clear()
        active = schedules.number_of(self._rows[None])
        if self._table is None and switched and active and len(self._rows) == 1:
            switch(self._number, active)
        elif self._table is None:
            retract(self._number)
        else:
            chosen = self._rows[None]
            self._table.write(self._scheduled(chosen, len(chosen)))

    # ---- what forwards read -------------------------------------------------------------------------------

    def snapshot(self, rows: int) -> Tensor:
        """The schedule of all modules for a batch of `rows` (`ir.banked`), as the bank is now."""
        with self._lock:
            here = self._here.get()
            chosen = self._rows.get(here, self._rows[None])
            if rows % len(chosen):
                raise BankError(
                    f"the bank has adapters for {len(chosen)} rows, and the batch has {rows}: activate one for each row"
                )
            if self._table is not None:
                own = here is not None and here in self._rows
                found = self._table.own(self._scheduled(chosen, rows)) if own else taken(self._table.tensor, rows)
                self._all.arena.read_by(found.untyped_storage())  # which views of it keep, too
                return found
            made = self._made.get((chosen, rows))
            if made is None:
                made = self._made[chosen, rows] = self._scheduled(chosen, rows)
                self._all.arena.read_by(made)
            if len(self._rows) == 1:  # where threads have something for themselves, Python must look who asks
                publish(self._number, rows, torch.from_numpy(made), schedules.number_of(chosen))
            copied = made.copy()  # whoever gets it may write to it
            self._all.arena.read_by(copied)
        return torch.from_numpy(copied)

    def _scheduled(self, chosen: Rows, rows: int) -> np.ndarray:
        """The same for what is `chosen`; of one adapter for one row from what was made of it before."""
        if rows > 1 or len(chosen[0]) != 1:
            return self._schedule(chosen, rows)
        ((held, weight),) = chosen[0]
        key = weight * held.scale
        if key not in held.schedules:
            held.schedules = {key: self._schedule(chosen, rows)}
        return held.schedules[key].copy()  # of this time, for the arena

    def _schedule(self, chosen: Rows, rows: int) -> np.ndarray:
        return schedules.made(chosen, rows, len(self.modules), self._width, compact=self._table is not None)

    # ---- what it has --------------------------------------------------------------------------------------

    def save(self, name: str, folder: str | Path) -> None:
        """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

        Its factors have the pool's dtype; what `scale` was given is not in them. B of DoRA and G of GAWS with a diag
        have been multiplied and are divided again, which rounds them once more. Raises `BankError` for biases that
        PEFT's files cannot say apart, and where the model is sharded, as each rank has a part.
        """
        if self._all.split:
            raise BankError(f"{name}: each rank has a part of it; save it from a model that is not sharded")
        with self._all.loading:
            self._all.bring([name])
            held = self._all.of(name)
            write(name, self._all.factors(held), held.config, self._all.bases, Path(folder))

    def info(self, name: str) -> Info:
        """What the bank knows of an adapter. One that is read later has no rank and no targets yet."""
        with self._lock:
            held = self._all.of(name)
            resident = held.entries is not None
            return Info(
                name,
                rank=max(held.ranks.values(), default=0),
                bytes=held.taken * self._all.dtype.itemsize if resident else 0,
                targets=tuple(held.ranks),
                scale=held.scale,
                resident=resident,
                pinned=held.pinned,
                active=self._active(held),
                used=held.used,
            )

    def notes(self) -> list[str]:
        """What `gawscompile.explain` says of the bank."""
        return listing.notes(self)

    def __iter__(self) -> Iterator[Info]:
        """Of all adapters, in the order in which they came."""
        return iter([self.info(name) for name in list(self._all.held)])

    def __len__(self) -> int:
        return len(self._all.held)

    def __contains__(self, name: object) -> bool:
        return name in self._all.held


def _parts(choice: Choice) -> list[tuple[str, float]]:
    if choice is None:
        return []
    if isinstance(choice, str):
        return [(choice, 1.0)]
    return [(name, float(weight)) for name, weight in choice.items()]
