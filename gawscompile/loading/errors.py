"""What cannot be fetched or loaded is said in one line."""

from __future__ import annotations

EXTRA = "pip install 'gawscompile[models]'"


class ModelError(RuntimeError):
    """A model could not be fetched, converted or loaded; the message names the remedy."""
