"""What guards look at, and how one reaches it: modules' attributes, dictionaries, lists of names, tensors' metadata.

Dynamo says of every guard where its value comes from (a *source*: a local, its attribute, an item of that).
`Known.sees` decides which guards `unchanged.py` may check only after a change; `Paths.follow` finds everything
that such a change would show in. Addresses are in bytes, as CPython lays out its objects.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch._dynamo.source import (
    AttrSource,
    DictGetItemSource,
    GetItemSource,
    GlobalSource,
    LocalSource,
    NNModuleSource,
    TypeDictSource,
    TypeSource,
)

TYPE, VERSION = 8, 24  # where an object keeps its type, and a dictionary its version


class Unwatchable(Exception):
    """A guard looks at what this file cannot follow: the message says at what."""


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def followable(source: Any) -> bool:
    """Whether `Paths` can follow one of Dynamo's sources: a variable, then modules, attributes, dictionaries, lists."""
    while (base := _below(source)) is not None:
        if isinstance(source, DictGetItemSource):
            if not isinstance(source.index, (str, int)):
                return False
        elif type(source) is GetItemSource:
            if type(source.index) is not int:
                return False
        elif isinstance(source, TypeDictSource):
            if not isinstance(base, TypeSource):
                return False
        elif not isinstance(source, (AttrSource, NNModuleSource, TypeSource)):
            return False
        source = base
    return _is_variable(source)


def _below(source: Any) -> Any:
    """The source that one is based on, None for a variable."""
    return None if _is_variable(source) else getattr(source, "base", None)


def _is_variable(source: Any) -> bool:
    """A local or a global, or one of ``*args`` or ``**kwargs``: what decorators call a method's self, and its cache."""
    if type(source) is GetItemSource:  # those of iterators derive from it
        return isinstance(source.base, LocalSource) and type(source.index) is int
    if isinstance(source, DictGetItemSource):
        return isinstance(source.base, LocalSource) and isinstance(source.index, str)
    return isinstance(source, (LocalSource, GlobalSource))


def variable_of(source: Any) -> Any:
    """The variable that a source begins with."""
    while (base := _below(source)) is not None:
        source = base
    return source


PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""Types of which no value changes."""


def _is_plain_object(value: Any) -> bool:
    """Whether it is a module, or an object whose attributes are where every object's are."""
    usual = type(value).__getattribute__ is object.__getattribute__ and not isinstance(value, (type, *PLAIN))
    return usual and type(getattr(value, "__dict__", None)) is dict


def _in_class(value: Any, name: str) -> Any:
    """What an object's class has by this name, None where that is nothing."""
    return next((vars(one)[name] for one in type(value).__mro__ if name in vars(one)), None)


def _dictionary_of(a_class: type) -> dict[str, Any]:
    """The dictionary behind a class's proxy."""
    return gc.get_referents(vars(a_class))[0]


def _is_property(value: Any, name: str) -> bool:
    """Whether an object's class gets `name` in a way of its own, whatever the object holds."""
    return name != "__dict__" and hasattr(type(_in_class(value, name)), "__set__")


class Known:
    """What sources name, as far as that is in modules' own attributes and in dictionaries."""

    def __init__(self, named: Iterable[tuple[Any, Any]]) -> None:
        self._values: dict[Any, Any] = {}
        for source, value in named:
            while isinstance(source, NNModuleSource):
                source = source.base
            other = _is_plain_object(value) and not isinstance(value, torch.Tensor)
            if _is_variable(source) and (isinstance(value, torch.nn.Module) or other):
                self._values[source] = value

    def lasts(self, guard: Any) -> bool:
        """Whether it looks at modules alone. Other objects, a cache say, may be new ones in every call."""
        variables = [self._value(variable_of(source)) for source in looks_at(guard)]
        return all(isinstance(value, torch.nn.Module) for value in variables)

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
            return isinstance(value, type) and isinstance(guard.originating_source, TypeSource)
        if kind in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            return type(value) in PLAIN
        if kind in ("DICT_KEYS_MATCH", "DICT_CONTAINS", "DICT_NOT_CONTAINS"):
            return type(value) is dict
        if kind == "SEQUENCE_LENGTH":
            return type(value) is list
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            return _is_plain_object(value)
        if kind == "HASATTR":  # a property, cached or not, may look at anything
            usual = isinstance(value, torch.nn.Module) and type(value).__getattr__ is torch.nn.Module.__getattr__
            return usual and not hasattr(type(_in_class(value, guard.create_fn.keywords["attr"])), "__get__")
        if kind == "DUPLICATE_INPUT":
            return all(followable(source) and self._value(source) is value for source in looks_at(guard))
        # buffers keep theirs: Dynamo's guard against aliasing inputs is over those that it guards
        if kind != "TENSOR_MATCH":
            return False
        return type(value) is torch.nn.Parameter or (type(value) is torch.Tensor and not self.lasts(guard))

    def _value(self, source: Any) -> Any:
        if source not in self._values:
            self._values[source] = self._found(source)
        return self._values[source]

    def _found(self, source: Any) -> Any:
        if _below(source) is None:
            return UNKNOWN
        before = self._value(source.base)
        if isinstance(source, NNModuleSource):
            return before
        if isinstance(source, TypeSource):
            return type(before) if _is_plain_object(before) or isinstance(before, torch.Tensor) else UNKNOWN
        if isinstance(source, TypeDictSource):
            return _dictionary_of(before) if isinstance(before, type) else UNKNOWN
        if type(source) is GetItemSource:
            inside = type(before) is list and 0 <= source.index < len(before)
            return before[source.index] if inside else UNKNOWN
        if isinstance(source, AttrSource):
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
        self.behind: list[int] = []  # of each list, how many words come before it
        self._seen: set[int] = set()

    def add(self, value: Any) -> None:
        """Keep `value`, if it is something that can change. Raises `Unwatchable`."""
        if isinstance(value, torch.Tensor):
            if id(value) in self.tensors:
                return
            self.tensors[id(value)] = value
            self.words.append(id(value) + TYPE)
            if type(value) is torch.Tensor:  # its sizes may be marked as dynamic
                self.words += [_place_of_attributes(value), id(vars(value)) + VERSION]
                if any(isinstance(mark, set) for mark in vars(value).values()):
                    raise Unwatchable("a tensor with sizes that are marked, whose marks can grow")
        elif type(value) is list:
            if id(value) not in self.lists:
                self.lists[id(value)] = value
                self.behind.append(len(self.words))
        elif id(value) in self._seen:
            return
        elif isinstance(value, dict):
            self._seen.add(id(value))
            self.words.append(id(value) + VERSION)
        elif _is_plain_object(value):
            self._seen.add(id(value))
            self.words += [id(value) + TYPE, _place_of_attributes(value)]
            for one in type(value).__mro__:
                self.add(_dictionary_of(one))
            self.add(vars(value))
            if isinstance(value, torch.nn.Module):
                self.modules.append(value)
                for hooks in hooks_of(value):
                    self.add(hooks)


def _place_of_attributes(value: Any) -> int:
    """The address at which an object keeps its dictionary. Raises `Unwatchable` where that is not known."""
    attributes = id(vars(value))
    for place in (-24, -32, -16, -8, 16, 24, 32):
        if word(id(value) + place) == attributes:
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
            if isinstance(root, (GetItemSource, DictGetItemSource)):
                assert isinstance(root.base, LocalSource)
                values.append(scope[root.base.local_name][root.index])
            elif isinstance(root, LocalSource):
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
        if isinstance(source, (NNModuleSource, TypeSource, TypeDictSource)):
            return _dictionary_of(type(before)) if isinstance(source, TypeDictSource) else before
        if type(source) is GetItemSource:
            if type(before) is not list or not 0 <= source.index < len(before):
                raise Unwatchable(f"{source.name}: {type(before).__name__} has no such item")
            return before[source.index]
        if not isinstance(source, AttrSource):
            if not isinstance(before, dict):
                raise Unwatchable(f"{source.name}: {type(before).__name__} is no dictionary")
            return before.get(source.index)
        if not _is_plain_object(before) or _is_property(before, source.member):
            raise Unwatchable(f"{source.name}: {type(before).__name__} says itself what its attributes are")
        attributes = vars(before)
        if source.member != "__dict__" and source.member not in attributes:
            raise Unwatchable(f"{source.name}: it is no attribute of its own")
        return attributes if source.member == "__dict__" else attributes[source.member]
