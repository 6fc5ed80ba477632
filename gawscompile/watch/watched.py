"""Which guards may be checked only after a change: those whose every change a watch over `Known.looks_at` sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch._dynamo.source import AttrSource, GlobalSource, NNModuleSource, TypeDictSource

from gawscompile.watch.sources import (
    PLAIN,
    UNKNOWN,
    below,
    followable,
    in_class,
    is_plain_object,
    is_variable,
    kept_as,
    step,
    variable_of,
)

IDENTITY = ("BUILTIN_MATCH", "CLASS_MATCH", "FUNCTION_MATCH", "ID_MATCH", "MODULE_MATCH")
"""Guards that ask whether a thing is still the same one."""


MODULES, GLOBALS, OTHERS = "modules and their parameters", "globals", "other objects, a cache say,"
"""What guards look at: each is watched apart, as each changes in its own time."""


class Known:
    """What sources name, as far as that is in modules' own attributes and in dictionaries. `names`: the globals."""

    def __init__(self, named: Iterable[tuple[Any, Any]], names: dict[str, Any]) -> None:
        self._names = names
        self._values: dict[Any, Any] = {}
        for source, value in named:
            while isinstance(source, NNModuleSource):
                source = source.base
            other = is_plain_object(value) and not isinstance(value, torch.Tensor)
            if is_variable(source) and (isinstance(value, torch.nn.Module) or other):
                self._values[source] = value

    def about(self, guard: Any) -> str:
        """Whether it looks at modules alone, or at globals alone. Other objects may be new ones in every call."""
        variables = [variable_of(source) for source in self.looks_at(guard)]
        values = [self._value(variable) for variable in variables]
        if all(isinstance(value, torch.nn.Module) for value in values):
            return MODULES
        alone = all(isinstance(variable, GlobalSource) for variable in variables)
        return OTHERS if not alone or any(is_plain_object(value) for value in values) else GLOBALS

    def looks_at(self, guard: Any) -> list[Any]:
        """The sources that a guard looks at."""
        kind, source = guard.create_fn_name(), guard.originating_source
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT" and torch._dynamo.config.skip_nnmodule_hook_guards:
            return []
        if kind == "HASATTR" and isinstance(self._value(source), torch.nn.Module):
            return [source, *(AttrSource(source, name) for name in ("_parameters", "_buffers", "_modules"))]
        if kind == "DUPLICATE_INPUT":
            return [source, guard.create_fn.keywords["source_b"]]
        return [source]

    def sees(self, kind: str, guard: Any, value: Any) -> bool:
        """Whether a watch over `looks_at(guard)` sees every change that a guard of a `kind` could be about.

        Its source must be `followable`; `value` is what that names.
        """
        found = self._value(guard.originating_source)
        copied = isinstance(guard.originating_source, TypeDictSource) and found is not UNKNOWN  # by Dynamo
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
            return type(value) in (list, tuple)
        if kind == "NOT_PRESENT_IN_GENERIC_DICT":
            return is_plain_object(value)
        if kind == "HASATTR":  # a property, cached or not, may look at anything
            getter = getattr(type(value), "__getattr__", None)
            usual = is_plain_object(value) and getter in (None, torch.nn.Module.__getattr__)
            name = kept_as(value, guard.create_fn.keywords["attr"])
            there = in_class(value, name)
            return usual and (type(there) is FunctionType or not hasattr(type(there), "__get__"))
        if kind == "DUPLICATE_INPUT":
            return all(followable(source) and self._value(source) is value for source in self.looks_at(guard))
        # buffers keep theirs: Dynamo's guard against aliasing inputs is over those that it guards
        if kind != "TENSOR_MATCH":
            return False
        return type(value) is torch.nn.Parameter or (type(value) is torch.Tensor and self.about(guard) == OTHERS)

    def _value(self, source: Any) -> Any:
        if source not in self._values:
            self._values[source] = self._found(source)
        return self._values[source]

    def _found(self, source: Any) -> Any:
        if below(source) is not None:
            return step(source, self._value(source.base))
        value = self._names.get(source.global_name, UNKNOWN) if isinstance(source, GlobalSource) else UNKNOWN
        return UNKNOWN if is_plain_object(value) else value  # which Dynamo shows where it guards it
