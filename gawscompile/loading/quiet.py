"""What torch, torchao and bitsandbytes say while they are loaded, that no user can act on."""

from __future__ import annotations

import logging
import os


def quiet() -> None:
    """For commands: no warnings of GPU extensions that are missing (torchao), of a call that torch deprecates and makes
    itself, and no lines of its profiler. To be called before these are imported."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
