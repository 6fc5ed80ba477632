"""Actions on adapters, by PEFT's own calls."""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

from tests.actions.table import Small, base, layers, lora, row
from tests.graphs import randomise

ADAPTERS = "Adapters"


@row(ADAPTERS, "`set_adapter` to another")
def _(model: Any) -> None:
    model.set_adapter("other")


@row(ADAPTERS, "several adapters active")
def _(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


@row(ADAPTERS, "`disable_adapter`")
def _(model: Any) -> Any:
    return model.disable_adapter()


@row(ADAPTERS, "another scaling")
def _(model: Any) -> None:
    for layer in layers(model):
        layer.scaling["default"] *= 3.0


@row(ADAPTERS, "`scale_layer`")
def _(model: Any) -> None:
    for layer in layers(model):
        layer.scale_layer(0.5)


@row(ADAPTERS, "`merge_adapter`")
def _(model: Any) -> None:
    model.merge_adapter()


@row(ADAPTERS, "merged, unmerged, and another active")
def _(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("other")


@row(ADAPTERS, "an adapter added and made active")
def _(model: Any) -> None:
    model.add_adapter("third", lora(5))
    model.set_adapter("third")
    randomise(model, seed=3, scale=0.3)


@row(ADAPTERS, "the active adapter deleted, another made active")
def _(model: Any) -> None:
    model.set_adapter("other")
    model.delete_adapter("default")


@row(ADAPTERS, "`load_adapter` from a folder, made active")
def _(model: Any) -> None:
    with saved(model, lora(6)) as folder:
        model.load_adapter(folder, "loaded")
    model.set_adapter("loaded")


@row(ADAPTERS, "`add_weighted_adapter`")
def _(model: Any) -> None:
    model.add_weighted_adapter(["default", "other"], [0.7, 0.6], "both", combination_type="cat")
    model.set_adapter("both")


@row(ADAPTERS, "`hotswap_adapter` of the same rank")
def _(model: Any) -> None:
    with saved(model, lora(4)) as folder:
        hotswap_adapter(model, folder, "default")


@row(ADAPTERS, "`hotswap_adapter` of a lower rank")
def _(model: Any) -> None:
    with saved(model, lora(2)) as folder:
        hotswap_adapter(model, folder, "default")


@row(ADAPTERS, "`hotswap_adapter` of a higher rank, unprepared")
def _(model: Any) -> None:
    with saved(model, lora(6)) as folder:
        hotswap_adapter(model, folder, "default")


@row(ADAPTERS, "one layer's adapter dropped")
def _(model: Any) -> None:
    base(model).q.delete_adapter("default")


@contextlib.contextmanager
def saved(model: Any, config: peft.LoraConfig) -> Any:
    """A folder with another adapter for the same base, with the scaling that "default" has."""
    torch.manual_seed(5)
    other = randomise(peft.get_peft_model(Small(), config), seed=5, scale=0.4)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        other.save_pretrained(folder)
        yield folder
