"""Random programs, small and whole: inputs, steps in torch's own spelling, outputs. A seed gives one program, always.

A program is data: every step is a line of Python that makes one value of earlier ones, so it can be printed, run,
traced step by step and taken apart (`tests.fuzz.shrink`). Sizes are names (``d0``), so that they can shrink too.
`structure.generate` puts it together of blocks there, in `bases` and in `adapters`; every step runs as it is added,
which tells shapes and dtypes, and leaves out whatever torch itself refuses.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F

NAMES = re.compile(r"\b[vpx]\d+\b")
"""A value made by a step, a stored tensor (parameter or buffer), an activation that the caller passes."""

SIZES = re.compile(r"\bd\d+\b")
GLOBALS: dict[str, Any] = {"torch": torch, "F": F}


@functools.lru_cache(maxsize=65536)
def compiled(text: str) -> CodeType:
    return compile(text, "<step>", "eval")


@dataclass(frozen=True)
class Input:
    """One argument. `shape`: expressions of sizes. `kind`: of the numbers that it holds (`draw`). `layout`: an
    expression of ``t``, a plain tensor of that shape, which makes the argument (``t.mT``: another order of memory; of
    an earlier input, by its name: an alias)."""

    name: str
    shape: tuple[str, ...]
    dtype: torch.dtype
    kind: str = "normal"
    layout: str = "t"

    @property
    def stored(self) -> bool:
        return self.name.startswith("p")


@dataclass(frozen=True)
class Step:
    """``name = text``."""

    name: str
    text: str

    @property
    def reads(self) -> list[str]:
        return list(dict.fromkeys(NAMES.findall(self.text)))

    @property
    def writes(self) -> bool:
        """Whether it writes to a value that is there already."""
        return re.search(r"\w_\(", self.text) is not None


@dataclass(frozen=True)
class Program:
    sizes: dict[str, int]
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """The blocks that it was put together of, for coverage."""

    @property
    def functional(self) -> bool:
        return not any(step.writes for step in self.steps)

    def size(self, expression: str) -> int:
        found = eval(compiled(expression), {}, self.sizes)
        assert isinstance(found, int)
        return found

    def call(self, *tensors: Any) -> tuple[Any, ...]:
        """The outputs for given inputs, which in-place steps may write to."""
        values = dict(zip((one.name for one in self.inputs), tensors, strict=True))
        scope = GLOBALS | self.sizes | values
        for step in self.steps:
            scope[step.name] = eval(compiled(step.text), scope)
        return tuple(scope[name] for name in self.outputs)

    def living(self) -> Program:
        """Without steps that no output and no write needs, without inputs and sizes that nothing reads."""
        needed = set(self.outputs)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if step.name in needed or step.writes:
                kept.append(step)
                needed.update(step.reads)
        for one in reversed(self.inputs):
            if one.name in needed:
                needed.update(NAMES.findall(one.layout))
        inputs = tuple(one for one in self.inputs if one.name in needed)
        text = " ".join([*(step.text for step in kept), *(s for one in inputs for s in (*one.shape, one.layout))])
        sizes = {name: size for name, size in self.sizes.items() if name in set(SIZES.findall(text))}
        return replace(self, sizes=sizes, inputs=inputs, steps=tuple(reversed(kept)))

    def source(self, call: str = "") -> str:
        """A runnable module: the inputs, the function, and `call`, which may use ``program`` and ``inputs``."""
        lines = ["import torch", "import torch.nn.functional as F", "", "torch.manual_seed(0)"]
        lines += [f"{name} = {size}" for name, size in self.sizes.items()]
        for one in self.inputs:
            shape = f"({', '.join(one.shape)}{',' * (len(one.shape) == 1)})"
            made = _PRINTED[one.kind].format(shape=shape, dtype=one.dtype)
            lines.append(f"{one.name} = {_PLAIN.sub(lambda _, made=made: made, one.layout)}")
        arguments = ", ".join(one.name for one in self.inputs)
        lines += ["", "", f"def program({arguments}):"]
        lines += [f"    {step.name} = {step.text}" for step in self.steps]
        lines += [f"    return {', '.join(self.outputs)}{',' * (len(self.outputs) == 1)}", "", ""]
        return "\n".join([*lines, f"inputs = [{arguments}]", *([call] if call else [])]) + "\n"


_PRINTED = {
    "normal": "torch.randn({shape}, dtype=torch.float64).to({dtype})",
    "weight": "(torch.randn({shape}, dtype=torch.float64) / 4).to({dtype})",
    "positive": "(torch.rand({shape}, dtype=torch.float64) + 0.5).to({dtype})",
    "integer": "torch.randint(-9, 10, {shape}).to({dtype})",
    "mask": "torch.randint(0, 2, {shape}).to({dtype})",
}
_PLAIN = re.compile(r"(?<![.\w])t\b")


def draw(kind: str, sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A plain tensor with numbers of a kind (a key of `_PRINTED`)."""
    sizes = tuple(sizes)
    if kind == "integer":
        return torch.randint(-9, 10, sizes, generator=generator).to(dtype)
    if kind == "mask":
        return torch.randint(0, 2, sizes, generator=generator).to(dtype)
    if kind == "positive":
        return (torch.rand(sizes, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    numbers = torch.randn(sizes, generator=generator, dtype=torch.float64)
    return (numbers / 4 if kind == "weight" else numbers).to(dtype)


class Unfit(Exception):
    """A step that torch refuses: the block that wanted it is left out."""


@dataclass
class Draft:
    """A program in the making, with the value of everything so far."""

    rng: random.Random
    dtype: torch.dtype = torch.float32
    sizes: dict[str, int] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    scope: dict[str, Any] = field(default_factory=lambda: dict(GLOBALS))
    notes: list[str] = field(default_factory=list)
    tie: float = 0.15
    """How likely a parameter is one that another part of the program has already."""

    # ---- choices ------------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def number(self) -> str:
        """A scale, as text."""
        return str(self.pick("2.0", "0.5", "-1.0", "3", "1.5", "-0.25", "1.0"))

    # ---- values -------------------------------------------------------------------------------------------

    def size(self, value: int) -> str:
        """A size of its own."""
        name = f"d{len(self.sizes)}"
        self.sizes[name] = self.scope[name] = value
        return name

    def value(self, name: str) -> torch.Tensor:
        found = self.scope[name]
        assert isinstance(found, torch.Tensor)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.value(name).shape)

    def kind(self, name: str) -> torch.dtype:
        return self.value(name).dtype

    def new(self, stem: str, shape: Sequence[str], dtype: torch.dtype, kind: str = "weight", layout: str = "t") -> str:
        """A new input; `stem` p (stored) or x."""
        name = f"{stem}{len(self.inputs)}"
        one = Input(name, tuple(shape), dtype, kind, layout)
        self.inputs.append(one)
        sizes = tuple(eval(compiled(expression), {}, self.sizes) for expression in one.shape)
        plain = draw(kind, sizes, dtype, torch.Generator().manual_seed(len(self.inputs)))
        self.scope[name] = eval(compiled(layout), self.scope | {"t": plain})
        return name

    def parameter(self, *shape: str, dtype: torch.dtype | None = None, kind: str = "weight", layout: str = "t") -> str:
        """A stored tensor of that shape: a new one, or one that is shared with another part of the program."""
        dtype = dtype or self.dtype
        alike = [i.name for i in self.inputs if i == Input(i.name, shape, dtype, kind, layout) and i.stored]
        if alike and self.chance(self.tie):
            return str(self.pick(*alike))
        return self.new("p", shape, dtype, kind, layout)

    def let(self, text: str) -> str:
        """A step. Raises `Unfit` where torch refuses it."""
        name = f"v{len(self.steps)}"
        try:
            found = eval(compiled(text), self.scope)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            raise Unfit(f"{text}: {error}") from None
        self.steps.append(Step(name, text))
        self.scope[name] = found
        return name

    @contextmanager
    def attempt(self, note: str) -> Iterator[None]:
        """A block: all of it, or where torch refuses a step, nothing."""
        steps, inputs = len(self.steps), len(self.inputs)
        try:
            yield
            self.notes.append(note)
        except Unfit:
            if not any(step.writes for step in self.steps[steps:]):
                for gone in (*self.steps[steps:], *self.inputs[inputs:]):
                    self.scope.pop(gone.name, None)
                del self.steps[steps:], self.inputs[inputs:]

    def finish(self, outputs: Sequence[str]) -> Program:
        whole = Program(
            dict(self.sizes), tuple(self.inputs), tuple(self.steps), tuple(outputs), tuple(dict.fromkeys(self.notes))
        )
        return whole.living()
