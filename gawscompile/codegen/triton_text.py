"""What Triton kernels are printed from: code, blocks of ranges, and kernels made of cases.

Code knows the names that it reads, so what a kernel needs follows from its work, and nothing reads a text back.
`triton_kernels` says what the kernels of a plan do, in these terms. Whatever a spec fixes is left out of the text:
a mask where a block divides the range, a loop of one step, a cast to the same dtype, a branch with one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gawscompile.ir.operators import Kronecker, LowRank
from gawscompile.ir.types import TensorType

TL = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16", "i32": "tl.int32", "i64": "tl.int64"}
POINTER = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "f64": "*fp64", "i32": "*i32"}
WIDTH = 88  # of a line before its indentation


# --- Code --------------------------------------------------------------------------------------------------


def _operator(sign: str, level: int, nothing: int | None = None) -> Callable[[Code, Code | int], Code]:
    """Prints ``left sign right``, but `left` alone where `right` is the number that changes nothing."""

    def applied(left: Code, right: Code | int) -> Code:
        if right == nothing:
            return left
        right = code(right)
        text = f"{left.within(level)} {sign} {right.within(level if sign == '+' else level - 1)}"
        return Code(text, left.reads | right.reads, level)

    return applied


@dataclass(frozen=True)
class Code:
    """An expression or a line of Triton, and the names that it reads. A multi-line call reads them on its first line.

    Operators print as Triton's. `level` says how loosely the last of them binds.
    """

    text: str
    reads: frozenset[str] = frozenset()
    level: int = 0

    __mul__, __floordiv__, __mod__ = _operator("*", 1, nothing=1), _operator("//", 1), _operator("%", 1)
    __add__, __sub__ = _operator("+", 2, nothing=0), _operator("-", 2)
    __and__, __lt__, equals = _operator("&", 3), _operator("<", 4), _operator("==", 4)

    def __getitem__(self, axes: tuple[slice | None, ...]) -> Code:
        """A view: ``rows[:, None]``."""
        return Code(f"{self.within(0)}[{', '.join('None' if axis is None else ':' for axis in axes)}]", self.reads)

    def within(self, level: int) -> str:
        return self.text if self.level <= level else f"({self.text})"

    def to(self, dtype: str, has: str = "") -> Code:
        """As `dtype`, unless it `has` that."""
        return self if dtype == has else Code(f"{self.within(0)}.to({TL[dtype]})", self.reads)

    def wrapped(self, arguments: Sequence[Code], tail: str = "") -> list[Code]:
        """`call` of what is called here."""
        first, *rest = call(self.text, printed(arguments), tail)
        return [Code(first, self.reads | reads(arguments)), *map(Code, rest)]

    # --- Lines, for a name

    def let(self, value: Code, sign: str = "=") -> Code:
        """``name = value``, or another `sign`, such as ``+=``, which reads the name."""
        return Code(f"{self.text} {sign} {value.text}", value.reads | (frozenset() if sign == "=" else self.reads))

    def constant(self, value: int) -> Code:
        return Code(f"{self.text}: tl.constexpr = {value}")

    def zeros(self, shape: Code) -> Code:
        return self.let(fn("tl.zeros", shape, Code("tl.float32")))

    def load(
        self, pointer: Code, ok: Iterable[Code | None], dtype: str, to: str = "f32", view: str = "", sign: str = "="
    ) -> list[Code]:
        """``name = tl.load(pointer)``, masked where there are masks `ok`, cast where the dtypes differ, then `view`."""
        mask = _mask(ok)
        cast = f".to({TL[to]})" if dtype != to else ""
        arguments = [pointer, *mask, *[Code("other=0.0")] * len(mask)]
        return self.let(Code("tl.load"), sign).wrapped(arguments, cast + view)

    def dot(self, left: Code, right: Code, dtype: str, accumulate: bool) -> list[Code]:
        options = ['input_precision="ieee"'] * (dtype == "f32")  # never tf32
        return self.let(Code("tl.dot")).wrapped([left, right, *[self] * accumulate, *map(Code, options)])

    def each(self, range_: Code, body: Iterable[Code]) -> list[Code]:
        """A loop."""
        return _block(Code(f"for {self.text} in {range_.text}:", range_.reads), body)


def when(test: Code, body: Iterable[Code]) -> list[Code]:
    """A branch."""
    return _block(Code(f"if {test.text}:", test.reads), body)


def _block(header: Code, body: Iterable[Code]) -> list[Code]:
    return [header, *(Code(f"    {line.text}", line.reads) for line in body)]


class _Names:
    """``v.rows`` or ``v["rows"]``: the name `rows`."""

    def __getattr__(self, name: str) -> Code:
        return Code(name, frozenset([name]))

    __getitem__ = __getattr__


v = _Names()


def code(value: Code | int) -> Code:
    return value if isinstance(value, Code) else Code(str(value))


def reads(lines: Iterable[Code]) -> frozenset[str]:
    return frozenset().union(*(line.reads for line in lines))


def printed(lines: Iterable[Code]) -> list[str]:
    return [line.text for line in lines]


def fn(name: str, *arguments: Code | int, **options: int) -> Code:
    """``name(arguments, options)``, which reads its name too."""
    given = list(map(code, arguments))
    text = ", ".join([*printed(given), *(f"{key}={value}" for key, value in options.items())])
    return Code(f"{name}({text})", reads(given) | {name})


def shape(rows: Code | int, columns: Code | int) -> Code:
    return Code(f"({code(rows).text}, {code(columns).text})", reads([code(rows), code(columns)]))


def store(pointer: Code, value: Code, dtype: str, ok: Iterable[Code | None] = ()) -> list[Code]:
    """Store `value`, which is fp32, as `dtype`."""
    return Code("tl.store").wrapped([pointer, value.to(dtype, "f32"), *_mask(ok)])


def _mask(ok: Iterable[Code | None]) -> list[Code]:
    present = [mask for mask in ok if mask]
    return [Code(f"mask={' & '.join(printed(present))}", reads(present))] if present else []


def scaled(term: LowRank | Kronecker, name: Code, value: Code) -> Code:
    """`value` times the scale of `term`: a number, or the 0-d tensor `name`."""
    if isinstance(term.scale, TensorType):
        return fn("tl.load", name).to("f32", term.scale.dtype) * value
    # The repr of what is not finite is no expression.
    factor = Code(repr(term.scale) if math.isfinite(term.scale) else f'float("{term.scale}")')
    return value if term.scale == 1.0 else factor * value


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

    @property
    def sign(self) -> str:
        """How the steps assign what they sum."""
        return "+=" if self.steps > 1 else "="

    def mask(self, ok: Code) -> Code | None:
        """`ok` where the range ends within a block."""
        return ok if self.masked else None

    def index(self, name: Code, ok: Code, step: Code, end: Code | None = None, block: Code | None = None) -> list[Code]:
        """`name`, the positions of one step, and `ok` if the range ends within a block. `end` and `block` are names."""
        at = fn("tl.arange", 0, block or self.block)
        lines = [name.let(step + at if self.steps > 1 else at), ok.let(name < (end or self.size))]
        return lines[: 1 + self.masked]

    def loop(self, name: Code, range_: Code, body: list[Code]) -> list[Code]:
        """`body` for every step, without a loop where there is one."""
        return name.each(range_, body) if self.steps > 1 else body


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


# --- Kernels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: what the work calls it, what the host calls it, and its dtype. One that is `updated` is an
    output that the work reads before it writes it."""

    role: str
    name: str
    dtype: str
    updated: bool = False


@dataclass(frozen=True)
class Work:
    """What a program does once its tensors are picked; `doc` has a place for the labels of the cases it serves.
    `helpers` are functions that it calls."""

    doc: str
    body: tuple[Code, ...]
    helpers: tuple[str, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        return reads(self.body)


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

    def body(self) -> list[str]:
        sizes = {case.n for case in self.cases}
        fixed = [v.N.constant(n) for n in sizes if n is not None] if len(sizes) == 1 else []
        ways = []
        first = 0
        for case in self.cases:
            chosen = {tensor.role: tensor.name for tensor in case.tensors} if len(self.cases) > 1 else {}
            chosen |= {"N": str(case.n)} if len(sizes) > 1 else {}
            moves = [f"u += {case.column}"] * bool(case.column) + [f"block -= {first}"] * bool(first)
            ways.append((case.programs, [*(assign(chosen) if chosen else []), *moves]))
            first += case.programs
        choice = branches(ways)
        return [*choice, *[""] * bool(choice), *printed([*fixed, *self.cases[0].work.body])]


@dataclass(frozen=True)
class Kernel:
    """One launch: the `stage` of a step, `what`, in a style. `shared` are tensors of every case; groups share the
    second axis of the grid.

    `prologue` defines `block` and the names in `passed`, which the code of a group may use. `extra` are further
    parameters with their Triton types, `options` what the host passes to Triton, and `choices` what Triton's autotuner
    may pass instead. `helpers` are functions that the code calls.
    """

    what: str
    stage: int
    style: str
    doc: str
    shared: tuple[Tensor, ...]
    cases: tuple[Case, ...]
    prologue: tuple[Code, ...]
    passed: tuple[str, ...]
    extra: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, int], ...]
    choices: tuple[tuple[tuple[str, int], ...], ...] = ()
    helpers: tuple[str, ...] = ()

    @property
    def step(self) -> str:
        return f"{self.what}{self.stage + 1 if self.stage else ''}"

    @property
    def name(self) -> str:
        return f"{self.step}_{self.style}"

    @property
    def reads(self) -> frozenset[str]:
        return reads(self.prologue).union(*(case.work.reads for case in self.cases))

    @property
    def programs(self) -> int:
        """The length of the grid's second axis."""
        return sum(case.programs for case in self.cases)

    def groups(self) -> list[Group]:
        kinds = dict.fromkeys(case.kind for case in self.cases)
        return [Group([case for case in self.cases if case.kind == kind]) for kind in kinds]

    def own(self) -> list[tuple[str, Tensor]]:
        """The parameters for tensors of groups: by role where there is one group with nothing to choose. A tensor that
        several groups read is one parameter."""
        groups = self.groups()
        tensors = [tensor for group in groups for tensor in group.tensors]
        names = groups[0].names() if len(groups) == 1 else [tensor.name for tensor in tensors]
        return list(dict(zip(names, tensors, strict=True)).items())

    def types(self) -> dict[str, str]:
        """Parameters and their Triton types, in order."""
        own = {name: POINTER[tensor.dtype] for name, tensor in self.own()}
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
        kernel = function(head, self.name, map(self._param, self.types()), doc, [*printed(self.prologue), *body])
        called = dict.fromkeys([*self.helpers, *(text for case in self.cases for text in case.work.helpers)])
        return "\n\n\n".join([*called, *parts, kernel])

    def _autotuner(self) -> list[str]:
        configs = []
        for choice in self.choices:
            named = ", ".join(f"{name}={value}" for name, value in choice)
            configs.append(f"triton.Config({{}}, {named}),")
        key = ", ".join(f'"{name}"' for name, kind in self.extra if kind == "constexpr")
        restored = ", ".join(f'"{name}"' for name, tensor in self.own() if tensor.updated)
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
        tensors += [tensor.name for _, tensor in self.own()]
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
        read = group.cases[0].work.reads
        shared = [tensor.name for tensor in self.shared if tensor.name in read]
        return shared, [name for name in ("block", *self.passed) if name in read]

    def _param(self, name: str) -> str:
        return f"{name}: tl.constexpr" if (name, "constexpr") in self.extra else name
