"""Adapters that people train, as PEFT tuners: GAWS, GAWS-D, zFLoRA. Importing this package makes them known to PEFT.

The only part of gawscompile that imports PEFT and transformers; raises `ImportError` with the remedy without them.
"""

from __future__ import annotations

from gawscompile.adapters.support import AdapterType, register, require_peft

require_peft()

from gawscompile.adapters.approximate import Approximation, ApproximationError, approximate  # noqa: E402
from gawscompile.adapters.config import GAWSConfig, GAWSDConfig  # noqa: E402
from gawscompile.adapters.listing import ValidSplits, valid_splits  # noqa: E402
from gawscompile.adapters.model import GAWSDModel, GAWSModel  # noqa: E402
from gawscompile.adapters.splits import SplitError, Splits  # noqa: E402
from gawscompile.adapters.streams import ZFLoRAConfig  # noqa: E402
from gawscompile.adapters.zflora import ZFLoRAModel  # noqa: E402

register(AdapterType.GAWS, GAWSConfig, GAWSModel, GAWSModel.prefix)
register(AdapterType.GAWSD, GAWSDConfig, GAWSDModel, GAWSDModel.prefix)
register(AdapterType.ZFLORA, ZFLoRAConfig, ZFLoRAModel, ZFLoRAModel.prefix)

__all__ = [
    "Approximation",
    "ApproximationError",
    "GAWSConfig",
    "GAWSDConfig",
    "GAWSDModel",
    "GAWSModel",
    "SplitError",
    "Splits",
    "ValidSplits",
    "ZFLoRAConfig",
    "ZFLoRAModel",
    "approximate",
    "valid_splits",
]
