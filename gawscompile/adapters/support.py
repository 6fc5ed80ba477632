"""What these adapters need of PEFT, and how they enter it.

PEFT keeps types in tables from a name to classes (`peft.mapping`), by an enum that has no room for others' members.
Its members are strings, and its tables look them up as strings, so an enum of our own does: nothing of PEFT's changes.
"""

from __future__ import annotations

import importlib.util
from enum import Enum
from importlib import metadata
from typing import Any

OLDEST = (0, 21)
"""The first PEFT whose tuners select and rename their own keys on saving and loading."""
TESTED = "0.21.2"
HOOKS = (
    "_prepare_adapter_config",
    "_prepare_model",
    "_check_target_module_exists",
    "_create_and_replace",
    "_post_injection_hook",
    "_cast_adapter_dtype",
    "_remap_adapter_state_dict_for_load",
    "_get_adapter_state_dict",
)
"""What our tuners override or rely on in `BaseTuner`."""
TABLES = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")


class AdapterType(str, Enum):
    """The ``peft_type`` of our configurations, equal to its name as a string."""

    GAWS = "GAWS"
    GAWSD = "GAWSD"
    ZFLORA = "ZFLORA"


def require_peft() -> None:
    """Raises `ImportError` with the remedy where PEFT is missing, too old, or no longer has what we build on."""
    missing = [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"gawscompile.adapters needs {' and '.join(missing)}: pip install 'gawscompile[models]'", name=missing[0]
        )
    oldest = ".".join(map(str, OLDEST))
    version = metadata.version("peft")
    from packaging.version import Version  # PEFT depends on it

    if Version(version).release[:2] < OLDEST:
        raise ImportError(
            f"gawscompile.adapters needs peft >= {oldest} (tested with {TESTED}), and this is peft {version}:"
            f" pip install -U 'peft>={oldest}'",
            name="peft",
        )
    from peft import mapping
    from peft.tuners.tuners_utils import BaseTuner

    lacking = [f"BaseTuner.{name}" for name in HOOKS if not hasattr(BaseTuner, name)]
    lacking += [f"peft.mapping.{name}" for name in TABLES if not hasattr(mapping, name)]
    if lacking:
        raise ImportError(
            f"peft {version} is too new for this gawscompile, or changed: it has no {', '.join(lacking)}. Supported are"
            f" peft >= {oldest} up to about {TESTED}: pip install 'peft=={TESTED}'",
            name="peft",
        )


def register(kind: AdapterType, config: type, tuner: type, prefix: str) -> None:
    """Makes `config` and `tuner` known to PEFT under `kind`. Doing it again is harmless.

    Raises `RuntimeError` where another package has taken the name, since its checkpoints would then load as ours.
    """
    from peft import mapping

    entries: dict[str, Any] = dict(zip(TABLES, (config, tuner, prefix), strict=True))
    for table in TABLES[:2]:
        present = getattr(mapping, table).get(kind)
        if present is not None and _name(present) != _name(entries[table]):
            raise RuntimeError(f"PEFT already has a type {kind.value}, from {present.__module__}; only one can be used")
    for table, entry in entries.items():
        getattr(mapping, table)[kind] = entry


def _name(found: type) -> tuple[str, str]:
    """Stays the same where a module is reloaded, unlike the class."""
    return found.__module__, found.__qualname__
