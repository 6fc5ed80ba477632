"""Dynamo's guards on a model, checked only once something changed.

Before every call Dynamo checks what it assumed of the model, and PEFT's LoRA adds eight modules per projection to it.
Nearly all of these checks look at attributes of modules: that an ``nn.Linear`` inside an adapter is still one and holds
a parameter of the same shape, that an adapter's scaling is what it was. The backend has them checked only once
something changed, and finds out whether anything did in one call (`unchanged.Unchanged`). Guards on configurations, on
globals (modules, functions, classes) and on other objects, a cache say, are watched so too, each apart. Guards on what
no watch sees (sets, properties, objects with attribute access of their own) are checked before every call.

Nothing is noticed less: parameters that are written to, replaced, or of another dtype or shape by now,
``set_adapter``, ``disable_adapter``, scaling, ``merge_adapter``, adapters added and deleted, hooks, attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._dynamo.guards import make_guard_filter_entry
from torch._dynamo.utils import counters
from torch._guards import Guard, GuardsSet, TracingContext
from torch.utils._ordered_set import OrderedSet

from gawscompile.runtime import bound
from gawscompile.watch import unchanged, watched
from gawscompile.watch.found import Paths
from gawscompile.watch.sources import followable

log = logging.getLogger("gawscompile")


_frames: weakref.WeakSet[TracingContext] = weakref.WeakSet()
"""Frames that are watched: a frame may call the backend several times."""


def watch_frame(watch: bool, bind: bool) -> None:
    """Said by the backend of the frame that this thread compiles: its guards are to be checked only after a change
    (`watch`), and its parameters gathered only then (`bind`, see `runtime.bound`).

    In Dynamo's set copies take the place of the guards. When guards are made, the first copy makes them all: what they
    look at is known then. All stay as they are with gradients, where a parameter's ``requires_grad`` decides what the
    graph computes; where changes cannot be seen (`unchanged.available`); where guards are kept in files
    (``caching_precompile``); and where the user has a ``guard_filter_fn``.
    """
    context, config = TracingContext.try_get(), torch._dynamo.config
    if context in _frames:
        return
    bound.want(False)
    if not watch or context is None:
        return
    if torch.is_grad_enabled() or config.caching_precompile or not config.guard_nn_modules or not unchanged.available():
        return
    guards = [(guard, followable(guard.originating_source)) for guard in context.guards_context.dynamo_guards]
    frame = Frame(guard for guard, follows in guards if follows)
    copied = [frame.copy(guard) if follows else guard for guard, follows in guards]
    context.guards_context.dynamo_guards = GuardsSet(OrderedSet(copied))
    _frames.add(context)
    bound.want(bind)


class Frame:
    """The guards of a frame that a watch can follow."""

    def __init__(self, guards: Iterable[Guard]) -> None:
        self.guards = sorted(guards, key=Guard.sort_key)
        self.builder: weakref.ref[Any] | None = None  # who has made them
        self.creators: dict[Any, Any] = {}  # by what they stand for

    def copy(self, guard: Guard) -> Guard:
        """A copy of `guard`, which may be shared with other frames, that has all guards made together."""
        creator = self._creator(guard.inner_create_fn())
        if isinstance(guard.create_fn, functools.partial):
            creator = functools.partial(creator, **guard.create_fn.keywords)
        return dataclasses.replace(guard, create_fn=creator, _hash=None)

    def _creator(self, inner: Any) -> Any:
        """What stands in the place of Dynamo's `inner`, under the same name."""
        if inner in self.creators:
            return self.creators[inner]

        @functools.wraps(inner)
        def create(builder: Any, copy: Guard, **keywords: Any) -> None:
            if builder.guard_filter_fn is not None:  # it has said of each guard whether it is wanted
                inner(builder, copy, **keywords)
            elif self.builder is None or self.builder() is not builder:
                self.builder = weakref.ref(builder)
                _make(builder, self.guards)

        self.creators[inner] = create
        return create


def _make(builder: Any, ours: Sequence[Guard]) -> None:
    """Make the guards `ours`, many of them as one that is checked in their place.

    Raises `RuntimeError`, naming the tensor, for one whose storage is smaller than its shape needs.
    """
    entries = [make_guard_filter_entry(guard, builder) for guard in ours]
    named = ((entry.orig_guard.originating_source, entry.value) for entry in entries)
    known = watched.Known(named, builder.scope["G"])
    alone = standing_alone(entries, known)
    for entry, stays in zip(entries, alone, strict=True):
        if stays:
            entry.orig_guard.create(builder)
    replaced = [entry for entry, stays in zip(entries, alone, strict=True) if not stays]
    for entry in replaced:
        if isinstance(entry.value, torch.Tensor) and (bytes_ := unchanged.missing(entry.value)):
            raise RuntimeError(
                f"{entry.name}: its storage lacks {bytes_} bytes of what its shape needs; give it memory"
            )
    about: dict[str, list[Guard]] = {what: [] for what in watched.ALL}
    for entry in replaced:
        about[known.about(entry.orig_guard)].append(entry.orig_guard)
    before: list[unchanged.Unchanged] = []
    for what in watched.ALL:
        some = about[what]
        try:
            _install(builder, some, what, known, before)
            counters["gaws"]["watched"] += len(some)
        except Exception as error:  # another Dynamo than we know
            how = f"{type(error).__name__}: {error}"
            log.warning("gaws: all guards on %s stay, and are checked in every call: %s", what, how)
            for guard in some:
                guard.create(builder)


def standing_alone(entries: Sequence[Any], known: watched.Known) -> list[bool]:
    """Of each guard, as Dynamo shows it to a ``guard_filter_fn``, whether it must be checked before every call."""
    return [not known.sees(entry.guard_type, entry.orig_guard, entry.value) for entry in entries]


def _install(
    builder: Any, replaced: list[Guard], what: str, known: watched.Known, before: list[unchanged.Unchanged]
) -> None:
    """One guard in the place of all these, which look at `what`. It is checked after those `before`, and joins them."""
    if not replaced:
        return
    manager = builder.check_fn_manager
    # Dynamo can check in C++ or in Python that two names are one object. Its default, Python, keeps C++ free to skip
    # whole dictionaries in every call. These guards are checked only after a change, and C++ is quicker to make.
    with torch._dynamo.config.patch(use_lamba_guard_for_object_aliasing=False):
        theirs, guards = manager.build_guards(replaced, OrderedSet(), builder.f_code, manager.output_graph, False)
    apart = None
    if mine := theirs.no_tensor_aliasing_names:
        apart = unchanged.Apart(mine, builder.no_tensor_aliasing_names, before, builder.scope)
    sources = [source for guard in replaced for source in known.looks_at(guard)]
    names = builder.scope["G"]
    paths = Paths(sources, names if what == watched.GLOBALS else None)
    said = [f"{len(replaced)} guards on {what} (gaws: checked after a change)"]
    lasting = what != watched.OTHERS
    guard = unchanged.Unchanged(guards.root, paths, names, said, lasting, apart)
    parameters = [one.originating_source for one in replaced if one.create_fn_name() == "TENSOR_MATCH"]
    if what == watched.MODULES:
        bound.tie(guard, {source.name for source in parameters})
    builder.guard_manager.root.add_epilogue_lambda_guard(guard, said, None)
    before.append(guard)
