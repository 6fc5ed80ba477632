"""Triton kernels made of cases: who does what in a launch, on which tensors, and how that is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gawscompile.codegen.triton_text import POINTER, Code, assign, branches, call, function, indent, printed, reads, v


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
