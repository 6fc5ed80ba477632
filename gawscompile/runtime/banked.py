"""The ops of adapter banks.

    gaws::schedule(Tensor state, SymInt rows, int modules, int width) -> Tensor
    gaws::snapshot(Tensor state, SymInt rows, int modules, int width) -> Tensor
    gaws::banked(Tensor x, Tensor pool, Tensor schedule, Tensor base, Tensor? bias, int modes=0) -> Tensor

``schedule`` takes a snapshot of what a bank is to add in one forward: ``[modules, rows + 1, width, FIELDS]`` of int32
(`ir.banked`), for a batch of `rows`. `state` holds the number of the bank, or is its table on a GPU. A forward takes
one snapshot and reads no other, so whatever is switched meanwhile, its rows see one state of the bank. ``snapshot``
is the same in C++ (`banks.cpp`), which `passes.join_banks` puts in its place: a bank publishes what it has made for
it.

``banked`` is what a module's adapters add to its `base`, which is ``W x + bias``: x ``[..., k]`` and base ``[..., n]``
→ ``[..., n]`` of x's dtype, by the module's part of the snapshot, ``[rows + 1, width, FIELDS]``. `modes` is the length
of the longest chain of mode products that a GPU's kernel takes. `passes.join_banks` joins it with the projection whose
adapters it brings. Where nobody compiles, it runs in plain torch. It has gradients by x, base and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

from gawscompile.ir import banked
from gawscompile.runtime import ops


class Source:
    """What a bank gives a snapshot by: the schedule of all modules for a batch of so many rows. Raises `ValueError`
    where the bank has other adapters than for so many rows."""

    snapshot: Callable[[int], torch.Tensor]


SOURCES: WeakValueDictionary[int, Source] = WeakValueDictionary()
"""The banks of this process by their numbers; those of models on a GPU by where their tables are."""

# What it returns changes with the bank: nobody may compute it once for all calls.
ops.LIBRARY.define(
    "schedule(Tensor state, SymInt rows, int modules, int width) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
ops.LIBRARY.define(
    "snapshot(Tensor state, SymInt rows, int modules, int width) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
ops.LIBRARY.define("publish(Tensor made, int bank, int rows, int active) -> ()")
ops.LIBRARY.define(
    "banked(Tensor x, Tensor pool, Tensor schedule, Tensor base, Tensor? bias, int modes=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
SCHEDULE, BANKED = torch.ops.gaws.schedule.default, torch.ops.gaws.banked.default
SNAPSHOT = torch.ops.gaws.snapshot.default


_library: list[Any] = []
"""Ours, once something was published."""


def publish(bank: int, rows: int, made: torch.Tensor, active: int) -> None:
    """Compiled graphs take `made` for the schedule of a batch of `rows` while what is active has the number `active`,
    until it is retracted."""
    if ops.ensure_loaded.cache_info().currsize:
        torch.ops.gaws.publish(made, bank, rows, active)
        _library[:] = [ops.ensure_loaded()]


def retract(bank: int) -> None:
    """Something of a bank has changed: what it published is no longer so."""
    if _library:
        _library[0].gaws_retract(bank)


def switch(bank: int, active: int) -> None:
    """Only what is active has changed. It has the number `active`, and what was published for it holds again."""
    if _library:
        _library[0].gaws_switch(bank, active)


def _schedule(state: torch.Tensor, rows: int, modules: int, width: int) -> torch.Tensor:
    if state.dim() > 1:
        return _of_table(state, rows)
    source = SOURCES.get(int(state[0]))
    if source is None:
        raise RuntimeError("the adapter bank of this model is gone: keep a reference to it, or compile the model anew")
    made = source.snapshot(rows)
    if made.shape != (modules, rows + 1, width, banked.FIELDS):
        raise RuntimeError(f"the graph was compiled for another bank than the one of this model: {tuple(made.shape)}")
    return made


def _of_table(table: torch.Tensor, rows: int) -> torch.Tensor:
    """On a GPU. A CUDA graph that is being captured takes from the table itself, so replays see what is active then."""
    source = SOURCES.get(table.data_ptr())
    if source is None or (table.is_cuda and torch.cuda.is_current_stream_capturing()):
        return taken(table, rows)
    return source.snapshot(rows)


def taken(table: torch.Tensor, rows: int) -> torch.Tensor:
    """What a table says for a batch of `rows`, by operations of its device alone: each chosen row's entries for as many
    rows one after the other."""
    chosen = table[0, 0, 0, 0]
    torch._assert_async(rows % chosen == 0, "the bank has adapters for another number of rows than the batch")
    each = rows // chosen
    index = torch.arange(rows, device=table.device) // each + 1
    made = table.index_select(1, torch.cat([index.new_zeros(1), index]))
    made[:, 0, 0, 0] = rows
    made[:, 1:, :, 6] *= each
    return made


def _banked(
    x: torch.Tensor,
    pool: torch.Tensor,
    schedule: torch.Tensor,
    base: torch.Tensor,
    bias: torch.Tensor | None,
    modes: int = 0,
) -> torch.Tensor:
    return banked.apply(x, pool, schedule, base, bias).to(x.dtype)


def _fake_schedule(state: torch.Tensor, rows: int, modules: int, width: int) -> torch.Tensor:
    return state.new_empty((modules, rows + 1, width, banked.FIELDS), dtype=torch.int32)


def _fake_banked(
    x: torch.Tensor, pool: torch.Tensor, schedule: torch.Tensor, base: torch.Tensor, *rest: Any
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], base.shape[-1]))


def _kept(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pool, schedule, base, bias, _ = inputs
    ctx.save_for_backward(pool, schedule)
    ctx.linear = [(one.shape, one.dtype) for one in (x, base, bias) if one is not None]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pool, schedule = ctx.saved_tensors
    with torch.enable_grad():  # the map is linear: its gradients are the same everywhere
        zeros = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape, dtype in ctx.linear]
        made = banked.apply(zeros[0], pool, schedule, *zeros[1:]) + 0 * zeros[0].sum()  # also where nothing is active
        found = torch.autograd.grad(made, zeros, gradient.to(made.dtype), materialize_grads=True)
    x, base, *bias = found
    return x, None, None, base, bias[0] if bias else None, None


torch.library.register_fake("gaws::schedule", _fake_schedule, lib=ops.LIBRARY)
torch.library.register_fake("gaws::snapshot", _fake_schedule, lib=ops.LIBRARY)
torch.library.register_fake("gaws::banked", _fake_banked, lib=ops.LIBRARY)
torch.library.register_autograd("gaws::banked", _backward, setup_context=_kept, lib=ops.LIBRARY)
for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("schedule", _schedule, _key)
    ops.LIBRARY.impl("banked", _banked, _key)
