"""gawscompile: ``torch.compile(model, backend="gaws")`` for models with unmerged adapters.

Importing this package does no work: the backend loads when torch.compile asks for it, or at the first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gawscompile.banks.bank import AdapterBank
    from gawscompile.banks.checkpoints import BankError
    from gawscompile.debug.explain import Report, explain
    from gawscompile.runtime.pages import own_memory
    from gawscompile.serving.entry import compile

__version__ = "0.1.0"
__all__ = ["AdapterBank", "BankError", "Report", "__version__", "compile", "explain", "own_memory"]


def __getattr__(name: str) -> Any:
    if name in ("explain", "Report"):
        from gawscompile.debug import explain as module

        return getattr(module, name)
    if name in ("AdapterBank", "BankError"):
        from gawscompile.banks import bank

        return getattr(bank, name)
    if name == "compile":
        from gawscompile.serving import entry

        return entry.compile
    if name == "own_memory":
        from gawscompile.runtime import pages

        return pages.own_memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
