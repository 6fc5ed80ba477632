"""Guards that are checked again only once something changed.

Dynamo's guards on the modules and parameters of a model walk through all of it before every call. Most of what they
look at lies in dictionaries (a module's attributes, ``_modules``, ``_parameters``, PEFT's ``scaling``), in lists of
names and in tensors' metadata. CPython gives a dictionary another version whenever it is written to, so "nothing
changed since these guards last held" is a comparison of versions, of lists' items, of objects' classes, and of
metadata, which a tensor changes in place (``p.data = x``, ``module.to(dtype)``). Where something did change, Dynamo's
own guards decide (`Unchanged.__call__`). No guard is lost, and most calls check none.

Where CPython's dictionaries have no such version (`available` tries it out), guards stay as Dynamo made them.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.eval_frame import skip_code
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from gawscompile.runtime import ops
from gawscompile.watch.found import TYPE, VERSION, Found, Paths, Unwatchable, hooks_of, word

log = logging.getLogger("gawscompile")

MOST = 1024  # states that are kept of one graph: one for each model, or layer, that it serves
PATIENCE = 8  # changes in a row


@functools.cache
def available() -> bool:
    """Whether changes can be seen here: CPython with versions of dictionaries, and a C++ compiler."""
    try:
        return sys.implementation.name == "cpython" and _versions_move() and _lists_lie_open() and bool(ops.with_gil())
    except Exception as error:
        log.info("gaws: all guards stay: %s: %s", type(error).__name__, error)
        return False


def _version(dictionary: dict[Any, Any]) -> int:
    return word(id(dictionary) + VERSION)


def _versions_move() -> bool:
    """Whether every way to write to a dictionary moves its version, and reading does not."""

    class Thing:
        pass

    thing = Thing()
    thing.x = 0  # type: ignore[attr-defined]
    writes: list[Callable[[dict[Any, Any], Any], Any]] = [
        lambda d, i: d.__setitem__("x", i),
        lambda d, i: d.update(x=i),
        lambda d, i: d.setdefault(f"new {i}", i),
        lambda d, i: d.pop(f"new {i}", None),
    ]
    for dictionary in ({"x": 0}, vars(thing)):
        for i in range(1, 100):  # so often that the interpreter specialises its instructions
            for write in writes:
                before = _version(dictionary)
                if dictionary.get("x") is None or _version(dictionary) != before:
                    return False
                write(dictionary, i + 0.5)
                if _version(dictionary) == before:
                    return False
    for i in range(1, 100):
        before = _version(vars(thing))
        thing.x = i + 0.5  # type: ignore[attr-defined]
        if _version(vars(thing)) == before:
            return False
    return True


def _lists_lie_open() -> bool:
    """Whether a list is its size and an array of addresses, a tuple its size and addresses, and an object's type is
    where it is expected."""
    items = [object(), "a name", 3.5]
    size, array = word(id(items) + 16), word(id(items) + 24)
    same = tuple(items)
    return (
        size == len(items)
        and [word(id(same) + 16 + 8 * i) for i in range(4)] == [3, *map(id, same)]
        and all(word(array + 8 * i) == id(item) for i, item in enumerate(items))
        and word(id(items) + TYPE) == id(list)
    )


def _slot(tensor: torch.Tensor) -> int:
    """The address at which a Python tensor holds its implementation. Raises `Unwatchable` where that is not known."""
    for offset in (16, 24):  # behind its reference count and type; torch before 2.12 keeps a flag in between
        if word(id(tensor) + offset) == tensor._cdata:
            return id(tensor) + offset
    raise Unwatchable("a tensor whose implementation is not where it is expected")


def missing(tensor: torch.Tensor) -> int:
    """How many bytes a tensor's storage lacks for what its sizes and strides reach."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return 0
    reach = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (reach + 1) * tensor.itemsize if tensor.numel() else 0
    return max(0, int(needed) - tensor.untyped_storage().nbytes())


class State:
    """What was there when the guards of a graph last held for certain variables: models, mostly."""

    def __init__(self, variables: list[Any], found: Found) -> None:
        self.variables = [weakref.ref(variable) for variable in variables]
        self.bound: list[weakref.ref[Any] | None] | None = None
        """What a graph reads of the variables, gathered (`runtime/bound.py`)."""
        self.direct: Any = None
        """How it is called with these, False where it has to be called as Dynamo does."""
        self.misses = 0
        self.hooks = RemovableHandle.next_id if found.modules else None
        self.alone: frozenset[int] = frozenset()
        """By their ids, the tensors of which none may be given twice."""
        self._held = found.held
        slots = [_slot(tensor) for tensor in found.tensors.values()]
        arrays = [
            (ctypes.c_int64(len(addresses)), (ctypes.c_void_p * len(addresses))(*addresses))
            for addresses in (found.words, slots, list(found.lists))
        ]
        behind = (ctypes.c_int64 * len(found.behind))(*found.behind)
        handle = ops.with_gil().gaws_watch(*itertools.chain(*arrays), behind)
        if not handle:
            raise Unwatchable("a tensor whose sizes are no numbers, or that has no storage")
        self.handle = ctypes.c_void_p(handle)
        weakref.finalize(self, ops.with_gil().gaws_unwatch, self.handle)
        self._unchanged = ops.with_gil().gaws_unchanged

    def same(self, variables: list[Any]) -> bool:
        """Whether everything is as it was."""
        if self.hooks not in (None, RemovableHandle.next_id):  # a hook was registered, on whatever module
            return False
        for mine, variable in zip(self.variables, variables, strict=True):
            if mine() is not variable:
                return False
        return bool(self._unchanged(self.handle))


class Apart:
    """Dynamo's guard that no tensor is given twice, for the tensors called `names`, and beside those of the guards
    `before`, and `others`, which Dynamo guards in every call: a list that grows until all guards are made. `scope`: of
    Dynamo's guards."""

    def __init__(self, names: list[str], others: list[str], before: Sequence[Unchanged], scope: dict[str, Any]) -> None:
        self._others = others
        self._before = [one.apart for one in before if one.apart]
        self._found = threading.local()  # `_found.ids`: of the tensors of this thread's last call
        self._globals = scope["G"]
        self._made: dict[int, Any] = {}  # by how many others there were
        self._mine = self._read(names)
        self.holds(scope["L"])  # raises now what a name may raise

    def _read(self, names: list[str]) -> Any:
        known = dict(getattr(torch._dynamo.guards, "_get_closure_vars", dict)())  # what names may call
        made: Any = eval(f"lambda L, G: ({''.join(f'{name}, ' for name in names)})", known)
        skip_code(made.__code__)
        return made

    def _ids(self, scope: dict[str, Any]) -> list[int]:
        """Of the others."""
        count = len(self._others)
        if count not in self._made:
            self._made[count] = self._read(self._others)
        return [id(one) for one in self._made[count](scope, self._globals)]

    def holds(self, scope: dict[str, Any]) -> frozenset[int] | None:
        """The tensors, by their ids, where none is given twice."""
        mine = [id(one) for one in self._mine(scope, self._globals)]
        alone = frozenset(mine)
        return alone if len(alone) == len(mine) and self.holds_beside(alone, scope) else None

    def holds_beside(self, alone: frozenset[int], scope: dict[str, Any]) -> bool:
        """The same for these, of which none is given twice among them. Guards before have said the same of theirs."""
        self._found.ids = alone
        before = all(alone.isdisjoint(one._found.ids) for one in self._before)
        return before and alone.isdisjoint(self._ids(scope))


class Unchanged:
    """A guard that stands for many, `guards`, which look at what `paths` lead to. Where they do not hold, `said`
    becomes what Dynamo says of the one that failed. `names`: the globals. `lasting`: what they look at is not new in
    every call. `apart`: of tensors among it."""

    def __init__(
        self,
        guards: Any,
        paths: Paths,
        names: dict[str, Any],
        said: list[str],
        lasting: bool = True,
        apart: Apart | None = None,
    ) -> None:
        self.guards = guards  # Dynamo's manager of them
        self.said = said
        self.names = names
        self.lasting = lasting
        self.apart = apart
        self.paths = paths
        self.hooked: list[int] | None = None  # how many hooks each of its modules has
        self.states: dict[tuple[int, ...], State] = {}
        self.missed: dict[tuple[int, ...], int] = {}  # how often in a row something had changed
        self.waits: dict[tuple[int, ...], int] = {}  # calls until the next state is made
        self.last = threading.local()  # `last.state`: by which this thread's guards held; see `runtime.bound`

    def __call__(self, scope: Any) -> bool:
        """Whether the guards hold. `scope`: the locals of the call.

        Where something changes in call after call (a module that counts its calls, say) a state is worth less than it
        costs: the guards alone decide then, as they do without us, and a state is tried less and less often.
        """
        try:
            variables = self.paths.variables(scope, self.names)
        except (KeyError, IndexError, TypeError):
            self.said[:] = ["a variable that guards look at is not there"]
            return False
        holds = self._holds(scope, variables)
        if not holds:  # no call follows that takes what a watch has this thread hold
            ops.with_gil().gaws_let_go()
        return holds

    def _holds(self, scope: Any, variables: list[Any]) -> bool:
        key = tuple(map(id, variables))
        counted = key if self.lasting else ()  # a new object in every call would never be missed often
        state = self.states.get(key)
        if (
            state is not None
            and state.same(variables)
            and (self.apart is None or self.apart.holds_beside(state.alone, scope))
        ):
            self.missed.pop(counted, None)
            self.last.state = state
            return True
        self.last.state = None
        self.states.pop(key, None)
        if self._all_hold(scope) is None:
            return False
        if waits := self.waits.get(counted, 0):
            self.waits[counted] = waits - 1
            return True
        missed = self.missed[counted] = self.missed.get(counted, 0) + 1
        if missed > PATIENCE:
            self.waits[counted] = min(2 ** (missed - PATIENCE), MOST)
        try:
            found = self.paths.follow(variables)
            if any(map(missing, found.tensors.values())):
                self.said[:] = ["a parameter's storage is smaller than its shape needs"]
                return False  # no guard of Dynamo's sees it, and memory behind the end would be read
            hooked = [sum(map(len, hooks_of(module))) for module in found.modules]
            if self.hooked is not None and hooked != self.hooked:
                self.said[:] = ["modules have other hooks than when this was compiled"]
                return False  # nor does one see hooks, by torch's default
            self.hooked = hooked
            if len(self.states) >= MOST:
                self._forget()
            state = State(variables, found)
            alone = self._all_hold(scope)
            if alone is None:  # another thread has written in between
                return False
            state.alone = alone
            self.last.state = self.states[key] = state
        except Exception as error:  # right all the same: all the guards are checked in every call
            log.info("gaws: guards are checked in every call: %s: %s", type(error).__name__, error)
        return True

    def _all_hold(self, scope: Any) -> frozenset[int] | None:
        """What may not be given twice, by its id; None where the guards do not hold, each of them checked."""
        if not self.guards.check(scope):
            self.said[:] = self.guards.check_verbose(scope).verbose_code_parts
            return None
        alone = self.apart.holds(scope) if self.apart else frozenset()
        if alone is None:
            self.said[:] = ["a tensor is given twice"]
        return alone

    def _forget(self) -> None:
        """The states of models that are gone; all, where none is."""
        states = list(self.states.items())  # other threads may add some
        alive = {key: state for key, state in states if all(one() is not None for one in state.variables)}
        self.states = alive if len(alive) < MOST else {}
        self.missed, self.waits = {}, {}
