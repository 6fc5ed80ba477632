"""What Triton kernels are printed from: code, and blocks of ranges. `triton_cases` makes kernels of it.

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
POINTER = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "f64": "*fp64", "i32": "*i32", "i8": "*i8", "u8": "*u8"}
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
