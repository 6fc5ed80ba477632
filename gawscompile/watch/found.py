"""What a watch compares, and how one reaches it: addresses, in bytes, as CPython lays out its objects.

`Paths.follow` finds everything that a change of what guards look at would show in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch._dynamo.source import (
    AttrSource,
    DefaultsSource,
    DictGetItemSource,
    GetItemSource,
    LocalSource,
    TypeMROSource,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gawscompile.watch.sources import (
    KEPT,
    PLAIN,
    TUPLES,
    UNKNOWN,
    below,
    dictionary_of,
    is_made_of_attributes,
    is_plain_object,
    step,
)

TYPE, VERSION = 8, 24  # where an object keeps its type, and a dictionary its version


class Unwatchable(Exception):
    """A guard looks at what this file cannot follow: the message says at what."""


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


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
        self.held: list[Any] = []  # values that only their addresses tell apart, so that no others come to lie there
        self.reached: list[Any] = []  # which is to live until a watch has looked at it
        self._seen: set[int] = set()

    def add(self, value: Any) -> None:
        """Keep `value`, if it is something that can change. Raises `Unwatchable`."""
        if isinstance(value, torch.Tensor):
            if id(value) in self.tensors:
                return
            self.tensors[id(value)] = value
            self.words.append(id(value) + TYPE)
            self.words += [_place_of_attributes(value), id(vars(value)) + VERSION]  # its sizes may be marked as dynamic
            if any(isinstance(mark, set) for mark in vars(value).values()):
                raise Unwatchable("a tensor with sizes that are marked, whose marks can grow")
            if is_made_of_attributes(value):
                self._add_class(type(value))
                for one in vars(value).values():
                    self.add(one)
            elif is_traceable_wrapper_subclass(value):
                raise Unwatchable(f"a {type(value).__name__}, which says more of itself than its attributes")
        elif type(value) is list:
            if id(value) not in self.lists:
                self.lists[id(value)] = value
                self.words.append(id(value) + TYPE)
                self.behind.append(len(self.words))
                self.hold(value)
        elif id(value) in self._seen:
            return
        elif isinstance(value, dict):
            self._seen.add(id(value))
            self.words.append(id(value) + VERSION)
        elif type(value) in TUPLES:
            self._seen.add(id(value))
            self.words.append(id(value) + TYPE)
            self.words += range(id(value) + 16, id(value) + 24 + 8 * len(value), 8)  # its size, and its items
            self.hold(value)
        elif type(value) is FunctionType:
            self._seen.add(id(value))
            self.keeps(value, value.__code__)
        elif isinstance(value, ModuleType) or is_plain_object(value):
            self._seen.add(id(value))
            self.words += [id(value) + TYPE, _place_of_attributes(value)]
            self._add_class(type(value))
            self.add(vars(value))
            if isinstance(value, torch.nn.Module):
                self.modules.append(value)
                for hooks in hooks_of(value):
                    self.add(hooks)

    def _add_class(self, a_class: type) -> None:
        """Keep what its instances have of a class. Its address is known already."""
        if id(a_class) not in self._seen:
            self._seen.add(id(a_class))
            self.keeps(a_class, a_class.__mro__)
            self.add(a_class.__mro__)
            for one in a_class.__mro__:
                self.add(dictionary_of(one))

    def reach(self, source: Any, before: Any, value: Any) -> None:
        """Keep `value`, which `source` names where the one below it names `before`. Raises `Unwatchable`."""
        if isinstance(source, DefaultsSource):
            self.keeps(before, before.__defaults__)
            self.add(before.__defaults__)
        elif isinstance(source, TypeMROSource) or type(before) in KEPT:  # a field of `before`, no dictionary's item
            self.keeps(before, value)
        elif isinstance(before, type) and isinstance(source, AttrSource):
            self.words.append(id(before) + TYPE)
            self._add_class(before)
            self._add_class(type(before))
        self.add(value)

    def hold(self, values: Iterable[Any]) -> None:
        """Hold those that cannot change. Others are compared by words of their own, or by identity alone, as Dynamo
        does."""
        self.held += [one for one in values if type(one) in PLAIN]

    def keeps(self, value: Any, inside: Any) -> None:
        """Keep that a function, a property or a class has `inside` as its code, say. Raises `Unwatchable`."""
        for place in range(id(value) + 16, id(value) + type(value).__basicsize__, 8):
            if word(place) == id(inside):
                self.words.append(place)
                self.hold([inside])
                return
        raise Unwatchable(f"a {type(value).__name__} that does not keep what it is asked for")


def _place_of_attributes(value: Any) -> int:
    """The address at which an object keeps its dictionary. Raises `Unwatchable` where that is not known."""
    attributes = id(vars(value))
    for place in (-24, -32, -16, -8, 16, 24, 32):
        if word(id(value) + place) == attributes:
            return id(value) + place
    raise Unwatchable(f"{type(value).__name__}, whose attributes are not where they are expected")


class Paths:
    """How one reaches what guards look at: sources, each after the one it is based on. `whole`: the globals, where
    these are watched as one dictionary, and are no variables."""

    def __init__(self, sources: Iterable[Any], whole: dict[str, Any] | None = None) -> None:
        self._whole = whole
        self.steps: dict[Any, Any] = {}  # source → the one before it, None for a variable
        for source in sources:
            chain = [source]
            while (base := below(chain[-1])) is not None and base not in self.steps:
                chain.append(base)
            for one in reversed(chain):
                self.steps.setdefault(one, below(one))
        self.roots = [source for source, base in self.steps.items() if base is None and whole is None]

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
        for value in (self._whole, *variables):
            found.add(value)
        for source, base in self.steps.items():
            if source in values:
                continue
            before = self._whole if base is None else values[base]
            value = step(source, before) if base is not None else (before or {}).get(source.global_name, UNKNOWN)
            if value is UNKNOWN:
                raise Unwatchable(f"{source.name}, which is not where it is expected")
            values[source] = value
            found.reach(source, before, value)
        found.reached += values.values()
        return found
