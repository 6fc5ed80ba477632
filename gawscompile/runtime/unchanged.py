"""Guards that are checked again only once something changed.

Dynamo's guards on the modules and parameters of a model walk through all of it before every call. Most of what they
look at lies in dictionaries (a module's attributes, ``_modules``, ``_parameters``) and in tensors' metadata. CPython
gives a dictionary another version whenever it is written to, so "nothing changed since these guards last held" is a
comparison of versions, and of metadata, which a tensor changes in place (``p.data = x``, ``module.to(dtype)``). Where
something did change, Dynamo's own guards decide (`Unchanged.__call__`). No guard is lost, and most calls check none.

Where CPython's dictionaries have no such version (`available` tries it out), guards stay as Dynamo made them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from gawscompile.runtime import ops

log = logging.getLogger("gawscompile")

VERSION = 24  # where a dictionary keeps its version: after its reference count, type and number of items
MOST = 64  # states that are kept of one graph: one for each model, or layer, that it serves


class Unwatchable(Exception):
    """A guard looks at what this file cannot follow: the message says at what."""


@functools.cache
def available() -> bool:
    """Whether changes can be seen here: CPython with versions of dictionaries, and a C++ compiler."""
    try:
        return sys.implementation.name == "cpython" and _versions_move() and bool(_library())
    except Exception as error:
        log.info("gaws: all guards stay: %s: %s", type(error).__name__, error)
        return False


@functools.cache
def _library() -> ctypes.PyDLL:
    """The op's library, called with the GIL held."""
    library = ctypes.PyDLL(ops.ensure_loaded()._name)
    library.gaws_watch.restype = ctypes.c_void_p
    return library


def _version(dictionary: dict[Any, Any]) -> int:
    return ctypes.c_uint64.from_address(id(dictionary) + VERSION).value


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


def _slot(tensor: torch.Tensor) -> int:
    """The address at which a Python tensor holds its implementation. Raises `Unwatchable` where that is not known."""
    for offset in (16, 24):  # behind its reference count and type; torch before 2.12 keeps a flag in between
        if ctypes.c_uint64.from_address(id(tensor) + offset).value == tensor._cdata:
            return id(tensor) + offset
    raise Unwatchable("a tensor whose implementation is not where it is expected")


def missing(tensor: torch.Tensor) -> int:
    """How many bytes a tensor's storage lacks for what its sizes and strides reach."""
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return 0
    reach = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (reach + 1) * tensor.itemsize if tensor.numel() else 0
    return max(0, int(needed) - tensor.untyped_storage().nbytes())


def followable(source: Any) -> bool:
    """Whether `Paths` can follow one of Dynamo's sources: a variable, then modules, attributes, dictionaries."""
    while (base := getattr(source, "base", None)) is not None:
        name = type(source).__name__
        if name == "DictGetItemSource":
            if not isinstance(source.index, (str, int)):
                return False
        elif not _is_attribute(source) and not _is_module(source):
            return False
        source = base
    return type(source).__name__ in ("LocalSource", "GlobalSource")


def _is_attribute(source: Any) -> bool:
    return type(source).__name__ in ("AttrSource", "UnspecializedParamBufferSource")


def _is_module(source: Any) -> bool:
    return type(source).__name__.endswith("NNModuleSource")


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: torch.nn.Module) -> list[dict[Any, Any]]:
    """A module's dictionaries of hooks that hold any."""
    return [hooks for name in HOOKS if (hooks := vars(module).get(name))]


class Paths:
    """How one reaches what guards look at: sources, each after the one it is based on."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.steps: dict[Any, Any] = {}  # source → the one before it, None for a variable
        for source in sources:
            chain = [source]
            while (base := getattr(chain[-1], "base", None)) is not None and base not in self.steps:
                chain.append(base)
            for one in reversed(chain):
                self.steps.setdefault(one, getattr(one, "base", None))
        self.roots = [source for source, base in self.steps.items() if base is None]

    def variables(self, scope: dict[str, Any], names: dict[str, Any]) -> list[Any]:
        """What the roots are: locals of a call, or globals."""
        return [
            scope[root.local_name] if type(root).__name__ == "LocalSource" else names[root.global_name]
            for root in self.roots
        ]

    def follow(self, variables: list[Any]) -> tuple[list[dict[Any, Any]], list[torch.Tensor], list[torch.nn.Module]]:
        """The dictionaries and tensors on the way, in an order in which each is reached, and the modules.

        Raises `Unwatchable`.
        """
        values = dict(zip(self.roots, variables, strict=True))
        modules: dict[int, torch.nn.Module] = {}
        dictionaries: dict[int, dict[Any, Any]] = {}
        tensors: dict[int, torch.Tensor] = {}
        for source, base in self.steps.items():
            if base is None:
                continue
            before = values[base]
            if _is_module(source):
                values[source] = before
                if isinstance(before, torch.nn.Module) and modules.setdefault(id(before), before):
                    dictionaries.update((id(hooks), hooks) for hooks in hooks_of(before))
                continue
            if _is_attribute(source):
                attributes: Any = getattr(before, "__dict__", None)
                if type(attributes) is not dict:
                    raise Unwatchable(f"{source.name}: {type(before).__name__} has no attributes of its own")
                dictionaries.setdefault(id(attributes), attributes)
                values[source] = getattr(before, source.member, None)
            else:
                if not isinstance(before, dict):
                    raise Unwatchable(f"{source.name}: {type(before).__name__} is no dictionary")
                dictionaries.setdefault(id(before), before)
                values[source] = before.get(source.index)
            if isinstance(values[source], torch.Tensor):
                tensors.setdefault(id(values[source]), values[source])
        return list(dictionaries.values()), list(tensors.values()), list(modules.values())


class State:
    """What was there when the guards of a graph last held for certain variables: models, mostly."""

    def __init__(self, variables: list[Any], dictionaries: list[dict[Any, Any]], tensors: list[torch.Tensor]) -> None:
        self.variables = [weakref.ref(variable) for variable in variables]
        self.hooks = RemovableHandle.next_id
        tags = [id(dictionary) + VERSION for dictionary in dictionaries]
        slots = [_slot(tensor) for tensor in tensors]
        handle = _library().gaws_watch(
            ctypes.c_int64(len(tags)),
            (ctypes.c_void_p * len(tags))(*tags),
            ctypes.c_int64(len(slots)),
            (ctypes.c_void_p * len(slots))(*slots),
        )
        if not handle:
            raise Unwatchable("a tensor whose sizes are no numbers, or that has no storage")
        self.handle = ctypes.c_void_p(handle)
        weakref.finalize(self, _library().gaws_unwatch, self.handle)
        self._unchanged = _library().gaws_unchanged

    def same(self, variables: list[Any]) -> bool:
        """Whether everything is as it was."""
        if self.hooks != RemovableHandle.next_id:  # a hook was registered, on whatever module
            return False
        for mine, variable in zip(self.variables, variables, strict=True):
            if mine() is not variable:
                return False
        return bool(self._unchanged(self.handle))


class Unchanged:
    """A guard that stands for many, `guards`, which look at what `sources` name."""

    def __init__(self, guards: Any, sources: Iterable[Any], names: dict[str, Any]) -> None:
        self.guards = guards  # Dynamo's manager of them
        self.names = names  # globals
        self.paths = Paths(sources)
        self.hooked: list[int] | None = None  # how many hooks each of its modules has
        self.states: dict[tuple[int, ...], State] = {}

    def __call__(self, scope: Any) -> bool:
        """Whether the guards hold. `scope`: the locals of the call."""
        try:
            variables = self.paths.variables(scope, self.names)
        except KeyError:
            return False
        key = tuple(map(id, variables))
        state = self.states.get(key)
        if state is not None and state.same(variables):
            return True
        self.states.pop(key, None)
        if not self.guards.check(scope):
            return False
        try:
            dictionaries, tensors, modules = self.paths.follow(variables)
            if any(map(missing, tensors)):
                return False  # no guard of Dynamo's sees it, and memory behind the end would be read
            hooked = [sum(map(len, hooks_of(module))) for module in modules]
            if self.hooked is not None and hooked != self.hooked:
                return False  # nor does one see hooks, by torch's default
            self.hooked = hooked
            if len(self.states) >= MOST:
                self.states.clear()
            self.states[key] = State(variables, dictionaries, tensors)
        except (Unwatchable, TypeError) as error:  # right all the same: all the guards are checked in every call
            log.info("gaws: guards are checked in every call: %s", error)
        return True
