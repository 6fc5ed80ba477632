"""Records and dumps that are gone: a graph from a warm cache goes through our passes once more, for them alone.

Inductor's cache and ours are folders of their own. Where ours was cleared, or its oldest entries were dropped, a graph
that runs fused would have no record, and `explain` could not say what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

log = logging.getLogger("gawscompile")


def passes_alone(gm: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], hook: Any) -> None:
    """Everything that comes before Inductor, and nothing after it: then `hook`, which `patches` hold as the pass of the
    joint graph, has its record and dumps. What was compiled stays what it is. Never raises."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def stop(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no pass ran before Inductor")

    try:
        with config.patch(enable_autograd_cache=False):
            compile_fx(gm, list(inputs), inner_compile=stop, config_patches=patches)
    except Exception as error:
        if hook.record is None:  # else it was `stop` that ended it
            log.warning("gaws: what became of a graph from a warm cache is not known: %s", error)
