"""Which guards may be checked only after a change: those whose every change a watch over `Known.looks_at` sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.source import (
    AttrSource,
    GlobalSource,
    NNModuleSource,
    SubclassAttrListSource,
    TypeDictSource,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gawscompile.watch.found import Found, Unwatchable
from gawscompile.watch.sources import (
    PLAIN,
    TUPLES,
    UNKNOWN,
    below,
    followable,
    in_class,
    is_made_of_attributes,
    is_plain_object,
    is_variable,
    kept_as,
    other_names,
    step,
)

IDENTITY = ("BUILTIN_MATCH", "CLASS_MATCH", "FUNCTION_MATCH", "ID_MATCH", "MODULE_MATCH")
"""Guards that ask whether a thing is still the same one."""


MODULES, CONFIGURATIONS = "modules and their parameters", "configurations"
GLOBALS, OTHERS = "globals", "other objects, a cache say,"
ALL = (MODULES, CONFIGURATIONS, GLOBALS, OTHERS)
"""What guards look at: each is watched apart, as each changes in its own time."""


class Known:
    """What sources name, as far as `step` finds it and a watch can look at it. `names`: the globals."""

    def __init__(self, named: Iterable[tuple[Any, Any]], names: dict[str, Any]) -> None:
        self._names = names
        self._values: dict[Any, Any] = {}
        self._begins: dict[Any, tuple[Any, bool]] = {}
        self._found = Found()  # to try what a watch can look at
        for source, value in named:
            while isinstance(source, NNModuleSource):
                source = source.base
            usual = is_plain_object(value) and not isinstance(value, torch.Tensor) and type(value).__weakrefoffset__
            if is_variable(source) and (isinstance(value, torch.nn.Module) or usual):
                self._values[source] = self._watchable(source, None, value)

    def about(self, guard: Any) -> str:
        """Whether it looks at modules alone, at configurations that are reached from them, or at globals alone. Other
        objects may be new ones in every call."""
        sources = self.looks_at(guard)
        variables, configured = zip(*map(self._way, sources), strict=True) if sources else ((), ())
        values = [self._value(variable) for variable in variables]
        if all(isinstance(value, torch.nn.Module) for value in values):
            return CONFIGURATIONS if any(configured) else MODULES
        alone = all(isinstance(variable, GlobalSource) for variable in variables)
        return OTHERS if not alone or any(is_plain_object(value) for value in values) else GLOBALS

    def looks_at(self, guard: Any) -> list[Any]:
        """The sources that a guard looks at."""
        kind, source = guard.create_fn_name(), guard.originating_source
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT" and torch._dynamo.config.skip_nnmodule_hook_guards:
            return []
        if kind == "HASATTR" and isinstance(self._value(source), torch.nn.Module):
            return [source, *(AttrSource(source, name) for name in ("_parameters", "_buffers", "_modules"))]
        if kind == "HASATTR" and _has_getattr(self._value(source)):  # which answers where the object keeps nothing
            return [source, AttrSource(source, guard.create_fn.keywords["attr"])]
        if kind == "DUPLICATE_INPUT":
            return [source, guard.create_fn.keywords["source_b"]]
        return [source.base if isinstance(source, SubclassAttrListSource) else source]

    def sees(self, kind: str, guard: Any, value: Any) -> bool:
        """Whether a watch over `looks_at(guard)` sees every change that a guard of a `kind` could be about.

        Its source must be `followable`; `value` is what that names.
        """
        source = guard.originating_source
        if isinstance(source, SubclassAttrListSource):
            return is_made_of_attributes(self._value(source.base))
        found = self._value(source)
        copied = isinstance(source, TypeDictSource) and found is not UNKNOWN  # by Dynamo
        if found is not value and not copied:
            return False
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT":  # hooks are counted
            return torch._dynamo.config.skip_nnmodule_hook_guards
        if kind == "TYPE_MATCH":
            return type(value) in (*PLAIN, dict, list, tuple, OrderedDict) or is_plain_object(value)
        if kind in (*IDENTITY, "CLOSURE_MATCH"):
            return True
        if kind in ("CONSTANT_MATCH", "EQUALS_MATCH"):
            return type(value) in PLAIN
        if kind in ("DICT_KEYS_MATCH", "DICT_CONTAINS", "DICT_NOT_CONTAINS"):
            return type(value) is dict or (type(value) is OrderedDict and not value)  # whose order no version counts
        if kind == "SEQUENCE_LENGTH":
            return type(value) in (list, *TUPLES)
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            return is_plain_object(value)
        if kind == "HASATTR":  # a property, cached or not, may look at anything
            name = kept_as(value, guard.create_fn.keywords["attr"])
            usual = is_plain_object(value) and all(self._value(one) is not UNKNOWN for one in self.looks_at(guard))
            there = in_class(value, name)
            return usual and (type(there) is FunctionType or not hasattr(type(there), "__get__"))
        if kind == "DUPLICATE_INPUT":
            return all(followable(source) and self._value(source) is value for source in self.looks_at(guard))
        if kind == "TENSOR_SUBCLASS_METADATA_MATCH":
            return is_made_of_attributes(value)
        return kind == "TENSOR_MATCH" and (
            type(value) is torch.Tensor
            or (isinstance(value, torch.nn.Parameter) and not is_traceable_wrapper_subclass(value))
            or is_made_of_attributes(value)
        )

    def _way(self, source: Any) -> tuple[Any, bool]:
        """The variable that a source begins with, and whether it leads through a configuration."""
        if source not in self._begins:
            base = below(source)
            variable, configured = (source, False) if base is None else self._way(base)
            self._begins[source] = variable, configured or other_names(self._value(source)) is not None
        return self._begins[source]

    def _value(self, source: Any) -> Any:
        if source in self._values:
            return self._values[source]
        base, before = below(source), None
        if base is not None:
            before = self._value(base)
            value = step(source, before)
        else:
            value = self._names.get(source.global_name, UNKNOWN) if isinstance(source, GlobalSource) else UNKNOWN
            value = UNKNOWN if is_plain_object(value) else value  # which Dynamo shows where it guards it
        self._values[source] = self._watchable(source, before, value)
        return self._values[source]

    def _watchable(self, source: Any, before: Any, value: Any) -> Any:
        """`value`, or `UNKNOWN` where a watch cannot look at it."""
        if value is not UNKNOWN:
            try:
                self._found.reach(source, before, value)
            except Unwatchable:
                return UNKNOWN
        return value


def _has_getattr(value: Any) -> bool:
    """Whether its class has a ``__getattr__`` that is no module's."""
    return getattr(type(value), "__getattr__", None) not in (None, torch.nn.Module.__getattr__)
