"""`KernelSpec`: everything that shapes a generated kernel, and nothing else.

A spec describes one *group*: projections of the same activation ``x`` that run together,

    y_i = c_i ⊙ (W_i x + sum_j s_ij * B_ij (A_ij x) + sum_j C_ij z_ij + sum_j s_ij * M_ijp … M_ij1 x)
          + bias_i + residual_i                                           i = 0 … projections-1

where c is a vector that scales rows (DoRA), if there is one, each z is another activation, few features wide (zFLoRA's
widened stream), and each M is a mode product ``I ⊗ G ⊗ I``: one is a GAWS adapter, two or more are LoKr's w1 ⊗ w2. A
gate and its partner may leave the group as one output, ``y = silu(y_0) * y_1`` (SwiGLU: Shazeer 2020). Where a base
keeps its own matmul (its weight is quantised) there is no W, and the residual is what that has made of x.

It is frozen, hashable, and prints to one line that parses back to an equal spec. That line is what travels in
the graph (as an argument of the op), in caches and in reports, so a process that never ran a pass can still
rebuild the kernel.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

DTYPES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class SpecError(ValueError):
    """A spec that cannot be parsed or describes no kernel; the message names the part at fault."""


@dataclass(frozen=True)
class LowRankSpec:
    """``s * B (A x)``: A is ``[rank, k]``, B is ``[n, rank]``, both contiguous and of `dtype`.

    `scale` is a number, or None where the scale is a 0-d tensor of `scale_dtype` ("f32", or "f64", which is what
    Dynamo makes of a Python float that changes) read at every call.
    """

    rank: int
    dtype: str
    scale: float | None
    scale_dtype: str = "f32"

    def __str__(self) -> str:
        scale = f"tensor.{self.scale_dtype}" if self.scale is None else repr(self.scale)
        return f"lora(r={self.rank} {self.dtype} s={scale})"


@dataclass(frozen=True)
class GivenSpec:
    """``C z``: z is an activation ``[m, rank]`` of dtype `z`, C is ``[n, rank]`` of `dtype`, both contiguous."""

    rank: int
    dtype: str
    z: str

    def __str__(self) -> str:
        return f"given(r={self.rank} {self.dtype} z={self.z})"


@dataclass(frozen=True)
class ModeSpec:
    """``I_before ⊗ G ⊗ I_after``: G ``[rows, columns]``, or diag(v), v ``[columns]``, where `rows` is None."""

    before: int
    rows: int | None
    columns: int
    after: int

    def __str__(self) -> str:
        middle = f"diag{self.columns}" if self.rows is None else f"{self.rows}x{self.columns}"
        return f"{self.before}*{middle}*{self.after}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that holds it."""
        return (self.columns,) if self.rows is None else (self.rows, self.columns)

    @property
    def inputs(self) -> int:
        return self.before * self.columns * self.after

    @property
    def outputs(self) -> int:
        return self.before * (self.columns if self.rows is None else self.rows) * self.after

    @property
    def multiplications(self) -> int:
        """For one token."""
        return self.inputs if self.rows is None else self.outputs * self.columns


@dataclass(frozen=True)
class KroneckerSpec:
    """``s * M_p … M_1 x``, first mode product first; factors contiguous and of `dtype`, `scale` as in `LowRankSpec`."""

    modes: tuple[ModeSpec, ...]
    dtype: str
    scale: float | None = 1.0
    scale_dtype: str = "f32"

    def __str__(self) -> str:
        scale = f"tensor.{self.scale_dtype}" if self.scale is None else repr(self.scale)
        return f"kron({' '.join(map(str, self.modes))} {self.dtype} s={scale})"


@dataclass(frozen=True)
class ProjectionSpec:
    """One projection of the group; `n` output features, base weight of `dtype`, or None where there is none.

    The weight is ``[n, k]``, or ``[k, n]`` where it is `transposed` (GPT-2's Conv1D). `bias` (``[n]``)
    `residual` (shaped like the output) and `rowscale` (``[n]``) name their dtypes, or are None where absent.
    """

    n: int
    dtype: str | None
    out: str
    bias: str | None = None
    residual: str | None = None
    lowrank: tuple[LowRankSpec, ...] = ()
    transposed: bool = False
    kronecker: tuple[KroneckerSpec, ...] = ()
    given: tuple[GivenSpec, ...] = ()
    rowscale: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is None and (not self.residual or not self.adapted or self.transposed or self.rowscale):
            raise SpecError(f"without a weight there is a residual, a term to add to it, and no scale of both: {self}")

    def __str__(self) -> str:
        weight = [f"{'wt' if self.transposed else 'w'}={self.dtype}"] if self.dtype else []
        words = [f"n={self.n}", *weight, f"out={self.out}"]
        words += [f"bias={self.bias}"] if self.bias else []
        words += [f"residual={self.residual}"] if self.residual else []
        words += [f"rowscale={self.rowscale}"] if self.rowscale else []
        return " ".join([*words, *map(str, self.lowrank), *map(str, self.given), *map(str, self.kronecker)])

    @property
    def weight(self) -> str:
        """The base weight's dtype. Raises `SpecError` where there is none."""
        if self.dtype is None:
            raise SpecError(f"no kernel on a GPU for a projection without a weight: {self}")
        return self.dtype

    @property
    def adapted(self) -> bool:
        """Whether anything is added that is no bias or residual."""
        return bool(self.lowrank or self.given or self.kronecker or self.rowscale)

    @property
    def rank(self) -> int:
        """Sum of the ranks of all low-rank terms."""
        return sum(term.rank for term in self.lowrank)


Role = Literal["weight", "bias", "residual", "rowscale", "a", "b", "scale", "c", "z", "mode", "kron_scale"]


@dataclass(frozen=True)
class Operand:
    """One tensor argument of a kernel: what it is, whose it is, its shape (m: number of tokens) and dtype."""

    role: Role
    projection: int
    term: int | None
    shape: tuple[int | str, ...]
    dtype: str
    mode: int | None = None

    @property
    def activation(self) -> bool:
        """Whether it has a row for each token."""
        return "m" in self.shape

    @property
    def name(self) -> str:
        """A C and Python identifier, unique within the kernel: ``w0``, ``bias1``, ``a0_1``, ``g0_1_2`` …"""
        stem = {"weight": "w", "residual": "res", "mode": "g"}.get(self.role, self.role)
        return "_".join([f"{stem}{self.projection}", *(str(n) for n in (self.term, self.mode) if n is not None)])


@dataclass(frozen=True)
class KernelSpec:
    """A group of projections of one activation ``x`` (``[m, k]``, `dtype` x).

    `swiglu`: there are two projections of one width and out dtype, and one output, ``silu(y_0) * y_1``.
    """

    k: int
    x: str
    projections: tuple[ProjectionSpec, ...]
    swiglu: bool = False

    def __post_init__(self) -> None:
        outputs, residuals = {(p.n, p.out) for p in self.projections}, [p for p in self.projections if p.residual]
        if self.swiglu and (len(self.projections) != 2 or len(outputs) != 1 or residuals):
            raise SpecError(f"swiglu takes two projections of one width and dtype, without residuals: {self}")

    def __str__(self) -> str:
        return "; ".join([f"k={self.k} x={self.x}{' swiglu' * self.swiglu}", *map(str, self.projections)])

    @property
    def outputs(self) -> list[tuple[int, str]]:
        """(features, dtype) of every output."""
        return [(p.n, p.out) for p in self.projections[: 1 if self.swiglu else None]]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> KernelSpec:
        """The spec that prints as `text`. Raises `SpecError`, naming the part that is not understood."""
        head, *rest = text.split("; ")
        match = re.fullmatch(r"k=(\d+) x=(\w+)( swiglu)?", head)
        if match is None or not rest:
            raise SpecError(f"not a kernel spec: {text[:200]!r}")
        projections = tuple(_parse_projection(part) for part in rest)
        return KernelSpec(int(match[1]), _dtype(match[2]), projections, bool(match[3]))

    def operands(self) -> Iterator[Operand]:
        """The tensor arguments after ``x``, in the order in which every op and kernel takes them."""
        for i, p in enumerate(self.projections):
            if p.dtype:
                yield Operand("weight", i, None, (self.k, p.n) if p.transposed else (p.n, self.k), p.dtype)
            if p.bias:
                yield Operand("bias", i, None, (p.n,), p.bias)
            if p.residual:
                yield Operand("residual", i, None, ("m", p.n), p.residual)
            if p.rowscale:
                yield Operand("rowscale", i, None, (p.n,), p.rowscale)
            for j, term in enumerate(p.lowrank):
                yield Operand("a", i, j, (term.rank, self.k), term.dtype)
                yield Operand("b", i, j, (p.n, term.rank), term.dtype)
                if term.scale is None:
                    yield Operand("scale", i, j, (), term.scale_dtype)
            for j, given in enumerate(p.given):
                yield Operand("c", i, j, (p.n, given.rank), given.dtype)
                yield Operand("z", i, j, ("m", given.rank), given.z)
            for j, kron in enumerate(p.kronecker):
                for at, mode in enumerate(kron.modes):
                    yield Operand("mode", i, j, mode.shape, kron.dtype, at)
                if kron.scale is None:
                    yield Operand("kron_scale", i, j, (), kron.scale_dtype)

    def formulas(self) -> list[str]:
        """The operator sum of each projection, as text for headers and reports."""
        lines = []
        for i, p in enumerate(self.projections):
            terms = [f"W{i}' x" if p.transposed else f"W{i} x"] if p.dtype else []
            added = [f"bias{i}"] * bool(p.bias) + [f"res{i}"] * bool(p.residual)
            terms += [] if p.rowscale else added
            for j, term in enumerate(p.lowrank):
                scale = f"s{i}_{j}" if term.scale is None else f"{term.scale:g}"
                terms.append(f"{scale} B{i}_{j}[{p.n}x{term.rank}] (A{i}_{j} x)")
            terms += [f"C{i}_{j}[{p.n}x{given.rank}] z{i}_{j}" for j, given in enumerate(p.given)]
            for j, kron in enumerate(p.kronecker):
                scale = f"s{i}_{j}" if kron.scale is None else f"{kron.scale:g}"
                chain = " ".join(f"({mode} G{i}_{j}_{at})" for at, mode in reversed(list(enumerate(kron.modes))))
                terms.append(f"{scale} {chain} x")
            if p.rowscale:
                terms = [f"rowscale{i} * ({' + '.join(terms)})", *added]
            lines.append(f"y{i}[{p.n}] = " + " + ".join(terms))
        return [*lines, *[f"y[{self.outputs[0][0]}] = silu(y0) * y1"] * self.swiglu]


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise SpecError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return name


def _scale(text: str) -> tuple[float | None, str]:
    if not text.startswith("tensor."):
        return float(text), "f32"
    if text not in ("tensor.f32", "tensor.f64"):
        raise SpecError(f"a scale is a number, tensor.f32 or tensor.f64, not {text!r}")
    return None, text.removeprefix("tensor.")


_MODE = re.compile(r"(\d+)\*(?:(\d+)x|diag)(\d+)\*(\d+)")
_FIELD = re.compile(
    r"(?:(\w+)=(\w+)|lora\(r=(\d+) (\w+) s=([^)\s]+)\)|given\(r=(\d+) (\w+) z=(\w+)\)"
    r"|kron\(((?:\d+\*(?:\d+x|diag)\d+\*\d+ )+)(\w+) s=([^)\s]+)\))(?: |$)"
)


def _parse_projection(text: str) -> ProjectionSpec:
    fields: dict[str, str] = {}
    lowrank: list[LowRankSpec] = []
    given: list[GivenSpec] = []
    kronecker: list[KroneckerSpec] = []
    position = 0
    while position < len(text):
        match = _FIELD.match(text, position)
        if match is None:
            raise SpecError(f"not a projection spec: {text!r} at {text[position:]!r}")
        if match[1]:
            fields[match[1]] = match[2]
        elif match[3]:
            lowrank.append(LowRankSpec(int(match[3]), _dtype(match[4]), *_scale(match[5])))
        elif match[6]:
            given.append(GivenSpec(int(match[6]), _dtype(match[7]), _dtype(match[8])))
        else:
            modes = [ModeSpec(int(b), int(r) if r else None, int(c), int(a)) for b, r, c, a in _MODE.findall(match[9])]
            kronecker.append(KroneckerSpec(tuple(modes), _dtype(match[10]), *_scale(match[11])))
        position = match.end()
    weight = "wt" if "wt" in fields else "w"
    optional = ("bias", "residual", "rowscale")
    if not {"n", "out"} <= fields.keys() <= {"n", weight, "out", *optional}:
        raise SpecError(f"not a projection spec: {text!r}")
    return ProjectionSpec(
        n=int(fields["n"]),
        dtype=_dtype(fields[weight]) if weight in fields else None,
        out=_dtype(fields["out"]),
        lowrank=tuple(lowrank),
        transposed=weight == "wt",
        kronecker=tuple(kronecker),
        given=tuple(given),
        **{name: _dtype(fields[name]) for name in optional if name in fields},
    )
