"""The options of the backend: one frozen dataclass, checked when the backend is called."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class OptionError(ValueError):
    """An option that does not exist or has the wrong type; the message lists the good ones."""


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="gaws", options={…})`` takes, beside Inductor's own option names."""

    strict: bool = False
    """Raise where the default is to warn and leave the graph to Inductor. ``GAWS_STRICT=1`` sets the default."""

    verify: bool = False
    """Prove every rewrite on random inputs at compile time (`gawscompile.proof`). ``GAWS_VERIFY=1``: the default."""

    autotune: bool = False
    """On a GPU, let Triton's autotuner choose warps and stages at the first launch; so does ``mode="max-autotune"``."""

    transparent: bool = False
    """On a GPU, show Inductor the Triton kernels themselves (`torch.library.triton_op`) instead of an opaque op, where
    the number of tokens is known and the plan keeps nothing between calls; for export ahead of time. Not yet run."""

    @staticmethod
    def split(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """Ours, and what is Inductor's. Raises `OptionError`, naming option, type and the good ones."""
        from torch._inductor import list_options

        ours: dict[str, Any] = {
            name: os.environ.get(f"GAWS_{name.upper()}", "0") not in ("", "0") for name in ("strict", "verify")
        }
        theirs: dict[str, Any] = {}
        fields = {field.name: field for field in dataclasses.fields(Options)}
        for name, value in (given or {}).items():
            if name in fields:
                ours[name] = _checked(name, value, fields[name].default)
            elif name.replace("-", "_") in list_options():
                theirs[name.replace("-", "_")] = value
            else:
                good = ", ".join(f"{f.name}: {type(f.default).__name__}" for f in fields.values())
                raise OptionError(
                    f"unknown option {name!r} for backend 'gaws'. Its options are {good}; "
                    f"Inductor's names (torch._inductor.list_options()) are passed on to Inductor"
                )
        return Options(**ours), theirs


def _checked(name: str, value: Any, default: Any) -> Any:
    if type(value) is not type(default):
        raise OptionError(f"option {name!r} takes a {type(default).__name__}, not {value!r}")
    return value
