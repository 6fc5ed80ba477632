"""What a user may do between two calls of a compiled model: the rows of the table in ``docs/guarantees.md``."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from tests.graphs import randomise

VOCABULARY, WIDTH = 48, 32


class Small(nn.Module):
    """What the actions touch, in a model that compiles in a moment: an embedding, norms, projections, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop, self.o = nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.hook = self.norm.register_forward_hook(lambda module, given, made: made * 1.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embedding(ids) + self.shift
        x = self.norm(h)
        mixed = torch.tanh(self.q(x).to(h.dtype)) * self.k(x).to(h.dtype)
        return self.head((h + self.drop(self.o(mixed))).to(self.head.weight.dtype))


def lora(rank: int = 4, **settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q", "k", "o"], **settings})


def small(dora: bool = False, seed: int = 0) -> peft.PeftModel:
    """`Small` with two adapters, "default" and "other", of which the first is active; one where it is DoRA's."""
    model = peft.get_peft_model(Small(seed), lora(use_dora=dora))
    if not dora:
        model.add_adapter("other", lora(3))
    return randomise(model.eval(), seed, scale=0.3)


def ids(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % VOCABULARY


@dataclass
class Call:
    """How the next call is made, where an action is of the call and not of the model."""

    ids: torch.Tensor
    under: Callable[[], Any] = torch.no_grad


Action = Callable[[Any], Any]
"""Changes a model in place; may return a `Call`, or a context manager in which the next call is made."""

GROUPS: dict[str, dict[str, Action]] = {}


def _row(group: str, words: str, dora: bool = False) -> Callable[[Action], Action]:
    def note(action: Action) -> Action:
        GROUPS.setdefault(group, {})[words] = action
        action.dora = dora  # type: ignore[attr-defined]
        return action

    return note


def base(model: Any) -> Small:
    found: Any = model
    while not isinstance(found, Small):
        found = found.base_model.model if isinstance(found, peft.PeftModel) else found.model
    return found


def factors(model: Any, adapter: str = "default") -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if f".{adapter}." in name]


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


# ---- numbers ----------------------------------------------------------------------------------------------

NUMBERS = "Numbers of parameters"


@_row(NUMBERS, "an adapter written in place")
def _(model: Any) -> None:
    with torch.no_grad():
        for p in factors(model):
            p.mul_(1.5)


@_row(NUMBERS, "an adapter written through `.data`")
def _(model: Any) -> None:
    for p in factors(model):
        p.data.mul_(-0.5)


@_row(NUMBERS, "an adapter written through a numpy view")
def _(model: Any) -> None:
    for p in factors(model):
        p.detach().numpy()[...] *= 1.5


@_row(NUMBERS, "one number of an adapter written")
def _(model: Any) -> None:
    for p in factors(model):
        p.data.view(-1)[-1] += 5.0


@_row(NUMBERS, "an adapter given other memory (`p.data = x`)")
def _(model: Any) -> None:
    for p in factors(model):
        p.data = p.data * 1.5


@_row(NUMBERS, "an adapter written by another thread")
def _(model: Any) -> None:
    thread = threading.Thread(target=lambda: [p.data.mul_(1.5) for p in factors(model)])
    thread.start()
    thread.join()


@_row(NUMBERS, "an adapter written under `inference_mode`")
def _(model: Any) -> None:
    with torch.inference_mode():
        for p in factors(model):
            p.mul_(1.5)


@_row(NUMBERS, "a step of fused AdamW")
def _(model: Any) -> None:
    _step(model, torch.optim.AdamW(factors(model), lr=0.2, fused=True))


@_row(NUMBERS, "a step of SGD with `foreach`")
def _(model: Any) -> None:
    _step(model, torch.optim.SGD(factors(model), lr=0.1, foreach=True))


def _step(model: Any, optimizer: Any) -> None:
    for p in factors(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


@_row(NUMBERS, "`load_state_dict`")
def _(model: Any) -> None:
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})


@_row(NUMBERS, "`load_state_dict(assign=True)`")
def _(model: Any) -> None:
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()}, assign=True)


@_row(NUMBERS, "a parameter replaced by a new one")
def _(model: Any) -> None:
    for name in ("q", "o"):
        layer = getattr(base(model), name).base_layer
        layer.weight = nn.Parameter(layer.weight.detach() * -1.0, requires_grad=False)


@_row(NUMBERS, "a norm's weight and a buffer written through `.data`")
def _(model: Any) -> None:
    base(model).norm.weight.data.mul_(1.5)
    base(model).shift.data.add_(1.0)


@_row(NUMBERS, "a buffer replaced")
def _(model: Any) -> None:
    base(model).shift = base(model).shift + 1.0


@_row(NUMBERS, "parameters moved to shared memory and written there")
def _(model: Any) -> None:
    model.share_memory()
    for p in factors(model):
        p.data.mul_(1.5)


@_row(NUMBERS, "a base weight written in place")
def _(model: Any) -> None:
    with torch.no_grad():
        base(model).q.base_layer.weight.mul_(2.0)


@_row(NUMBERS, "a row of a DoRA's base weight written through `.data`", dora=True)
def _(model: Any) -> None:
    base(model).q.base_layer.weight.data[3] *= 40.0


@_row(NUMBERS, "a row of a DoRA's base weight written through numpy", dora=True)
def _(model: Any) -> None:
    base(model).q.base_layer.weight.detach().numpy()[3] *= 40.0


@_row(NUMBERS, "one number of a DoRA's base weight written", dora=True)
def _(model: Any) -> None:
    with torch.no_grad():
        base(model).o.base_layer.weight[5, 7] += 30.0


@_row(NUMBERS, "a DoRA's magnitude written through `.data`", dora=True)
def _(model: Any) -> None:
    for p in factors(model):
        p.data.mul_(1.5)


# ---- dtypes, shapes, layouts ------------------------------------------------------------------------------

METADATA = "Dtypes, shapes, memory"


@_row(METADATA, "the embedding to bf16")
def _(model: Any) -> None:
    base(model).embedding.to(torch.bfloat16)


@_row(METADATA, "the head to fp64")
def _(model: Any) -> None:
    base(model).head.to(torch.float64)


@_row(METADATA, "adapters alone to bf16")
def _(model: Any) -> None:
    for p in factors(model):
        p.data = p.data.to(torch.bfloat16)


@_row(METADATA, "the model to bf16")
def _(model: Any) -> None:
    model.to(torch.bfloat16)


@_row(METADATA, "the model to bf16 and back")
def _(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)
    for p in factors(model):
        p.data.mul_(1.5)


@_row(METADATA, "the vocabulary resized")
def _(model: Any) -> None:
    small = base(model)
    small.embedding.weight = nn.Parameter(torch.cat([small.embedding.weight, small.embedding.weight[:8]]).detach())
    small.head.weight = nn.Parameter(torch.cat([small.head.weight, small.head.weight[:8]]).detach())


@_row(METADATA, "a weight laid out by columns")
def _(model: Any) -> None:
    for layer in (base(model).q.base_layer, base(model).head):
        layer.weight.data = layer.weight.data.t().contiguous().t()


@_row(METADATA, "a weight that is a part of a larger tensor")
def _(model: Any) -> None:
    for layer in (base(model).q.base_layer, base(model).head):
        layer.weight.data = torch.cat([torch.zeros(3, WIDTH), layer.weight.data * 2.0])[3:]


@_row(METADATA, "a weight of another width")
def _(model: Any) -> None:
    base(model).head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH + 1))


# ---- modules ----------------------------------------------------------------------------------------------

MODULES = "Modules"


@_row(MODULES, "a linear replaced by one like it")
def _(model: Any) -> None:
    base(model).head = nn.Linear(WIDTH, VOCABULARY, bias=False)


@_row(MODULES, "a linear replaced by one with a bias")
def _(model: Any) -> None:
    base(model).head = nn.Linear(WIDTH, VOCABULARY)


@_row(MODULES, "a linear replaced by another kind of module")
def _(model: Any) -> None:
    base(model).head = nn.Sequential(nn.Linear(WIDTH, VOCABULARY), nn.Tanh())
    base(model).head.weight = base(model).head[0].weight


@_row(MODULES, "an adapted linear's base replaced")
def _(model: Any) -> None:
    base(model).q.base_layer = nn.Linear(WIDTH, WIDTH)


@_row(MODULES, "a bias taken away")
def _(model: Any) -> None:
    base(model).o.base_layer.bias = None


@_row(MODULES, "a bias added")
def _(model: Any) -> None:
    base(model).k.base_layer.bias = nn.Parameter(torch.ones(WIDTH))


@_row(MODULES, "a forward hook on a linear")
def _(model: Any) -> None:
    base(model).head.register_forward_hook(lambda module, given, made: made * 2.0)


@_row(MODULES, "a forward hook on an adapted linear's base")
def _(model: Any) -> None:
    base(model).q.base_layer.register_forward_hook(lambda module, given, made: made * 2.0)


@_row(MODULES, "a pre-hook on a norm")
def _(model: Any) -> None:
    base(model).norm.register_forward_pre_hook(lambda module, given: (given[0].tanh(),))


@_row(MODULES, "a hook that was there taken away")
def _(model: Any) -> None:
    base(model).hook.remove()


@_row(MODULES, "a norm's eps")
def _(model: Any) -> None:
    base(model).norm.eps = 3.0


@_row(MODULES, "one linear's `forward` overridden")
def _(model: Any) -> None:
    base(model).head.forward = lambda x: x @ base(model).head.weight.T * 3.0


@_row(MODULES, "a parametrization registered")
def _(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(base(model).head)
    with torch.no_grad():
        base(model).head.parametrizations.weight.original0.mul_(2.0)


@_row(MODULES, "`train()` with a dropout of 0")
def _(model: Any) -> None:
    model.train()
    base(model).drop.p = 0.0


@_row(MODULES, "`torch.func.functional_call` with other parameters")
def _(model: Any) -> Any:
    return _functional(base(model))


@contextlib.contextmanager
def _functional(small: Small) -> Any:
    """What `functional_call` does to a model for the time of a call."""
    before = small.head._parameters["weight"]
    small.head._parameters["weight"] = before * 2.0
    try:
        yield
    finally:
        small.head._parameters["weight"] = before


# ---- adapters ---------------------------------------------------------------------------------------------

ADAPTERS = "Adapters"


@_row(ADAPTERS, "`set_adapter` to another")
def _(model: Any) -> None:
    model.set_adapter("other")


@_row(ADAPTERS, "several adapters active")
def _(model: Any) -> None:
    model.base_model.set_adapter(["default", "other"])


@_row(ADAPTERS, "`disable_adapter`")
def _(model: Any) -> Any:
    return model.disable_adapter()


@_row(ADAPTERS, "another scaling")
def _(model: Any) -> None:
    for layer in layers(model):
        layer.scaling["default"] *= 3.0


@_row(ADAPTERS, "`scale_layer`")
def _(model: Any) -> None:
    for layer in layers(model):
        layer.scale_layer(0.5)


@_row(ADAPTERS, "`merge_adapter`")
def _(model: Any) -> None:
    model.merge_adapter()


@_row(ADAPTERS, "merged, unmerged, and another active")
def _(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("other")


@_row(ADAPTERS, "an adapter added and made active")
def _(model: Any) -> None:
    model.add_adapter("third", lora(5))
    model.set_adapter("third")
    randomise(model, seed=3, scale=0.3)


@_row(ADAPTERS, "the active adapter deleted, another made active")
def _(model: Any) -> None:
    model.set_adapter("other")
    model.delete_adapter("default")


@_row(ADAPTERS, "`load_adapter` from a folder, made active")
def _(model: Any) -> None:
    with saved(model, lora(6)) as folder:
        model.load_adapter(folder, "loaded")
    model.set_adapter("loaded")


@_row(ADAPTERS, "`add_weighted_adapter`")
def _(model: Any) -> None:
    model.add_weighted_adapter(["default", "other"], [0.7, 0.6], "both", combination_type="cat")
    model.set_adapter("both")


@_row(ADAPTERS, "`hotswap_adapter` of the same rank")
def _(model: Any) -> None:
    with saved(model, lora(4)) as folder:
        hotswap_adapter(model, folder, "default")


@_row(ADAPTERS, "`hotswap_adapter` of a lower rank")
def _(model: Any) -> None:
    with saved(model, lora(2)) as folder:
        hotswap_adapter(model, folder, "default")


@_row(ADAPTERS, "`hotswap_adapter` of a higher rank, unprepared")
def _(model: Any) -> None:
    with saved(model, lora(6)) as folder:
        hotswap_adapter(model, folder, "default")


@_row(ADAPTERS, "one layer's adapter dropped")
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


# ---- calls ------------------------------------------------------------------------------------------------

CALLS = "Calls"


@_row(CALLS, "another batch size and length")
def _(model: Any) -> Call:
    return Call(ids(3, 5))


@_row(CALLS, "one token")
def _(model: Any) -> Call:
    return Call(ids(1, 1))


@_row(CALLS, "no rows")
def _(model: Any) -> Call:
    return Call(ids(2, 3)[:0])


@_row(CALLS, "ids that are no contiguous tensor")
def _(model: Any) -> Call:
    return Call(ids(4, 6)[::2, ::2])


@_row(CALLS, "int32 ids")
def _(model: Any) -> Call:
    return Call(ids().to(torch.int32))


@_row(CALLS, "`inference_mode`")
def _(model: Any) -> Call:
    return Call(ids(), torch.inference_mode)


@_row(CALLS, "autocast to bf16")
def _(model: Any) -> Call:
    @contextlib.contextmanager
    def under() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            yield

    return Call(ids(), under)


@_row(CALLS, "gradients on")
def _(model: Any) -> Call:
    return Call(ids(), torch.enable_grad)


@_row(CALLS, "another number of threads")
def _(model: Any) -> Any:
    return _threads(1 if torch.get_num_threads() > 1 else 2)


@contextlib.contextmanager
def _threads(number: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_row(CALLS, "a deep copy of the model written to")
def _(model: Any) -> None:
    other = copy.deepcopy(model)
    for p in factors(other):
        p.data.mul_(7.0)


@_row(CALLS, "the model saved and its state dict kept")
def _(model: Any) -> None:
    torch.save(model.state_dict(), io.BytesIO())
