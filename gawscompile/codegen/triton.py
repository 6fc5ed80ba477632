"""The Triton emitter: prints a `KernelSpec` and a `Plan` as a module of Triton kernels, loads it, runs it.

A generated module holds the kernels of one plan, from one to four, and the host function ``launch`` that runs them:

    shrink      u = s A x for every low-rank term of the group, and the mode products of Kronecker terms that are not
                the last of their chain; fp32, ``[m, columns]``
    shrink2 …   mode products that need those of the launch before; few chains have any (`triton_modes`)
    expand      the rows of every W, with bias, residual, B u and every last mode product as the epilogue; all siblings
                in one launch
    accumulate  that epilogue alone, added to what the vendor library has written
    project     all of it in one launch

The plans, each with the file that has its kernels:

    stream, kron_epilogue   expand alone, for groups without a u: no adapters, or those whose terms all read x (GAWS and
                            GAWS-D); `triton_gemv`
    single_launch, redundant_shrink, two_launch     few tokens; `triton_gemv`
    fused_tile, gemm_accumulate                     many tokens; `triton_tile`

Bases that are kept as codes run by all of these but gemm_accumulate; `triton_packed` has what reads them.

These modules do not import Triton; the generated one does.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from gawscompile import cache
from gawscompile.codegen.triton_cases import Kernel
from gawscompile.codegen.triton_checks import check_arguments, check_spec
from gawscompile.codegen.triton_gemv import GEMV_ROWS, Gemv, RedundantShrink, SingleLaunch
from gawscompile.codegen.triton_kernels import MAX_ROW_BLOCKS, Style
from gawscompile.codegen.triton_text import WIDTH, indent
from gawscompile.codegen.triton_tile import Accumulate, Tile
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import DTYPES, SpecError


def _packed(spec: KernelSpec) -> bool:
    """Whether a base is kept as codes, which the vendor library does not multiply."""
    return any(p.packed for p in spec.projections)


@dataclass(frozen=True)
class PlanKind:
    """What prints the kernels of a plan, and whether it can run a spec (as one of few tokens would see it)."""

    style: type[Style]
    applies: Callable[[KernelSpec, Gemv], bool]

    def of(self, spec: KernelSpec, rows: int | None) -> Style:
        """The kernels for a spec."""
        make: Callable[..., Style] = self.style
        return make(spec, rows) if self.decodes else make(spec)

    @property
    def decodes(self) -> bool:
        """Whether it is for few tokens, and has rows."""
        return issubclass(self.style, Gemv)


PLANS = {
    "stream": PlanKind(Gemv, lambda spec, few: not few.width and not any(p.kronecker for p in spec.projections)),
    "kron_epilogue": PlanKind(Gemv, lambda spec, few: not few.width and any(p.kronecker for p in spec.projections)),
    "single_launch": PlanKind(SingleLaunch, lambda spec, few: few.width > 0),
    "two_launch": PlanKind(Gemv, lambda spec, few: few.width > 0),
    "redundant_shrink": PlanKind(
        RedundantShrink,
        lambda spec, few: few.width > 0 and not few.written and not any(p.banked for p in spec.projections),
    ),
    "fused_tile": PlanKind(Tile, lambda spec, few: True),
    "gemm_accumulate": PlanKind(Accumulate, lambda spec, few: spec.library_takes and not _packed(spec)),
}
"""Every plan. To add one: a class that prints its kernels, and a line here."""


@dataclass(frozen=True)
class Plan:
    """How a group runs: a name of `PLANS`, for few tokens with the most `rows` of W per program.

    Prints as ``single_launch[8]`` or ``fused_tile`` and parses back.
    """

    name: str
    rows: int | None = None

    def __post_init__(self) -> None:
        kind = PLANS.get(self.name)
        if kind is None or kind.decodes != (self.rows is not None):
            raise SpecError(f"not a plan for Triton: {self.name} with {self.rows} rows; {_PLANS}")
        if self.rows is not None and self.rows not in GEMV_ROWS:
            raise SpecError(f"a program of {self.name} takes {', '.join(map(str, GEMV_ROWS))} rows, not {self.rows}")

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows}]"

    @property
    def style(self) -> type[Style]:
        """The class that prints its kernels."""
        return PLANS[self.name].style

    @staticmethod
    def parse(text: str) -> Plan:
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", text)
        if match is None:
            raise SpecError(f"not a plan for Triton: {text!r}; {_PLANS}")
        return Plan(match[1], int(match[2]) if match[2] else None)


_PLANS = f"these are: {', '.join(f'{name}[rows]' if kind.decodes else name for name, kind in PLANS.items())}"


def plans(spec: KernelSpec) -> list[Plan]:
    """Every plan that can run `spec`. Raises `SpecError` as `emit` does."""
    check_spec(spec)
    gemv = Gemv(spec, GEMV_ROWS[0])
    few = GEMV_ROWS[1:] if gemv.chains else GEMV_ROWS  # 32 rows and a chain of modes after them spill on sm_80
    applying = {name: kind for name, kind in PLANS.items() if kind.applies(spec, gemv)}
    return [Plan(name, rows) for name, kind in applying.items() for rows in (few if kind.decodes else (None,))]


def fits(spec: KernelSpec, plan: Plan) -> bool:
    """Whether a grid can hold the programs of `plan`."""
    try:
        return bool(launches(spec, plan)) or plan.style.uses_library
    except SpecError:
        return False


def emit(spec: KernelSpec, plan: Plan, tuned: bool = False) -> str:
    """The source of a module that runs `spec` by `plan`. Equal arguments give equal text. `tuned`: Triton's autotuner
    chooses warps and stages at the first launch on a device, and keeps its choice on disk.

    Its entry is ``launch(x, operands, outs=None) -> list[Tensor]``, which trusts its arguments; that of a
    `single_launch` takes ``flags`` too, int32 zeros ``[tokens >= m, FLAGS]`` that it leaves as zeros. Raises
    `SpecError` for a plan that cannot run `spec`, for a spec without projections or with an empty dimension, for a
    Kronecker term that does not end with a matrix or is no chain from x to y, and where the rows of a group need more
    programs than a grid can hold (beyond two million rows).
    """
    style = kernels(spec, plan)
    steps = style.kernels()
    parts = [_header(spec, plan, style, steps), *(kernel.source(tuned) for kernel in steps)]
    return "\n\n\n".join([*parts, _host(spec, plan, style, steps, tuned)]) + "\n"


def kernels(spec: KernelSpec, plan: Plan) -> Style:
    """The kernels of `plan`. Raises `SpecError` as `emit` does."""
    if plan not in plans(spec):
        raise SpecError(f"the plan {plan} cannot run {spec}")
    style = PLANS[plan.name].of(spec, plan.rows)
    for kernel in style.kernels():
        if kernel.programs > MAX_ROW_BLOCKS:
            raise SpecError(f"{kernel.name} needs {kernel.programs} row blocks, more than {MAX_ROW_BLOCKS}: {spec}")
    return style


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled: what ``ASTSource`` and ``triton.compile`` take.

    `signature` maps parameters to Triton types, `constants` those of type ``constexpr`` to their values.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, int]


def variants(spec: KernelSpec, plan: Plan) -> list[Variant]:
    """Every variant that ``launch`` of the generated module can ask for, for compilation ahead of time."""
    style = kernels(spec, plan)
    blocks = [{"BLOCK_M": block} for block in style.tokens()] if isinstance(style, Tile) else [{}]
    return [Variant(k.name, k.types(), block, dict(k.options)) for k in style.kernels() for block in blocks]


@functools.lru_cache(maxsize=4096)
def launches(spec: KernelSpec, plan: Plan) -> dict[str, int]:
    """The kernels that one call launches, in order, with their programs for a token (or a block of tokens).

    The vendor library's matmuls are not among them.
    """
    return {kernel.name: kernel.programs for kernel in kernels(spec, plan).kernels()}


@functools.cache
def load(spec: KernelSpec, plan: Plan, tuned: bool = False) -> ModuleType:
    """The generated module of ``emit(spec, plan, tuned)``, imported from the cache folder, and written there first.

    The file is named by the hash of its text, and the text follows from spec, plan and emitter: a change of any moves
    the name. Raises `SpecError`, `cache.CacheError`, or `ImportError` where Triton is not installed.
    """
    text = emit(spec, plan, tuned)
    name = f"gawscompile_{plan.name}_{cache.digest(text)}"
    # Triton reads a kernel's source from its file, so the module has to be one.
    path = cache.folder("triton") / f"{name}.py"
    if cache.get(path) != text.encode():
        cache.put(path, text)
        cache.trim(spare=path)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def launch(
    spec: KernelSpec,
    plan: Plan,
    x: torch.Tensor,
    operands: Sequence[torch.Tensor],
    flags: torch.Tensor | None = None,
    tuned: bool = False,
) -> list[torch.Tensor]:
    """Check the arguments against `spec`, then run it: ``[y_i]``, each ``[m, n_i]`` of its projection's out dtype.

    `x` is ``[m, k]`` with m >= 1; `operands` are the tensors of ``spec.operands()``, in that order; `flags` are at
    least ``m * flags_per_token(spec, plan)`` int32 zeros, made anew where there are none. Raises `ValueError`, naming
    the tensor, for a wrong count, shape, dtype or device and for a parameter that is not contiguous. Runs where Triton
    has a driver, or anywhere if ``TRITON_INTERPRET=1`` was set before its import.
    """
    check_arguments(spec, x, operands)
    kept = {"flags": flags} if plan.style.keeps_state else {}
    outs: list[torch.Tensor] = load(spec, plan, tuned).launch(x, operands, **kept)
    return outs


def chosen(spec: KernelSpec, plan: Plan) -> dict[str, str]:
    """What the autotuner has chosen in this process, by kernel: ``{"expand_gemv": "num_warps: 4, …"}``."""
    module = load(spec, plan, True)
    found = ((kernel.fn.__name__, getattr(kernel, "cache", {})) for kernel in module.KERNELS)
    return {name: "; ".join(map(str, kept.values())) for name, kept in found if kept}


@functools.lru_cache(maxsize=4096)
def flags_per_token(spec: KernelSpec, plan: Plan) -> int:
    """How many counters a plan keeps for a token."""
    style = kernels(spec, plan)
    return style.stages + 1 if isinstance(style, SingleLaunch) else 0


# --- Sections of the module --------------------------------------------------------------------------------


def _header(spec: KernelSpec, plan: Plan, style: Style, steps: list[Kernel]) -> str:
    """Docstring, imports and constants, as far as the kernels need them."""
    joined = ["bias", "residual", *["B u"] * any(p.lowrank or p.banked for p in spec.projections)]
    joined += ["the rows' scale"] * any(p.rowscale for p in spec.projections)
    joined += ["C z"] * any(p.given for p in spec.projections)
    joined += ["Kronecker terms"] * any(p.kronecker for p in spec.projections)
    said = {
        "shrink": "u[m, {width}] = {computes}, in fp32",
        "expand": f"the rows of every W; {_listed(joined)} are added in fp32 before the one rounding",
        "accumulate": f"{_listed(joined)}, added to every y in fp32",
        "project": f"u and the rows of every W; {_listed(joined)} are added in fp32 before the one rounding",
    }
    if spec.swiglu:
        said = {what: f"{text}; y is silu(y0) y1" if what != "shrink" else text for what, text in said.items()}
    launches = [f"torch.mm: y{i} = W{i} x" for i in range(len(spec.projections)) if plan.style.uses_library]
    for kernel in steps:
        text = said[kernel.what].format(width=style.width, computes=_computes(style, kernel.stage))
        launches.append(f"{kernel.step}: {text}")
    sections = [f"{case} from {column}" for case, column in style.sections()]
    read = frozenset().union(*(kernel.reads for kernel in steps))
    constants = [f"K = tl.constexpr({spec.k})  # columns of x, of every W and of every A"] * ("K" in read)
    if "WIDTH" in read:
        constants += [*_comment(f"Columns of u: {', '.join(sections)}."), f"WIDTH = tl.constexpr({style.width})"]
    if isinstance(style, SingleLaunch):
        constants += [
            f"FLAGS = tl.constexpr({style.stages + 1})  # counters of a token",
            f"WAITING = tl.constexpr({style.waiting})  # programs that wait for u",
        ]
    lines = [
        f'"""One group of projections by the plan `{plan}`. Generated by gawscompile.codegen.triton.',
        "",
        *indent(spec.formulas()),
        "",
        "Launches:",
        *indent(f"{i}. {text}" for i, text in enumerate(launches, 1)),
        f"x[m, {spec.k}] {spec.x} and operands, in order:",
        *indent(f"{o.name}[{', '.join(map(str, o.shape))}] {o.dtype}" for o in spec.operands()),
        "Spec:",
        *indent(str(spec).split("; ")),
        '"""',
        "",
        "from collections.abc import Sequence",
        "from typing import Any",
        "",
        "import torch",
        *["import triton", "import triton.language as tl"] * bool(steps),
        "",
        *constants,
        *["KERNELS = ()"] * (not steps),
    ]
    return "\n".join(lines).rstrip()


def _computes(style: Style, stage: int) -> str:
    """What a shrinking launch writes to u."""
    modes = [product.describe(i) for i, product in style.written if product.launch == stage]
    parts = ["s A x for every low-rank term"] * (stage == 0 and bool(style.terms()))
    parts += ["s A x by every bank's schedule"] * (stage == 0 and bool(style.banks()))
    parts += ["what its modes make for the next ones"] * any(bank.longest - 1 > stage for _, bank, _ in style.banks())
    return ", ".join(parts + ["mode products " + ", ".join(modes)] * bool(modes))


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def _host(spec: KernelSpec, plan: Plan, style: Style, steps: list[Kernel], tuned: bool) -> str:
    """The function `launch`."""
    operands = list(spec.operands())
    ys = ["y"] if spec.swiglu else [f"y{i}" for i in range(len(spec.projections))]
    activations = ["x", *(o.name for o in operands if o.activation)]
    scales = [o.name for o in operands if o.scale]
    single = isinstance(style, SingleLaunch)
    doc = [
        f'"""Run the group on x[m, {spec.k}], m >= 1; return [{", ".join(ys)}], written to `outs` if given.',
        "",
        "Operands are in the order listed above. Nothing is checked here: parameters and `outs` must be",
        "contiguous, and all tensors but scales on the current device. `kernels` stand in for KERNELS",
        "where Inductor is to see them (`torch.library.wrap_triton`).",
    ]
    if single:
        doc += ["`flags` are int32 zeros, at least [m, FLAGS]; no other launch may use them meanwhile."]
    body = [
        *doc,
        '"""',
        *_unpack([o.name for o in operands], "operands"),
        *(f"{name} = {name}.contiguous()" for name in activations),
        # Dynamo makes a float that changes into a tensor on the CPU.
        *(f"{name} = {name}.to(x.device)" for name in scales),
        "m = x.shape[0]",
        "if outs is None:",
        *indent(["outs = [", *indent(f"{_empty(str(n), dtype)}," for n, dtype in spec.outputs), "]"]),
        *_unpack(ys, "outs"),
        *[f"u = {_empty('WIDTH.value', 'f32')}"] * any("u" in kernel.reads for kernel in steps),
    ]
    if single:
        body += [
            "if flags is None:",
            "    flags = torch.zeros((m, FLAGS.value), dtype=torch.int32, device=x.device)",
        ]
    if plan.style.uses_library:
        if spec.swiglu:
            body += [f"y{i} = {_empty(str(p.n), p.out)}" for i, p in enumerate(spec.projections)]
        turned = ["" if p.transposed else ".t()" for p in spec.projections]
        body += [f"torch.mm(x, w{i}{turn}, out=y{i})" for i, turn in enumerate(turned)]
    if isinstance(style, Tile) and steps:
        few, many = style.tokens()
        body += [f"BLOCK_M = {few} if m <= {few} else {many}", "token_blocks = triton.cdiv(m, BLOCK_M)"]
    called = [kernel.name for kernel in steps]
    body += _unpack(called, "kernels") if called else []
    for kernel in steps:
        body += kernel.launch("token_blocks" if isinstance(style, Tile) else "m", tuned)
    body.append(f"return [{', '.join(ys)}]")
    head = [
        "def launch(",
        "    x: torch.Tensor,",
        "    operands: Sequence[torch.Tensor],",
        "    outs: Sequence[torch.Tensor] | None = None,",
        *["    flags: torch.Tensor | None = None,"] * single,
        "    kernels: Sequence[Any] = KERNELS,",
        ") -> list[torch.Tensor]:",
    ]
    listed = [f"KERNELS = ({', '.join(called)}{',' * (len(called) == 1)})", "", ""] * bool(called)
    return "\n".join([*listed, *head, *indent(body)])


def _empty(columns: str, dtype: str) -> str:
    return f"torch.empty((m, {columns}), dtype={DTYPES[dtype]}, device=x.device)"


def _unpack(names: Sequence[str], value: str) -> list[str]:
    """``a, b, c = value``, in parentheses where the names are too many for a line or are one."""
    if len(names) == 1:
        return [f"({names[0]},) = {value}"]
    line = f"{', '.join(names)} = {value}"
    return [line] if len(line) <= WIDTH else ["(", *indent(f"{name}," for name in names), f") = {value}"]
