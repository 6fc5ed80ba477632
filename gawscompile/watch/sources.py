"""What Dynamo's sources name: a local or a global, then attributes, items, functions' closures and classes.

Dynamo says of every guard where its value comes from (a *source*: a local, its attribute, an item of that). `step` goes
one step along a source, where that reads what an object, a dictionary, a list, a function or a class keeps itself, and
calls nothing of theirs.
"""

from __future__ import annotations

import gc
import sys
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch._dynamo.source import (
    AttrSource,
    ClosureSource,
    DefaultsSource,
    DictGetItemSource,
    GetItemSource,
    GlobalSource,
    LocalSource,
    NNModuleSource,
    SubclassAttrListSource,
    TypeDictSource,
    TypeMROSource,
    TypeSource,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def followable(source: Any) -> bool:
    """Whether `Paths` can follow one of Dynamo's sources: a variable, then modules, attributes, dictionaries, lists,
    and what functions and classes keep. Or the names of the tensors that a tensor of a subclass is made of."""
    if isinstance(source, SubclassAttrListSource):
        source = source.base
    while (base := below(source)) is not None:
        if isinstance(source, DictGetItemSource):
            if not isinstance(source.index, (str, int)):
                return False
        elif type(source) is GetItemSource:
            if type(source.index) is not int:
                return False
        elif isinstance(source, DefaultsSource):
            if source.is_kw:
                return False
        elif not isinstance(
            source, (AttrSource, ClosureSource, NNModuleSource, TypeSource, TypeDictSource, TypeMROSource)
        ):
            return False
        source = base
    return is_variable(source)


def below(source: Any) -> Any:
    """The source that one is based on, None for a variable."""
    return None if is_variable(source) else getattr(source, "base", None)


def is_variable(source: Any) -> bool:
    """A local or a global, or one of ``*args`` or ``**kwargs``: what decorators call a method's self, and its cache."""
    if type(source) is GetItemSource:  # those of iterators derive from it
        return isinstance(source.base, LocalSource) and type(source.index) is int
    if isinstance(source, DictGetItemSource):
        return isinstance(source.base, LocalSource) and isinstance(source.index, str)
    return isinstance(source, (LocalSource, GlobalSource))


PLAIN = (bool, int, float, str, bytes, type(None), CodeType, torch.dtype, torch.device)
"""Types of which no value changes."""


TUPLES = (tuple, torch.Size)


def is_plain_object(value: Any) -> bool:
    """Whether it is an object that gets its attributes as every object does, a `torch.nn.Module` say, or as a model's
    configuration does. Functions, classes and Python's modules are none."""
    usual = type(value).__getattribute__ is object.__getattribute__ or other_names(value) is not None
    others = (type, FunctionType, *PLAIN)
    return usual and not isinstance(value, others) and type(getattr(value, "__dict__", None)) is dict


def is_made_of_attributes(value: Any) -> bool:
    """Whether a tensor of a subclass, a quantised weight say, keeps its inner tensors and all that it tells Dynamo of
    itself as attributes, which are tensors or do not change; lists of such may. What it tells is by name."""
    inside = (torch.Tensor, torch.nn.Parameter)
    if type(value) in inside or not is_traceable_wrapper_subclass(value) or not is_plain_object(value):
        return False
    own: Any = value
    names, told = own.__tensor_flatten__()
    kept = vars(value)
    inner = all(name in kept and getattr(value, name) is kept[name] and type(kept[name]) in inside for name in names)
    lists = [one for one in kept.values() if type(one) is list]
    others = [one for one in kept.values() if type(one) not in (*inside, list)]
    known = told is None or (type(told) is dict and all(_is_own(own, name, one) for name, one in told.items()))
    return known and inner and all(map(_never_changes, [*others, *(item for one in lists for item in one)]))


def _is_own(tensor: Any, name: str, told: Any) -> bool:
    """Whether what a tensor tells of itself by this name is an attribute of its own, or what every tensor has."""
    if name in vars(tensor):
        return told is vars(tensor)[name]
    return name in ("dtype", "device", "shape", "layout", "requires_grad") and told == getattr(tensor, name)


def _never_changes(value: Any) -> bool:
    return type(value) in PLAIN or (isinstance(value, tuple) and all(type(one) in PLAIN for one in value))


def other_names(value: Any) -> dict[str, str] | None:
    """Of a model's configuration, under which names it keeps some attributes. None for anything else."""
    configuration = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
    if configuration is None or type(value).__getattribute__ is not configuration.__getattribute__:
        return None
    names = object.__getattribute__(value, "attribute_map")
    return names if type(names) is dict else None


def kept_as(value: Any, name: str) -> str:
    """Under which name an object keeps an attribute."""
    names = other_names(value)
    return names.get(name, name) if names and name != "attribute_map" else name


def in_class(value: Any, name: str) -> Any:
    """What an object's class has by this name, None where that is nothing."""
    return next((vars(one)[name] for one in type(value).__mro__ if name in vars(one)), None)


def dictionary_of(a_class: type) -> dict[str, Any]:
    """The dictionary behind a class's proxy."""
    return gc.get_referents(vars(a_class))[0]


def _is_property(value: Any, name: str) -> bool:
    """Whether an object's class gets `name` in a way of its own, whatever the object holds."""
    return name != "__dict__" and hasattr(type(in_class(value, name)), "__set__")


UNKNOWN = object()
KEPT: dict[type, tuple[str, ...]] = {
    FunctionType: ("__code__", "__defaults__", "__closure__", "__name__"),
    property: ("fget",),
    CellType: ("cell_contents",),
}
"""Fields that are no items of a dictionary: `Found.keeps` finds their places."""


def _attribute(value: Any, name: str) -> Any:
    """What a value has by this name, `UNKNOWN` where that is not found in a way known here."""
    if type(value) in KEPT:
        try:
            kept = getattr(value, name) if name in KEPT[type(value)] else None
        except ValueError:  # an empty cell
            kept = None
        return UNKNOWN if kept is None else kept
    if isinstance(value, type):
        return _of_class(value, name)
    if name == "__class__":
        usual = is_plain_object(value) and in_class(value, name) is vars(object)[name]
        return type(value) if usual else UNKNOWN
    usual = isinstance(value, ModuleType) and type(value).__getattribute__ is ModuleType.__getattribute__
    name = kept_as(value, name)
    if not (usual or is_plain_object(value)) or _is_property(value, name):
        return UNKNOWN
    return vars(value) if name == "__dict__" else vars(value).get(name, UNKNOWN)


def _of_class(a_class: type, name: str) -> Any:
    """What a class has by this name, `UNKNOWN` where that or its metaclass says what one gets."""
    if type(a_class).__getattribute__ is not type.__getattribute__ or _is_property(a_class, name):
        return UNKNOWN
    found = next((vars(one)[name] for one in a_class.__mro__ if name in vars(one)), UNKNOWN)
    return found if type(found) is FunctionType or not hasattr(type(found), "__get__") else UNKNOWN


def step(source: Any, before: Any) -> Any:
    """What a source names, where the one below names `before`; `UNKNOWN` where it is not found in a way known here."""
    if isinstance(source, NNModuleSource):
        return before
    if isinstance(source, TypeSource):
        return type(before) if is_plain_object(before) or isinstance(before, torch.Tensor) else UNKNOWN
    if isinstance(source, (TypeDictSource, TypeMROSource)):
        if not isinstance(before, type):
            return UNKNOWN
        return dictionary_of(before) if isinstance(source, TypeDictSource) else before.__mro__
    if isinstance(source, DefaultsSource):
        defaults = _attribute(before, "__defaults__") if type(before) is FunctionType else ()
        index = source.idx_key
        return defaults[index] if type(defaults) is tuple and type(index) is int and index < len(defaults) else UNKNOWN
    if isinstance(source, ClosureSource):
        return _attribute(before, "__closure__") if type(before) is FunctionType else UNKNOWN
    if type(source) is GetItemSource:
        inside = type(before) in (list, *TUPLES) and 0 <= source.index < len(before)
        return before[source.index] if inside else UNKNOWN
    if isinstance(source, AttrSource):
        return _attribute(before, source.member)
    return before.get(source.index, UNKNOWN) if type(before) is dict else UNKNOWN
