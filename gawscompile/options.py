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
    """Prove every rewrite on random inputs at compile time (`verify/proof.py`). ``GAWS_VERIFY=1``: the default."""

    autotune: bool = False
    """On a GPU, let Triton's autotuner choose warps and stages at the first launch; so does ``mode="max-autotune"``."""

    transparent: bool = False
    """On a GPU, show Inductor the Triton kernels themselves (`torch.library.triton_op`) instead of an opaque op, where
    the number of tokens is known and the plan keeps nothing between calls; for export ahead of time. Not yet run."""

    huge_pages: bool = True
    """On Linux, put weights on pages of 2 MiB where that costs no memory (`gawscompile.runtime.pages`).
    ``GAWS_HUGE_PAGES=0`` sets the default."""

    executor: bool = True
    """On a CPU, run Inductor's wrapper without Python (`gawscompile.runtime.executor`). ``GAWS_EXECUTOR=0`` sets the
    default."""

    training: bool | None = None
    """Take graphs that need gradients too, forward and backward (docs/training.md). None: on CPUs. ``GAWS_TRAINING=0``
    and ``1`` set the default."""

    watch: bool = True
    """Check Dynamo's guards on a model only after something changed (`gawscompile.watch.guards`). False: before every
    call. ``GAWS_WATCH=0`` sets the default."""

    bind: bool = True
    """Where guards are checked only after a change, gather a graph's parameters only then, too
    (`gawscompile.runtime.bound`)."""

    dump: str = ""
    """A folder for what the compiler did (`gawscompile.observe.dump`), in a subfolder per graph. ``GAWS_DUMP=DIR``."""

    disable: tuple[str, ...] = ()
    """Passes that do not run, by name. What they leave unfinished is spelled out for Inductor (`verify/unfinished.py`).
    ``GAWS_DISABLE=name,name``."""

    fuel: int | None = None
    """So many rewrites go ahead in each graph, then no more. ``GAWS_FUEL=n``: so many in all graphs of a process."""

    def key(self, traced: bool) -> str:
        """What of them decides the outcome of a compile, for cache keys: whether there is a dump, not where it goes."""
        decides = dataclasses.replace(self, dump="", huge_pages=True, executor=True, watch=True, bind=True)
        return f"{decides} traced={traced}"

    @staticmethod
    def split(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """Ours, and what is Inductor's. Raises `OptionError`, naming option, type and the good ones."""
        from torch._inductor import list_options

        ours: dict[str, Any] = {
            name: said not in ("", "0")
            for name, default in DEFAULTS
            if (said := os.environ.get(f"GAWS_{name.upper()}", default)) is not None
        }
        ours["dump"] = os.environ.get("GAWS_DUMP", "")
        ours["disable"] = tuple(filter(None, os.environ.get("GAWS_DISABLE", "").replace(" ", "").split(",")))
        theirs: dict[str, Any] = {}
        for name, value in (given or {}).items():
            if name in KINDS:
                ours[name] = _checked(name, value)
            elif name.replace("-", "_") in list_options():
                theirs[name.replace("-", "_")] = value
            else:
                good = ", ".join(f"{name}: {kind}" for name, kind in KINDS.items())
                raise OptionError(
                    f"unknown option {name!r} for backend 'gaws'. Its options are {good}; "
                    f"Inductor's names (torch._inductor.list_options()) are passed on to Inductor"
                )
        return Options(**ours), theirs


DEFAULTS = (
    *(("strict", "0"), ("verify", "0")),
    *(("huge_pages", "1"), ("executor", "1"), ("watch", "1")),
    ("training", None),
)
"""What the environment may say (``GAWS_STRICT``), and what holds where it says nothing. None: the option's default."""

KINDS = {
    **dict.fromkeys(("strict", "verify", "autotune", "transparent", "huge_pages"), "bool"),
    **dict.fromkeys(("executor", "training", "watch", "bind"), "bool"),
    "dump": "str (a folder)",
    "disable": "list of pass names",
    "fuel": "int (0 or more)",
}


def _checked(name: str, value: Any) -> Any:
    kind = KINDS[name]
    if kind == "bool" and type(value) is bool:
        return value
    if name == "dump" and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if name == "disable" and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if name == "fuel" and type(value) is int and value >= 0:
        return value
    raise OptionError(f"option {name!r} takes a {kind}, not {value!r}")


def process_fuel() -> int | None:
    """``GAWS_FUEL``, if it is set. Raises `OptionError` where it is no number."""
    text = os.environ.get("GAWS_FUEL", "")
    if text and not text.isdecimal():
        raise OptionError(f"GAWS_FUEL={text!r} is not a whole number of rewrites")
    return int(text) if text else None
