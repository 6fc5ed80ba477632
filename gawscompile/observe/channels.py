"""Makes ``TORCH_LOGS="+gaws"`` and its artifacts known to torch, which refuses names that it does not know.

Torch calls `register` when it is imported (the entry point in the group ``torch.backends``), before it reads the
variable. So this module imports nothing else, and nothing here may raise.
"""

from __future__ import annotations

import contextlib

LOG = "gaws"
"""Not "gawscompile", which warns: torch takes the loggers that it knows of away from the root's handlers."""

ARTIFACTS = {
    "gaws_passes": "what each pass of gawscompile matched, and what it changed in the graph",
    "gaws_plans": "the groups of projections that gawscompile formed, each with its plan and what the plans cost",
    "gaws_kernels": "the kernels that gawscompile generated, with their specs",
    "gaws_rejections": "the linears that gawscompile left as they were, with the reason",
}


def register() -> None:
    """Again does nothing."""
    with contextlib.suppress(Exception):  # whatever torch makes of its internals, importing it must not fail for this
        from torch._logging import _internal

        if not _internal.log_registry.is_log(LOG):
            _internal.register_log(LOG, LOG)
            for name, what in ARTIFACTS.items():
                _internal.register_artifact(name, what, visible=True)
