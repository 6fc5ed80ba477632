"""What Dynamo cannot trace of PEFT, said in a way that it can. Installed when the backend loads.

PEFT's DoRA asks for the class of its base weight in every forward (`peft.utils.integrations.dequantize_module_weight`),
and makes a new Parameter of a Conv1D's transposed weight (`peft.utils.other.transpose`), in words that Dynamo breaks
the graph at: several graphs a layer, under any compiler. For a plain `Parameter` the first answer is the weight itself,
and the second its transpose, cut off from its gradient; everything else is traced as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("gawscompile")


def install() -> None:
    """Teach Dynamo, once in a process; waits while nobody has imported PEFT."""
    if "peft" in sys.modules:
        _install()


@functools.cache
def _install() -> None:
    try:
        from peft.utils import integrations, other

        dequantize, turn = integrations.dequantize_module_weight, other.transpose
    except (ImportError, AttributeError):
        return
    untouched, plain_turn = _copy(dequantize), _copy(turn)

    def dequantize_module_weight(module: torch.nn.Module) -> Any:
        if not hasattr(module, "W_q") and type(module.weight) is torch.nn.Parameter:
            return module.weight
        return untouched(module)

    def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> Any:
        if fan_in_fan_out and type(weight) is torch.nn.Parameter:
            return weight.T.detach()
        return plain_turn(weight, fan_in_fan_out)

    _teach(dequantize, dequantize_module_weight)
    _teach(turn, transpose)


def _teach(original: Any, told: Any) -> None:
    try:
        torch.compiler.substitute_in_graph(original, skip_signature_check=True)(told)
    except Exception as error:  # a Dynamo that will not be taught: graphs break there as before
        log.info("gaws: PEFT's %s will break graphs: %s", original.__name__, error)


def _copy(function: Any) -> Callable[..., Any]:
    """The same function as another object, which nothing stands in for."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
