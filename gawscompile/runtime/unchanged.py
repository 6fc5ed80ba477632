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
import gc
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from inspect import getattr_static
from typing import Any

import torch
from torch._dynamo.source import AttrSource
from torch.utils.hooks import RemovableHandle

from gawscompile.runtime import ops

log = logging.getLogger("gawscompile")

TYPE, VERSION = 8, 24  # where an object keeps its type, and a dictionary its version
MOST = 1024  # states that are kept of one graph: one for each model, or layer, that it serves
PATIENCE = 8  # changes in a row


class Unwatchable(Exception):
    """A guard looks at what this file cannot follow: the message says at what."""


@functools.cache
def available() -> bool:
    """Whether changes can be seen here: CPython with versions of dictionaries, and a C++ compiler."""
    try:
        return sys.implementation.name == "cpython" and _versions_move() and _lists_lie_open() and bool(_library())
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
    return _word(id(dictionary) + VERSION)


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


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _lists_lie_open() -> bool:
    """Whether a list is its size and an array of addresses, and an object's type is where it is expected."""
    items = [object(), "a name", 3.5]
    size, array = _word(id(items) + 16), _word(id(items) + 24)
    return (
        size == len(items)
        and all(_word(array + 8 * i) == id(item) for i, item in enumerate(items))
        and _word(id(items) + TYPE) == id(list)
    )


def _slot(tensor: torch.Tensor) -> int:
    """The address at which a Python tensor holds its implementation. Raises `Unwatchable` where that is not known."""
    for offset in (16, 24):  # behind its reference count and type; torch before 2.12 keeps a flag in between
        if _word(id(tensor) + offset) == tensor._cdata:
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
    while (base := _below(source)) is not None:
        name = type(source).__name__
        if name == "DictGetItemSource":
            if not isinstance(source.index, (str, int)):
                return False
        elif name != "TypeSource" and not _is_attribute(source) and not _is_module(source):
            return False
        source = base
    return _is_variable(source)


def _below(source: Any) -> Any:
    """The source that one is based on, None for a variable."""
    return None if _is_variable(source) else getattr(source, "base", None)


def _is_variable(source: Any) -> bool:
    """A local or a global, or one of ``*args``: what decorators call a method's self."""
    name = type(source).__name__
    if name == "GetItemSource":
        return type(source.base).__name__ == "LocalSource" and type(source.index) is int
    return name in ("LocalSource", "GlobalSource")


def _is_attribute(source: Any) -> bool:
    return type(source).__name__ in ("AttrSource", "UnspecializedParamBufferSource")


def _is_module(source: Any) -> bool:
    return type(source).__name__.endswith("NNModuleSource")


PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""Types of which no value changes."""


def _is_plain_object(value: Any) -> bool:
    """Whether it is a module, or an object whose attributes are where every object's are."""
    usual = type(value).__getattribute__ is object.__getattribute__ and not isinstance(value, (type, *PLAIN))
    return usual and type(getattr(value, "__dict__", None)) is dict


def _is_property(value: Any, name: str) -> bool:
    """Whether an object's class gets `name` in a way of its own, whatever the object holds."""
    if name == "__dict__":
        return False
    found = next((vars(one)[name] for one in type(value).__mro__ if name in vars(one)), None)
    return hasattr(type(found), "__set__")


class Known:
    """What sources name, as far as that is in modules' own attributes and in dictionaries."""

    def __init__(self, named: Iterable[tuple[Any, Any]]) -> None:
        self._values: dict[Any, Any] = {}
        for source, value in named:
            while _is_module(source):
                source = source.base
            if _is_variable(source) and isinstance(value, torch.nn.Module):  # which lasts
                self._values[source] = value

    def sees(self, kind: str, guard: Any, value: Any) -> bool:
        """Whether a watch over `looks_at(guard)` sees every change that a guard of a `kind` could be about.

        Its source must be `followable`; `value` is what that names.
        """
        if self._value(guard.originating_source) is not value:
            return False
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT":  # hooks are counted
            return torch._dynamo.config.skip_nnmodule_hook_guards
        if kind == "TYPE_MATCH":
            return type(value) in (*PLAIN, dict, list) or _is_plain_object(value)
        if kind == "CLASS_MATCH":
            return isinstance(value, type) and type(guard.originating_source).__name__ == "TypeSource"
        if kind in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            return type(value) in PLAIN
        if kind in ("DICT_KEYS_MATCH", "DICT_CONTAINS", "DICT_NOT_CONTAINS"):
            return type(value) is dict
        if kind == "SEQUENCE_LENGTH":
            return type(value) is list
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            return _is_plain_object(value)
        if kind == "HASATTR":  # a property may look at anything
            usual = isinstance(value, torch.nn.Module) and type(value).__getattr__ is torch.nn.Module.__getattr__
            return usual and not isinstance(
                getattr_static(type(value), guard.create_fn.keywords["attr"], None), property
            )
        if kind == "DUPLICATE_INPUT":
            return all(followable(source) and self._value(source) is value for source in looks_at(guard))
        # buffers keep theirs: Dynamo's guard against aliasing inputs is over those that it guards
        return kind == "TENSOR_MATCH" and type(value) is torch.nn.Parameter

    def _value(self, source: Any) -> Any:
        if source not in self._values:
            self._values[source] = self._found(source)
        return self._values[source]

    def _found(self, source: Any) -> Any:
        if _below(source) is None:
            return UNKNOWN
        before = self._value(source.base)
        if _is_module(source):
            return before
        if type(source).__name__ == "TypeSource":
            return type(before) if _is_plain_object(before) or isinstance(before, torch.Tensor) else UNKNOWN
        if _is_attribute(source):
            attributes = vars(before) if _is_plain_object(before) and not _is_property(before, source.member) else {}
            return attributes if source.member == "__dict__" else attributes.get(source.member, UNKNOWN)
        return before.get(source.index, UNKNOWN) if type(before) is dict else UNKNOWN


UNKNOWN = object()


def looks_at(guard: Any) -> list[Any]:
    """The sources that a guard looks at."""
    kind, source = guard.create_fn_name(), guard.originating_source
    if kind == "EMPTY_NN_MODULE_HOOKS_DICT" and torch._dynamo.config.skip_nnmodule_hook_guards:
        return []
    if kind == "HASATTR":
        return [source, *(AttrSource(source, name) for name in ("_parameters", "_buffers", "_modules"))]
    if kind == "DUPLICATE_INPUT":
        return [source, guard.create_fn.keywords["source_b"]]
    return [source]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: torch.nn.Module) -> list[dict[Any, Any]]:
    """A module's dictionaries of hooks that hold any."""
    return [hooks for name in HOOKS if (hooks := vars(module).get(name))]


class Found:
    """What a watch looks at. No thing twice."""

    def __init__(self) -> None:
        self.words: list[int] = []  # addresses, each after those by which it is known to be there
        self.modules: list[torch.nn.Module] = []
        self.tensors: dict[int, torch.Tensor] = {}
        self.lists: dict[int, list[Any]] = {}
        self._seen: set[int] = set()

    def add(self, value: Any) -> None:
        """Keep `value`, if it is something that can change. Raises `Unwatchable`."""
        if isinstance(value, torch.Tensor):
            self.tensors.setdefault(id(value), value)
        elif type(value) is list:
            self.lists.setdefault(id(value), value)
        elif id(value) in self._seen:
            return
        elif isinstance(value, dict):
            self._seen.add(id(value))
            self.words.append(id(value) + VERSION)
        elif _is_plain_object(value):
            self._seen.add(id(value))
            self.words += [id(value) + TYPE, _place_of_attributes(value)]
            for one in type(value).__mro__:
                self.add(gc.get_referents(vars(one))[0])  # the dictionary behind a proxy
            self.add(vars(value))
            if isinstance(value, torch.nn.Module):
                self.modules.append(value)
                for hooks in hooks_of(value):
                    self.add(hooks)


def _place_of_attributes(value: Any) -> int:
    """The address at which an object keeps its dictionary. Raises `Unwatchable` where that is not known."""
    attributes = id(vars(value))
    for place in (-24, -32, -16, -8, 16, 24, 32):
        if _word(id(value) + place) == attributes:
            return id(value) + place
    raise Unwatchable(f"{type(value).__name__}, whose attributes are not where they are expected")


class Paths:
    """How one reaches what guards look at: sources, each after the one it is based on."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.steps: dict[Any, Any] = {}  # source → the one before it, None for a variable
        for source in sources:
            chain = [source]
            while (base := _below(chain[-1])) is not None and base not in self.steps:
                chain.append(base)
            for one in reversed(chain):
                self.steps.setdefault(one, _below(one))
        self.roots = [source for source, base in self.steps.items() if base is None]

    def variables(self, scope: dict[str, Any], names: dict[str, Any]) -> list[Any]:
        """What the roots are. Raises `KeyError` and `IndexError` where there are none."""
        values = []
        for root in self.roots:
            if type(root).__name__ == "GetItemSource":
                values.append(scope[root.base.local_name][root.index])
            elif type(root).__name__ == "LocalSource":
                values.append(scope[root.local_name])
            else:
                values.append(names[root.global_name])
        return values

    def follow(self, variables: list[Any]) -> Found:
        """What is on the way. Raises `Unwatchable`."""
        values = dict(zip(self.roots, variables, strict=True))
        found = Found()
        for value in variables:
            found.add(value)
        for source, base in self.steps.items():
            if base is None:
                continue
            values[source] = self._step(source, values[base])
            found.add(values[source])
        return found

    def _step(self, source: Any, before: Any) -> Any:
        if _is_module(source) or type(source).__name__ == "TypeSource":
            return before
        if not _is_attribute(source):
            if not isinstance(before, dict):
                raise Unwatchable(f"{source.name}: {type(before).__name__} is no dictionary")
            return before.get(source.index)
        if not _is_plain_object(before) or _is_property(before, source.member):
            raise Unwatchable(f"{source.name}: {type(before).__name__} says itself what its attributes are")
        attributes = vars(before)
        if source.member != "__dict__" and source.member not in attributes:
            raise Unwatchable(f"{source.name}: it is no attribute of its own")
        return attributes if source.member == "__dict__" else attributes[source.member]


class State:
    """What was there when the guards of a graph last held for certain variables: models, mostly."""

    def __init__(self, variables: list[Any], found: Found) -> None:
        self.variables = [weakref.ref(variable) for variable in variables]
        self.hooks = RemovableHandle.next_id
        words = found.words + [address + TYPE for address in found.tensors]
        slots = [_slot(tensor) for tensor in found.tensors.values()]
        arrays = [
            (ctypes.c_int64(len(addresses)), (ctypes.c_void_p * len(addresses))(*addresses))
            for addresses in (words, slots, list(found.lists))
        ]
        handle = _library().gaws_watch(*itertools.chain(*arrays))
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
        self.missed: dict[tuple[int, ...], int] = {}  # how often in a row something had changed
        self.waits: dict[tuple[int, ...], int] = {}  # calls until the next state is made

    def __call__(self, scope: Any) -> bool:
        """Whether the guards hold. `scope`: the locals of the call.

        Where something changes in call after call (a module that counts its calls, say) a state is worth less than it
        costs: the guards alone decide then, as they do without us, and a state is tried less and less often.
        """
        try:
            variables = self.paths.variables(scope, self.names)
        except (KeyError, IndexError):
            return False
        key = tuple(map(id, variables))
        state = self.states.get(key)
        if state is not None and state.same(variables):
            self.missed.pop(key, None)
            return True
        self.states.pop(key, None)
        if not self.guards.check(scope):
            return False
        if waits := self.waits.get(key, 0):
            self.waits[key] = waits - 1
            return True
        missed = self.missed[key] = self.missed.get(key, 0) + 1
        if missed > PATIENCE:
            self.waits[key] = min(2 ** (missed - PATIENCE), MOST)
        try:
            found = self.paths.follow(variables)
            if any(map(missing, found.tensors.values())):
                return False  # no guard of Dynamo's sees it, and memory behind the end would be read
            hooked = [sum(map(len, hooks_of(module))) for module in found.modules]
            if self.hooked is not None and hooked != self.hooked:
                return False  # nor does one see hooks, by torch's default
            self.hooked = hooked
            if len(self.states) >= MOST:
                self._forget()
            self.states[key] = State(variables, found)
        except (Unwatchable, TypeError) as error:  # right all the same: all the guards are checked in every call
            log.info("gaws: guards are checked in every call: %s", error)
        return True

    def _forget(self) -> None:
        """The states of models that are gone; all, where none is."""
        alive = {key: state for key, state in self.states.items() if all(one() is not None for one in state.variables)}
        self.states = alive if len(alive) < MOST else {}
        self.missed, self.waits = {}, {}
