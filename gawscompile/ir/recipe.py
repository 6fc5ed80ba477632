"""`hoisted`: what parameters alone determine, as one node of the graph, and its recipe, the text of its steps.

A recipe is JSON: a list of steps ``[operator, arguments, keywords]``, each of which may read ``["n", i]``, the i-th of
the sources and of the steps after them. The last step is the result. It travels in a program, beside the kernel's
spec, so that a process that never ran a pass can compute the value.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from gawscompile.ir.sums import linear


def constant(numbers: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that stood in the model's code."""
    if isinstance(numbers, list):
        return torch.stack([constant(number, dtype) for number in numbers])
    return torch.full((), numbers, dtype=dtype)


def iota(*inputs: Any, dtype: torch.dtype, **keywords: Any) -> torch.Tensor:
    """``prims.iota``, which has no kernel for the short unsigned integers that an eye is made of."""
    wide = dtype if dtype in (torch.int32, torch.int64) else torch.int64
    made: torch.Tensor = torch.ops.prims.iota.default(*inputs, dtype=wide, **keywords)
    return made


_NAMED: dict[str, Callable[..., Any]] = {"linear": linear, "getitem": operator.getitem, "constant": constant}
_NAMES = {function: name for name, function in _NAMED.items()}
_TORCH = (torch.dtype, torch.memory_format, torch.layout)
_CASTS = ("prims.convert_element_type.default", "aten._to_copy.default", "aten.to.dtype")


CONSTANT = 64
"""Numbers of a constant at most that a recipe spells out."""


class RecipeError(ValueError):
    """A step that cannot be written down; the message names it."""


def hoisted(recipe: str, sources: list[torch.Tensor]) -> torch.Tensor:
    """The value of `recipe` for `sources`, laid out plainly."""
    return run(recipe, sources).contiguous()


def write(nodes: Sequence[Node], sources: Sequence[Node], holder: Any = None) -> str:
    """The recipe of the last of `nodes`, which are in order and read nothing but each other and `sources`.

    `holder` has what ``get_attr`` nodes name. Raises `RecipeError` where an operator or argument has no text.
    """
    numbers = {node: i for i, node in enumerate([*sources, *nodes])}
    steps = []
    for node in nodes:
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(holder)
            if not isinstance(held, torch.Tensor) or held.numel() > CONSTANT:
                raise RecipeError(f"{node.target} is too large a constant")
            steps.append(["constant", _plain([held.tolist(), held.dtype], numbers), {}])
            continue
        name = _NAMES.get(node.target) if callable(node.target) else None
        if name is None and not isinstance(node.target, torch._ops.OpOverload):
            raise RecipeError(f"{node.target} is no operator of torch's")
        inputs: Any = node.args
        steps.append([name or str(node.target), _plain(inputs, numbers), _plain(dict(node.kwargs), numbers)])
    return json.dumps(steps, separators=(",", ":"))


def _plain(value: Any, numbers: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return ["n", numbers[value]]
    if isinstance(value, (list, tuple)):
        return ["l", *[_plain(item, numbers) for item in value]]
    if isinstance(value, dict):
        return {key: _plain(item, numbers) for key, item in value.items()}
    if isinstance(value, _TORCH):
        return ["t", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["d", str(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeError(f"an argument of type {type(value).__name__}")


@functools.lru_cache(maxsize=4096)
def _steps(text: str) -> list[tuple[str, Callable[..., Any], Any, Any]]:
    found = []
    for name, inputs, keywords in json.loads(text):
        function: Any = iota if name == "prims.iota.default" else _NAMED.get(name)
        if function is None:
            function = operator.attrgetter(name)(torch.ops)
        found.append((name, function, inputs, keywords))
    return found


def run(text: str, sources: Sequence[torch.Tensor], exact: bool = False) -> Any:
    """Follow a recipe. `exact`: in fp64, where casts between floating dtypes are identities."""
    values: list[Any] = list(sources)
    for name, function, inputs, keywords in _steps(text):
        positional, named = _meant(inputs, values), {key: _meant(item, values) for key, item in keywords.items()}
        if exact and name in _CASTS and positional[0].is_floating_point():
            result = positional[0]
        else:
            result = function(*positional, **named)
        if exact and isinstance(result, torch.Tensor) and result.is_floating_point():
            result = result.double()
        values.append(result)
    return values[-1]


def _meant(value: Any, values: list[Any]) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "n":
        return values[rest[0]]
    if kind == "t":
        return getattr(torch, rest[0])
    return torch.device(rest[0]) if kind == "d" else [_meant(item, values) for item in rest]
