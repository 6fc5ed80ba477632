"""What Dynamo cannot trace of PEFT, said in a way that it can. Installed when the backend loads.

PEFT's DoRA asks for the class of its base weight in every forward (`peft.utils.integrations.dequantize_module_weight`),
in words that Dynamo breaks the graph at: seven graphs a layer, under any compiler. For a plain `Parameter` the answer
is the weight itself; for everything else the function is traced as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
import types

import torch

log = logging.getLogger("gawscompile")


def install() -> None:
    """Teach Dynamo, once in a process; waits while nobody has imported PEFT."""
    if "peft" in sys.modules:
        _install()


@functools.cache
def _install() -> None:
    try:
        from peft.utils import integrations

        original = integrations.dequantize_module_weight
    except (ImportError, AttributeError):
        return
    untouched = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)

    def dequantize_module_weight(module: torch.nn.Module) -> torch.nn.Parameter:
        if not hasattr(module, "W_q") and type(module.weight) is torch.nn.Parameter:
            return module.weight
        found: torch.nn.Parameter = untouched(module)
        return found

    try:
        torch.compiler.substitute_in_graph(original, skip_signature_check=True)(dequantize_module_weight)
    except Exception as error:  # a Dynamo that will not be taught: graphs break there as before
        log.info("gaws: PEFT's DoRA will break graphs: %s", error)
