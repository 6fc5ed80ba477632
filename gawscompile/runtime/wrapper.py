"""Reads the Python that Inductor prints around its kernels, and writes it down as steps for `executor.cpp`.

    buf1 = empty_strided_cpu((1, 1, 576), (576, 576, 1), torch.float32)      ALLOCATE  r1 (1, 1, 576) …
    cpp_fused_mean_mul_0(arg0_1, arg4_1, buf1)                               KERNEL    0x7f… r0 r4 r1
    buf2 = torch.ops.gaws.project.default(buf1, [arg5_1, …], 'gemv_cpp …')   PROJECT   r2 ← r1, r5, …
    buf3 = buf2[0]                                                           ITEM      r3 ← r2, 0
    del buf2                                                                 FREE      r2

Registers hold what variables hold, the first ones the graph's inputs. Sizes are places among integers: those that a
call gives, constants, and what is computed of them. A line that is not known here is `Unreadable`.
"""

from __future__ import annotations

import ast
import ctypes
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gawscompile.runtime.ops import SCALAR_TYPES

MEMORY = ("ALLOCATE", "VIEW", "FREE", "ITEM")
CODES = (*MEMORY, "KERNEL", "CALL", "ATTEND", "PROJECT", "FITS", "ALIGNED", "COMPUTE", "RESULT")
KINDS = ("NONE", "TENSOR", "TENSORS", "INTEGER", "INTEGERS", "NUMBER", "BOOLEAN", "TEXT")
SIGNS = {ast.Add: 0, ast.Sub: 1, ast.Mult: 2, ast.FloorDiv: 3, ast.Mod: 4, "max": 5, "min": 6}
EXTERN = ("mm", "addmm", "bmm", "baddbmm")
"""What Inductor calls ``extern_kernels``: aten's ops of these names, with the result's place as ``out``."""

MOST_ARGUMENTS = 63
"""Of one kernel (`executor.cpp`: MOST)."""


class Unreadable(Exception):
    """A line of Inductor's wrapper that has no step: the message says what it has."""


@dataclass
class Step:
    """One step, as `executor.cpp` has it. `sizes`, `strides`, `offset` are places among the integers."""

    code: str
    out: int = -1
    given: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)
    offset: int = 0
    number: int = 0
    dtype: int = 0
    kernel: int = 0
    text: str | None = None
    arguments: list[tuple[str, Any]] = field(default_factory=list)


class Code:
    """The steps of a wrapper's `source`, whose globals are `names`, for inputs like `examples`: tensors and integers.

    A backward has no examples. Of its inputs those that a size is read from are integers, and all others that are read
    are tensors. Steps free these where the wrapper deletes them. The examples of a graph from AOTAutograd's cache hold
    tensors of a subclass whole, and the wrapper takes `parts_of` them.
    Raises `Unreadable`.
    """

    def __init__(self, source: str, names: dict[str, Any], examples: Sequence[Any] | None) -> None:
        self.names = names
        self.frees = examples is None
        self.steps: list[Step] = []
        self.integers: list[int] = []
        self.registers = 0
        self._unread: set[str] = set()  # inputs that are deleted at most
        self._places: dict[str, int] = {}  # of integers, by name
        self._constants: dict[int, int] = {}
        self._registers: dict[str, int] = {}
        tree = ast.parse(source)
        body = _call_of(tree).body
        self._signatures = dict(_kernels(tree))
        unpacked = body[0]
        if not isinstance(unpacked, ast.Assign) or not isinstance(unpacked.targets[0], ast.Tuple):
            raise Unreadable(_text(unpacked))
        self._inputs = inputs = [ast.unparse(name) for name in unpacked.targets[0].elts]
        if examples is None:
            sizes = {ast.unparse(line.value) for line in body if isinstance(line, ast.Assign) and _sets_size(line)}
            loads = (one for line in body[1:] for one in ast.walk(line) if isinstance(one, ast.Name))
            read = {one.id for one in loads if isinstance(one.ctx, ast.Load)}
            examples = [0 if name in sizes else _TENSOR if name in read else None for name in inputs]
            self._unread = set(inputs) - read
        elif len(examples) < len(inputs):
            examples = [part for one in examples for part in parts_of(one)]
        if len(inputs) != len(examples):
            raise Unreadable(f"a wrapper that takes {len(inputs)} of {len(examples)} inputs")
        for name, example in zip(inputs, examples, strict=True):
            if isinstance(example, torch.Tensor):
                self._registers[name] = len(self._registers)
            elif isinstance(example, (int, torch.SymInt, sympy.Expr)):  # else a mesh of ranks, say, which nothing reads
                self._places[name] = len(self.integers)
                self.integers.append(0)
        self.tensors = [i for i, name in enumerate(inputs) if name in self._registers]
        self.tensors_alone = len(self.tensors) == len(inputs)
        self.given = [i for i, name in enumerate(inputs) if name in self._places]
        # sizes, then checks of inputs: where one does not fit, nothing is done yet
        for statement in sorted(body[1:], key=lambda line: _order(line, inputs)):
            self._statement(statement)
        if not self.steps or self.steps[-1].code != "RESULT" or not self.steps[-1].given:
            raise Unreadable("a wrapper that does not end with its results")
        if not self.given and any(step.code == "COMPUTE" for step in self.steps):
            raise Unreadable("sizes that are computed of none")

    def texts(self) -> list[str]:
        """Every text of the steps, once."""
        found = dict.fromkeys(step.text for step in self.steps if step.text is not None)
        found |= dict.fromkeys(v for step in self.steps for kind, v in step.arguments if kind == "TEXT")
        return list(found)

    def words(self) -> list[int]:
        """The steps as numbers: every list behind its length, texts by their number."""
        numbers = {text: i for i, text in enumerate(self.texts())}
        words: list[int] = []
        for step in self.steps:
            words += [CODES.index(step.code), step.out]
            for places in (step.given, step.sizes, step.strides):
                words += [len(places), *places]
            words += [step.offset, step.number, step.dtype, step.kernel]
            words += [-1 if step.text is None else numbers[step.text], len(step.arguments)]
            for kind, value in step.arguments:
                words.append(KINDS.index(kind))
                if kind == "TEXT":
                    words.append(numbers[value])
                elif kind == "NUMBER":
                    words += struct.unpack("q", struct.pack("d", value))
                else:
                    words += [len(value), *value]
        return words

    def _statement(self, line: ast.stmt) -> None:
        if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
            self._assign(line.targets[0].id, line.value)
        elif isinstance(line, ast.Delete) and all(isinstance(name, ast.Name) for name in line.targets):
            names = {ast.unparse(name) for name in line.targets}
            dropped = {self._registers.pop(name) for name in names - self._unread}
            inputs = range(0 if self.frees else len(self.tensors))
            if freed := [one for one in dropped if one not in inputs and one not in self._registers.values()]:
                self.steps.append(Step("FREE", given=freed))
        elif isinstance(line, ast.Return) and isinstance(line.value, ast.Tuple):
            self.steps.append(Step("RESULT", given=[self._result(value) for value in line.value.elts]))
        elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Call):
            self._call(line.value)
        elif not isinstance(line, ast.Pass):
            raise Unreadable(_text(line))

    def _assign(self, name: str, value: ast.expr) -> None:
        if isinstance(value, ast.Name) and value.id in self._registers:
            self._registers[name] = self._registers[value.id]
        elif _is_symbol(name):
            self._places[name] = self._integer(value)
        elif isinstance(value, ast.Call) and _text(value.func).startswith(("torch.ops.", "aten.")):
            self._registers[name] = self._op(value, True)
        else:
            self._registers[name] = self._tensor(value)

    def _call(self, call: ast.Call) -> None:
        what = ast.unparse(call.func)
        if what == "args.clear":
            return
        if what == "assert_size_stride":
            sizes, strides = (self._integers(shape) for shape in call.args[1:3])
            text = str(self._constant(call.args[3])) if len(call.args) > 3 else "a kernel"
            of = self._tensor(call.args[0])
            first = int(ast.unparse(call.args[0]) in self._inputs)  # before anything is done
            self.steps.append(Step("FITS", given=[of], sizes=sizes, strides=strides, number=first, text=text))
        elif what == "assert_alignment":
            of, number, text = self._tensor(call.args[0]), self._constant(call.args[1]), self._constant(call.args[2])
            self.steps.append(Step("ALIGNED", given=[of], number=number, text=text))
        elif what in self._signatures:
            self._kernel(what, call)
        elif what.startswith(("torch.ops.", "aten.", "extern_kernels.")):
            self._op(call, False)
        else:
            raise Unreadable(_text(call))

    def _kernel(self, name: str, call: ast.Call) -> None:
        signature = self._signatures[name]
        if len(signature) != len(call.args) or len(signature) > MOST_ARGUMENTS or call.keywords:
            raise Unreadable(f"a kernel of {len(call.args)} arguments: {name}")
        given = []
        for kind, value in zip(signature, call.args, strict=True):
            if kind.endswith("*"):
                given.append(self._tensor(value))
            elif kind.removeprefix("const ") == "int64_t":
                given.append(-1 - self._integer(value))
            else:
                raise Unreadable(f"a kernel that takes a {kind}: {name}")
        library = ctypes.CDLL(self.names[name].__self__.__file__)
        address = ctypes.cast(library.kernel, ctypes.c_void_p).value
        assert address is not None
        self.steps.append(Step("KERNEL", given=given, kernel=address, text=name))

    def _op(self, call: ast.Call, keep: bool) -> int:
        """The register of what an op returns, -1 where nothing keeps it."""
        name = ast.unparse(call.func)
        op = self._named(name)
        keywords = {word.arg: word.value for word in call.keywords}
        if op is torch.ops.gaws.project.default:
            x, operands, program = call.args
            if not isinstance(operands, ast.List):
                raise Unreadable(_text(call))
            given = [self._tensor(value) for value in (x, *operands.elts)]
            return self._step("PROJECT", given=given, text=self._constant(program))
        schema = op._schema
        positions = list(call.args)
        arguments: list[tuple[str, Any]] = []
        for argument in schema.arguments:
            if positions and not argument.kwarg_only:
                arguments.append(self._argument(argument, positions.pop(0)))
            elif argument.name in keywords:
                arguments.append(self._argument(argument, keywords.pop(argument.name)))
            elif argument.has_default_value():
                default = ast.parse(repr(argument.default_value), mode="eval").body
                arguments.append(self._argument(argument, default))
            else:
                raise Unreadable(f"{name} without its {argument.name}")
        if positions or keywords:
            raise Unreadable(_text(call))
        text = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        out = self._fresh() if keep else -1
        code = "ATTEND" if op is torch.ops.gaws.attend.default else "CALL"
        self.steps.append(Step(code, out, text=text, arguments=arguments))
        return out

    def _named(self, name: str) -> Any:
        """The op that is called so."""
        if name.startswith("extern_kernels."):
            if (known := name.removeprefix("extern_kernels.")) not in EXTERN:
                raise Unreadable(name)
            return getattr(torch.ops.aten, known).out
        first, *rest = name.split(".")
        found = self.names[first]
        for part in rest:
            found = getattr(found, part)
        if not isinstance(found, torch._ops.OpOverload):
            raise Unreadable(name)
        return found

    def _argument(self, argument: Any, value: ast.expr) -> tuple[str, Any]:
        """One argument of an op, by the type that its schema gives."""
        kind = re.sub(r"^Optional\[(.*)\]$", r"\1", str(argument.real_type))
        if isinstance(value, ast.Constant) and value.value is None:
            return "NONE", []
        if kind == "Tensor" and not isinstance(value, ast.Constant):
            return "TENSOR", [self._tensor(value)]
        if kind == "List[Tensor]" and isinstance(value, (ast.List, ast.Tuple)):
            return "TENSORS", [self._tensor(one) for one in value.elts]
        if kind == "List[int]" and isinstance(value, (ast.List, ast.Tuple)):
            return "INTEGERS", self._integers(value)
        if kind in ("ScalarType", "int") and isinstance(value, ast.Attribute):
            return "INTEGER", [self._constant_place(self._dtype(value))]
        constant = self._literal(value)
        if kind == "bool" and isinstance(constant, bool):
            return "BOOLEAN", [int(constant)]
        if (kind == "number" and isinstance(constant, float)) or (kind == "float" and type(constant) in (int, float)):
            return "NUMBER", float(constant)
        if kind in ("int", "number") and not isinstance(constant, (bool, str, float)):
            return "INTEGER", [self._integer(value)]
        if kind in ("str", "Any") and isinstance(constant, str):  # a collective takes its group's name as Any
            return "TEXT", constant
        raise Unreadable(f"{_text(value)} as the argument {argument.name} of an op, a {argument.real_type}")

    def _result(self, value: ast.expr) -> int:
        """The register of what is returned, -1 for None: the gradient of what needs none."""
        return -1 if isinstance(value, ast.Constant) and value.value is None else self._tensor(value)

    def _tensor(self, value: ast.expr) -> int:
        """The register of an expression."""
        if isinstance(value, ast.Name) and value.id in self._registers:
            return self._registers[value.id]
        if isinstance(value, ast.Subscript) and type(item := self._literal(value.slice)) is int:
            return self._step("ITEM", given=[self._tensor(value.value)], number=item)
        if isinstance(value, ast.Call):
            what = ast.unparse(value.func)
            if what == "empty_strided_cpu":
                sizes, strides = (self._integers(shape) for shape in value.args[:2])
                return self._step("ALLOCATE", sizes=sizes, strides=strides, dtype=self._dtype(value.args[2]))
            if what == "reinterpret_tensor":
                of = self._tensor(value.args[0])
                sizes, strides = (self._integers(shape) for shape in value.args[1:3])
                offset = self._integer(value.args[3])
                return self._step("VIEW", given=[of], sizes=sizes, strides=strides, offset=offset)
        if isinstance(value, ast.Name) and isinstance(self.names.get(value.id), torch.Tensor):
            raise Unreadable(f"a constant of the graph: {value.id}")
        raise Unreadable(_text(value))

    def _integers(self, shape: ast.expr) -> list[int]:
        if not isinstance(shape, (ast.Tuple, ast.List)):
            raise Unreadable(_text(shape))
        return [self._integer(one) for one in shape.elts]

    def _integer(self, value: ast.expr) -> int:
        """The place of an expression among the integers."""
        if isinstance(value, ast.Name) and value.id in self._places:
            return self._places[value.id]
        constant = self._literal(value)
        if type(constant) is int:
            return self._constant_place(constant)
        parts: tuple[Any, ...] = ()
        if isinstance(value, ast.BinOp) and type(value.op) in SIGNS:
            parts = (type(value.op), value.left, value.right)
        elif isinstance(value, ast.Call) and ast.unparse(value.func) in ("max", "min") and len(value.args) == 2:
            parts = (ast.unparse(value.func), *value.args)
        elif isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
            parts = (ast.Sub, ast.Constant(0), value.operand)
        if not parts:
            raise Unreadable(_text(value))
        operands = [self._integer(part) for part in parts[1:]]
        self.integers.append(0)
        self.steps.append(Step("COMPUTE", len(self.integers) - 1, operands, number=SIGNS[parts[0]]))
        return len(self.integers) - 1

    def _literal(self, value: ast.expr) -> Any:
        """A constant as Python writes it, None for anything else."""
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError):
            return None

    def _constant(self, value: ast.expr) -> Any:
        """A constant: a literal, or an attribute of torch (``torch.float32``)."""
        if isinstance(value, ast.Attribute) and ast.unparse(value.value) == "torch":
            return getattr(torch, value.attr)
        constant = self._literal(value)
        if constant is None:
            raise Unreadable(_text(value))
        return constant

    def _dtype(self, value: ast.expr) -> int:
        """The number of a dtype."""
        number = SCALAR_TYPES.get(self._constant(value))
        if number is None:
            raise Unreadable(_text(value))
        return number

    def _constant_place(self, constant: int) -> int:
        if constant not in self._constants:
            self._constants[constant] = len(self.integers)
            self.integers.append(constant)
        return self._constants[constant]

    def _fresh(self) -> int:
        self.registers += 1
        return len(self.tensors) + self.registers - 1

    def _step(self, code: str, **what: Any) -> int:
        out = self._fresh()
        self.steps.append(Step(code, out, **what))
        return out


def parts_of(value: Any) -> list[Any]:
    """What AOTAutograd hands on of a graph's input: of a tensor subclass its inner tensors, a quantised weight's codes
    and scales, say."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in parts_of(getattr(value, name))]


def _call_of(tree: ast.Module) -> ast.FunctionDef:
    """The function ``call`` of a wrapper's source."""
    for one in ast.walk(tree):
        if isinstance(one, ast.FunctionDef) and one.name == "call":
            return one
    raise Unreadable("a wrapper without a call")


def _kernels(tree: ast.Module) -> Iterator[tuple[str, Sequence[str]]]:
    """Name and types of the arguments of every kernel that a wrapper defines."""
    for one in tree.body:
        call = one.value if isinstance(one, ast.Assign) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "async_compile.cpp_pybinding":
            yield ast.unparse(one.targets[0]), ast.literal_eval(call.args[0])  # type: ignore[attr-defined]


_TENSOR = torch.empty(0, device="meta")


def _sets_size(line: ast.Assign) -> bool:
    return len(line.targets) == 1 and _is_symbol(ast.unparse(line.targets[0]))


def _is_symbol(name: str) -> bool:
    return re.fullmatch(r"(s|ks|ps|u|zuf)\d+", name) is not None


def _order(line: ast.stmt, inputs: Sequence[str]) -> int:
    """Sizes before checks of inputs, and these before the rest."""
    if isinstance(line, ast.Assign) and _is_symbol(ast.unparse(line.targets[0])):
        return 0
    call = line.value if isinstance(line, ast.Expr) else None
    checks = isinstance(call, ast.Call) and ast.unparse(call.func) == "assert_size_stride"
    return 1 if checks and ast.unparse(call.args[0]) in inputs else 2  # type: ignore[union-attr]


def _text(node: ast.AST) -> str:
    return ast.unparse(node)[:120]
