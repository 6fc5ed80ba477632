"""What Triton kernels are printed from: blocks of ranges, phrases of Triton, and kernels made of cases.

`triton_kernels` says what the kernels of a plan do, in these terms. Whatever a spec fixes is left out of the text:
a mask where a block divides the range, a loop of one step, a cast to the same dtype, a branch with one way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TL = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}
POINTER = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "f64": "*fp64", "i32": "*i32"}
WIDTH = 88  # of a line before its indentation


# --- How ranges are cut into blocks ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A range of `size` in blocks of `block`, a power of two."""

    size: int
    block: int

    @property
    def steps(self) -> int:
        return -(-self.size // self.block)

    @property
    def masked(self) -> bool:
        return self.size % self.block != 0

    def mask(self, text: str) -> str:
        """`text` where the range ends within a block, else nothing."""
        return text if self.masked else ""


def cut(size: int, blocks: Sequence[int], least: int = 1) -> Cut:
    """Cut by the largest of `blocks` (descending) that divides `size`, or else by one that needs a mask."""
    for block in blocks:
        if size % block == 0:
            return Cut(size, block)
    return Cut(size, min(blocks[0], max(least, 1 << (size - 1).bit_length())))


# --- Layout ------------------------------------------------------------------------------------------------


def indent(lines: Iterable[str]) -> list[str]:
    return ["    " + line if line else line for line in lines]


def call(head: str, arguments: Iterable[str], tail: str = "") -> list[str]:
    """``head(arguments)tail``, one argument a line where one line is too short."""
    arguments = list(arguments)
    line = f"{head}({', '.join(arguments)}){tail}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{head}(", *indent(f"{argument}," for argument in arguments), f"){tail}"]


def assign(pairs: dict[str, str]) -> list[str]:
    """``a, b = c, d``, or one assignment a line where one line is too short."""
    line = f"{', '.join(pairs)} = {', '.join(pairs.values())}"
    return [line] if len(line) <= WIDTH else [f"{name} = {value}" for name, value in pairs.items()]


def function(head: str, name: str, params: Iterable[str], doc: str, body: Iterable[str]) -> str:
    return "\n".join([head, *call(f"def {name}", params, ":"), *indent([f'"""{doc}"""', *body])])


def branches(ways: Sequence[tuple[int, list[str]]]) -> list[str]:
    """Program ids → ways, each taken by a number of them: ``if block < 4: … elif block < 8: … else: …``."""
    if len(ways) == 1:
        return ways[0][1]
    lines: list[str] = []
    end = 0
    for i, (programs, body) in enumerate(ways):
        end += programs
        test = "else" if i == len(ways) - 1 else f"{'elif' if i else 'if'} block < {end}"
        lines += [f"{test}:", *indent(body)]
    return lines


# --- Phrases of Triton -------------------------------------------------------------------------------------


def constant(name: str, value: int) -> str:
    return f"{name}: tl.constexpr = {value}"


def load(target: str, pointer: str, masks: Iterable[str], dtype: str, to: str = "f32", view: str = "") -> list[str]:
    """``target tl.load(pointer)``, masked where there are `masks`, cast where the dtypes differ, then `view`."""
    mask = _mask(masks)
    cast = f".to({TL[to]})" if dtype != to else ""
    return call(f"{target} tl.load", [pointer, *([*mask, "other=0.0"] if mask else [])], cast + view)


def store(pointer: str, value: str, dtype: str, masks: Iterable[str] = ()) -> list[str]:
    """Store `value`, which is fp32, as `dtype`."""
    cast = f".to({TL[dtype]})" if dtype != "f32" else ""
    return call("tl.store", [pointer, value + cast, *_mask(masks)])


def _mask(masks: Iterable[str]) -> list[str]:
    present = [mask for mask in masks if mask]
    return [f"mask={' & '.join(present)}"] if present else []


def loop(range_: Cut, header: str, body: list[str]) -> list[str]:
    """`body` under `header`, or alone where one step does it all."""
    return [f"{header}:", *indent(body)] if range_.steps > 1 else body


def index(range_: Cut, name: str, mask: str, block: str, step: str, end: str) -> list[str]:
    """`name`, the positions of one step, and `mask` if the range ends within a block."""
    start = f"{step} + " if range_.steps > 1 else ""
    return [f"{name} = {start}tl.arange(0, {block})", *[f"{mask} = {name} < {end}"] * range_.masked]


def zeros(range_: Cut, shape: str, name: str = "acc") -> list[str]:
    """An accumulator, where a loop needs one."""
    return [f"{name} = tl.zeros({shape}, tl.float32)"] * (range_.steps > 1)


def dot(left: str, right: str, dtype: str, accumulate: bool, into: str = "acc") -> list[str]:
    options = ['input_precision="ieee"'] * (dtype == "f32")  # never tf32
    return call(f"{into} = tl.dot", [left, right, *[into] * accumulate, *options])


def scaled(scale: float | None, dtype: str, name: str, value: str) -> str:
    """`value` times a number, or times the 0-d tensor `name` of `dtype` where it is None."""
    if scale is None:
        return f"tl.load({name}){'.to(tl.float32)' * (dtype != 'f32')} * {value}"
    if not math.isfinite(scale):  # its repr is no expression
        return f'float("{scale}") * {value}'
    return value if scale == 1.0 else f"{scale!r} * {value}"


def words(lines: Iterable[str]) -> set[str]:
    """The names in `lines`, comments aside."""
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return set(re.findall(r"\w+", code))


def defining(definitions: Sequence[str], body: Sequence[str]) -> list[str]:
    """`body` after those of `definitions`, ``name = value`` each, whose names it or a later one of them reads."""
    lines = list(body)
    for definition in reversed(definitions):
        if words([definition.split("=")[0].split(":")[0]]) & words(lines):
            lines.insert(0, definition)
    return lines


def plus(name: str, offset: int) -> str:
    return f"{name} + {offset}" if offset else name


def times(name: str, factor: int) -> str:
    return f"{name} * {factor}" if factor > 1 else name


# --- Kernels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: what the work calls it, what the host calls it, and its dtype."""

    role: str
    name: str
    dtype: str


@dataclass(frozen=True)
class Work:
    """What a program does once its tensors are picked; `doc` has a place for the labels of the cases it serves.
    `helpers` are functions that it calls."""

    doc: str
    body: tuple[str, ...]
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """`programs` programs do `work` on `tensors`, on columns of u from `column` on; N, if any, is their row count."""

    label: str
    work: Work
    tensors: tuple[Tensor, ...]
    programs: int
    column: int
    n: int | None = None

    @property
    def kind(self) -> tuple[Work, tuple[tuple[str, str], ...]]:
        """Cases of one kind can share code: a pointer that is chosen in a branch must be of one type."""
        return self.work, tuple((tensor.role, tensor.dtype) for tensor in self.tensors)


class Group:
    """Cases of one kind. They share its code, and choose their tensors by program id.

    Sharing is more than brevity: Triton gives every branch shared memory of its own, so five siblings with a tile
    in each branch would not fit an H100. A chosen pointer keeps the alignment that all of its choices have.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.programs = sum(case.programs for case in cases)
        self.tensors = [tensor for case in cases for tensor in case.tensors]
        self.doc = cases[0].work.doc.format(", ".join(case.label for case in cases))

    def names(self) -> list[str]:
        """The tensor parameters of this group's code: by role if there is nothing to choose."""
        return [tensor.role if len(self.cases) == 1 else tensor.name for tensor in self.tensors]

    def updates(self, tensor: Tensor) -> bool:
        """Whether it is an output that the work reads before it writes it."""
        return tensor.role == "y" and bool(re.search(r"tl\.load\(\s*y\b", "\n".join(self.cases[0].work.body)))

    def body(self) -> list[str]:
        sizes = {case.n for case in self.cases}
        fixed = [constant("N", n) for n in sizes if n is not None] if len(sizes) == 1 else []
        ways = []
        first = 0
        for case in self.cases:
            chosen = {tensor.role: tensor.name for tensor in case.tensors} if len(self.cases) > 1 else {}
            chosen |= {"N": str(case.n)} if len(sizes) > 1 else {}
            moves = [f"u += {case.column}"] * bool(case.column) + [f"block -= {first}"] * bool(first)
            ways.append((case.programs, [*(assign(chosen) if chosen else []), *moves]))
            first += case.programs
        choice = branches(ways)
        return [*choice, *[""] * bool(choice), *fixed, *self.cases[0].work.body]


@dataclass(frozen=True)
class Kernel:
    """One launch. `shared` are tensors of every case; groups share the second axis of the grid.

    `prologue` defines `block` and the names in `passed`, which the code of a group may use. `extra` are further
    parameters with their Triton types, `options` what the host passes to Triton, and `choices` what Triton's autotuner
    may pass instead. `helpers` are functions that the code calls.
    """

    name: str
    doc: str
    shared: tuple[Tensor, ...]
    cases: tuple[Case, ...]
    prologue: tuple[str, ...]
    passed: tuple[str, ...]
    extra: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, int], ...]
    choices: tuple[tuple[tuple[str, int], ...], ...] = ()
    helpers: tuple[str, ...] = ()

    @property
    def programs(self) -> int:
        """The length of the grid's second axis."""
        return sum(case.programs for case in self.cases)

    def groups(self) -> list[Group]:
        kinds = dict.fromkeys(case.kind for case in self.cases)
        return [Group([case for case in self.cases if case.kind == kind]) for kind in kinds]

    def own(self) -> list[tuple[str, Tensor, Group]]:
        """The parameters for tensors of single groups: by role where there is one group with nothing to choose."""
        groups = self.groups()
        named = [(group.names() if len(groups) == 1 else [t.name for t in group.tensors], group) for group in groups]
        return [
            (name, t, group) for names, group in named for name, t in zip(names, group.tensors, strict=True)
        ]

    def types(self) -> dict[str, str]:
        """Parameters and their Triton types, in order."""
        own = {name: POINTER[tensor.dtype] for name, tensor, _ in self.own()}
        return {**{tensor.name: POINTER[tensor.dtype] for tensor in self.shared}, **own, **dict(self.extra)}

    def source(self, tuned: bool = False) -> str:
        """The kernel; where cases differ in their work, after a function for each kind of work. `tuned`: under
        Triton's autotuner, whose trials find what they write to as it was."""
        groups = self.groups()
        if len(groups) == 1:
            parts, doc, body = [], groups[0].doc, groups[0].body()
        else:
            parts, doc = [self._part(i, group) for i, group in enumerate(groups)], self.doc
            body = branches([(group.programs, self._call(i, group)) for i, group in enumerate(groups)])
        # A new number of tokens must not compile a new kernel in the middle of a generation.
        head = '@triton.jit(do_not_specialize=["m"])' if "m" in self.types() else "@triton.jit"
        if tuned:
            head = "\n".join([*self._autotuner(), head])
        kernel = function(head, self.name, map(self._param, self.types()), doc, [*self.prologue, *body])
        called = dict.fromkeys([*self.helpers, *(text for case in self.cases for text in case.work.helpers)])
        return "\n\n\n".join([*called, *parts, kernel])

    def _autotuner(self) -> list[str]:
        configs = []
        for choice in self.choices:
            named = ", ".join(f"{name}={value}" for name, value in choice)
            configs.append(f"triton.Config({{}}, {named}),")
        key = ", ".join(f'"{name}"' for name, kind in self.extra if kind == "constexpr")
        restored = ", ".join(f'"{name}"' for name, tensor, group in self.own() if group.updates(tensor))
        return [
            "@triton.autotune(",
            *indent(["configs=[", *indent(configs), "],", f"key=[{key}],"]),
            *indent([f"restore_value=[{restored}],"] * bool(restored)),
            "    cache_results=True,",
            ")",
        ]

    def launch(self, first_axis: str, tuned: bool = False) -> list[str]:
        """The host's call of this kernel."""
        tensors = [tensor.name for tensor in self.shared]
        tensors += [tensor.name for group in self.groups() for tensor in group.tensors]
        extra = [f"{name}={name}" if kind == "constexpr" else name for name, kind in self.extra]
        options = [f"{name}={value}" for name, value in self.options if not tuned]
        return call(f"{self.name}[({first_axis}, {self.programs})]", [*tensors, *extra, *options])

    def _part(self, i: int, group: Group) -> str:
        shared, passed = self._used(group)
        params = [*shared, *group.names(), *map(self._param, passed)]
        return function("@triton.jit", f"{self.name}_{i}", params, group.doc, group.body())

    def _call(self, i: int, group: Group) -> list[str]:
        start = sum(other.programs for other in self.groups()[:i])
        shared, passed = self._used(group)
        passed = [f"block - {start}" if name == "block" and start else name for name in passed]
        return call(f"{self.name}_{i}", [*shared, *(tensor.name for tensor in group.tensors), *passed])

    def _used(self, group: Group) -> tuple[list[str], list[str]]:
        """Which tensors that all share, and which of `block` and the names in `passed`, the group's code reads."""
        read = words(group.body())
        shared = [tensor.name for tensor in self.shared if tensor.name in read]
        return shared, [name for name in ("block", *self.passed) if name in read]

    def _param(self, name: str) -> str:
        return f"{name}: tl.constexpr" if (name, "constexpr") in self.extra else name
