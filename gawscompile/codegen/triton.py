"""The plans `two_launch` and `kron_epilogue`: prints a `KernelSpec` as a module of Triton kernels, loads it, runs it.

A generated module holds two sets of kernels and one host function:

    shrink    u = s A x for every low-rank term of the group, and the mode products of Kronecker terms that are not
              the last of their chain; fp32, ``[m, columns]``. Absent where the group has neither
    shrink2 … mode products that need those of the launch before; few chains have any (`triton_modes`)
    expand    the rows of every W, with bias, residual, B u and every last mode product as the epilogue; all siblings
              in one launch

    *_gemv    up to `GEMV_TOKENS` tokens: a program multiplies rows elementwise and sums (memory is the bound)
    *_tile    more tokens: a program makes a tile of tokens by rows with `tl.dot`

    launch    picks the set by the number of tokens

The plan is called `kron_epilogue` where the group has Kronecker terms: GAWS and GAWS-D are epilogues that read x, so a
group with no other adapters is the one launch `expand`.

The kernels are in `triton_gemv` and `triton_tile`, and what they are printed from in `triton_text`. These modules do
not import Triton; the generated one does.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from gawscompile.codegen import cache
from gawscompile.codegen.spec import DTYPES, KernelSpec, SpecError
from gawscompile.codegen.triton_gemv import Gemv
from gawscompile.codegen.triton_kernels import MAX_ROW_BLOCKS, Style
from gawscompile.codegen.triton_text import WIDTH, Kernel, indent
from gawscompile.codegen.triton_tile import Tile

OPERAND_DTYPES = DTYPES | {"f64": torch.float64}  # the latter for scales only
SCALES = ("scale", "kron_scale")
GEMV_TOKENS = 2  # beyond, reading W once for all tokens is worth padding them to a tile of 16


def emit(spec: KernelSpec) -> str:
    """The source of a module that runs `spec` by the plan `plan(spec)`. Equal specs give equal text.

    Its entry is ``launch(x, operands, outs=None) -> list[Tensor]``, which trusts its arguments. Raises `SpecError`
    for a spec without projections or with an empty dimension, for a Kronecker term that does not end with a matrix or
    is no chain from x to y, and where the rows of a group need more programs than a grid can hold (beyond two million
    rows).
    """
    styles = _styles(spec)
    kernels = [kernel.source() for style in styles for kernel in style.kernels()]
    return "\n\n\n".join([_header(spec, styles[0]), *kernels, _host(spec, *styles)]) + "\n"


def plan(spec: KernelSpec) -> str:
    """The name of the plan by which `spec` is run."""
    return "kron_epilogue" if any(p.kronecker for p in spec.projections) else "two_launch"


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled: what ``ASTSource`` and ``triton.compile`` take.

    `signature` maps parameters to Triton types, `constants` those of type ``constexpr`` to their values.
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, int]


def variants(spec: KernelSpec) -> list[Variant]:
    """Every variant that ``launch`` of the generated module can ask for, for compilation ahead of time."""
    gemv, tile = _styles(spec)
    few = [Variant(k.name, k.types(), {}, dict(k.options)) for k in gemv.kernels()]
    many = [
        Variant(k.name, k.types(), {"BLOCK_M": block}, dict(k.options))
        for k in tile.kernels()
        for block in tile.tokens()
    ]
    return few + many


@functools.cache
def load(spec: KernelSpec) -> ModuleType:
    """The generated module of `spec`, imported from the cache folder and written there first if it is missing.

    The file is named by the hash of its text, and the text follows from spec and emitter: a change of either moves
    the name. Raises `SpecError`, `cache.CacheError`, or `ImportError` where Triton is not installed.
    """
    text = emit(spec)
    name = f"gawscompile_{plan(spec)}_{cache.digest(text)}"
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


def launch(spec: KernelSpec, x: torch.Tensor, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Check the arguments against `spec`, then run it: ``[y_i]``, each ``[m, n_i]`` of its projection's out dtype.

    `x` is ``[m, k]`` with m >= 1; `operands` are the tensors of ``spec.operands()``, in that order. Raises
    `ValueError`, naming the tensor, for a wrong count, shape, dtype or device and for a parameter that is not
    contiguous. Runs where Triton has a driver, or anywhere if ``TRITON_INTERPRET=1`` was set before its import.
    """
    _check_arguments(spec, x, operands)
    outs: list[torch.Tensor] = load(spec).launch(x, operands)
    return outs


# --- Sections of the module --------------------------------------------------------------------------------


def _header(spec: KernelSpec, style: Style) -> str:
    """Docstring, imports and constants."""
    said = [
        f"{kernel.name.split('_')[0]}: u[m, {style.width}] = {_computes(kernel)}, in fp32"
        for kernel in style.kernels()[:-1]
    ]
    joined = ["bias", "residual", *["B u"] * any(p.lowrank for p in spec.projections)]
    joined += ["Kronecker terms"] * (plan(spec) == "kron_epilogue")
    said.append(f"expand: the rows of every W; {_listed(joined)} are added in fp32 before the one rounding")
    sections = [f"{case} from {column}" for case, column in style.sections()]
    lines = [
        f'"""One group of projections by the plan `{plan(spec)}`. Generated by gawscompile.codegen.triton.',
        "",
        *indent(spec.formulas()),
        "",
        "Launches:",
        *indent(f"{i}. {text}" for i, text in enumerate(said, 1)),
        f"x[m, {spec.k}] {spec.x} and operands, in order:",
        *indent(f"{o.name}[{', '.join(map(str, o.shape))}] {o.dtype}" for o in spec.operands()),
        "Spec:",
        *indent(str(spec).split("; ")),
        '"""',
        "",
        "from collections.abc import Sequence",
        "",
        "import torch",
        "import triton",
        "import triton.language as tl",
        "",
        f"K = tl.constexpr({spec.k})  # columns of x, of every W and of every A",
        *_comment(f"Columns of u: {', '.join(sections)}.") * bool(style.width),
        *[f"WIDTH = tl.constexpr({style.width})"] * bool(style.width),
        f"GEMV_TOKENS = {GEMV_TOKENS}  # up to here the gemv kernels, beyond them the tile kernels",
    ]
    return "\n".join(lines)


def _computes(kernel: Kernel) -> str:
    """What a launch before the last one writes to u."""
    modes = [case.label for case in kernel.cases if case.label.startswith("G")]
    parts = ["s A x for every low-rank term"] * (len(modes) < len(kernel.cases))
    return ", ".join(parts + ["mode products " + ", ".join(modes)] * bool(modes))


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]


def _host(spec: KernelSpec, gemv: Gemv, tile: Tile) -> str:
    """The function `launch`."""
    operands = list(spec.operands())
    ys = [f"y{i}" for i in range(len(spec.projections))]
    activations = ["x", *(o.name for o in operands if o.role == "residual")]
    scales = [o.name for o in operands if o.role in SCALES]
    few, many = tile.tokens()
    body = [
        f'"""Run the group on x[m, {spec.k}], m >= 1; return [{", ".join(ys)}], written to `outs` if given.',
        "",
        "Operands are in the order listed above. Nothing is checked here: parameters and `outs` must be",
        "contiguous, and all tensors but scales on the current device.",
        '"""',
        *_unpack([o.name for o in operands], "operands"),
        *(f"{name} = {name}.contiguous()" for name in activations),
        # Dynamo makes a float that changes into a tensor on the CPU.
        *(f"{name} = {name}.to(x.device)" for name in scales),
        "m = x.shape[0]",
        "if outs is None:",
        *indent(["outs = [", *indent(f"{_empty(str(p.n), p.out)}," for p in spec.projections), "]"]),
        *_unpack(ys, "outs"),
        *[f"u = {_empty('WIDTH.value', 'f32')}"] * bool(gemv.width),
        "if m <= GEMV_TOKENS:",
        *indent(_launches(gemv.kernels(), "m")),
        "else:",
        *indent([f"BLOCK_M = {few} if m <= {few} else {many}", "token_blocks = triton.cdiv(m, BLOCK_M)"]),
        *indent(_launches(tile.kernels(), "token_blocks")),
        f"return [{', '.join(ys)}]",
    ]
    head = [
        "def launch(",
        "    x: torch.Tensor,",
        "    operands: Sequence[torch.Tensor],",
        "    outs: Sequence[torch.Tensor] | None = None,",
        ") -> list[torch.Tensor]:",
    ]
    return "\n".join(head + indent(body))


def _launches(kernels: list[Kernel], first_axis: str) -> list[str]:
    return [line for kernel in kernels for line in kernel.launch(first_axis)]


def _empty(columns: str, dtype: str) -> str:
    return f"torch.empty((m, {columns}), dtype={DTYPES[dtype]}, device=x.device)"


def _unpack(names: Sequence[str], value: str) -> list[str]:
    """``a, b, c = value``, in parentheses where the names are too many for a line or are one."""
    if len(names) == 1:
        return [f"({names[0]},) = {value}"]
    line = f"{', '.join(names)} = {value}"
    return [line] if len(line) <= WIDTH else ["(", *indent(f"{name}," for name in names), f") = {value}"]


# --- Checks ------------------------------------------------------------------------------------------------


def _styles(spec: KernelSpec) -> tuple[Gemv, Tile]:
    if not spec.projections:
        raise SpecError(f"no projections in {spec}")
    if min(spec.k, *(p.n for p in spec.projections), *(term.rank for p in spec.projections for term in p.lowrank)) < 1:
        raise SpecError(f"k, n and ranks must be at least 1: {spec}")
    styles = Gemv(spec), Tile(spec)
    for kernel in (kernel for style in styles for kernel in style.kernels()):
        if kernel.programs > MAX_ROW_BLOCKS:
            raise SpecError(f"{kernel.name} needs {kernel.programs} row blocks, more than {MAX_ROW_BLOCKS}: {spec}")
    return styles


def _check_arguments(spec: KernelSpec, x: torch.Tensor, operands: Sequence[torch.Tensor]) -> None:
    if x.dim() != 2 or x.shape[1] != spec.k or x.shape[0] < 1 or x.dtype != DTYPES[spec.x]:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}, not [m >= 1, {spec.k}] {DTYPES[spec.x]}")
    wanted = list(spec.operands())
    if len(wanted) != len(operands):
        raise ValueError(f"{len(operands)} operands for {len(wanted)}: {', '.join(o.name for o in wanted)}")
    for operand, tensor in zip(wanted, operands, strict=True):
        shape = [x.shape[0] if size == "m" else size for size in operand.shape]
        dtype = OPERAND_DTYPES[operand.dtype]
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{operand.name} is {list(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
        if operand.role not in SCALES and tensor.device != x.device:
            raise ValueError(f"{operand.name} is on {tensor.device}, x on {x.device}")
        if operand.role != "residual" and not tensor.is_contiguous():
            raise ValueError(f"{operand.name} is not contiguous: strides {tensor.stride()} of {shape}")
