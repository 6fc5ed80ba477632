"""Triton kernels compiled ahead of time, on any machine, and what they take of a device.

``compile_plan(spec, plan, target)`` compiles every variant that the generated module can ask for. Targets are written
as Triton's: ``cuda:80`` (A100), ``cuda:90`` (H100), ``cuda:100`` (B200), ``hip:gfx942`` (MI300X). Others than `KNOWN`
are refused before LLVM sees them: it ends the process over one that it cannot compile for. Which source line an
instruction comes from is read from the assembly's line information, so loads are counted by the tensor they read.
"""

from __future__ import annotations

import difflib
import functools
import re
import subprocess
import tempfile
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gawscompile.codegen import triton as emitter
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
"""What tests and tables are made for."""

KNOWN = (
    *(f"cuda:{capability}" for capability in (90, 80, 100, 75, 86, 87, 89, 103, 110, 120, 121)),
    *(f"hip:{architecture}" for architecture in ("gfx942", "gfx950", "gfx90a", "gfx908")),
)
"""Every target that all plans compile for. Of two that a suggestion could name, the first is named."""

# Instructions that order memory between programs, in SASS and in AMD's assembly.
_ORDERING = re.compile(
    r"\b(?:MEMBAR\.(?:SC|ALL)\.GPU|CCTL\.IVALL|(?:ATOMG?|RED)\.\S*STRONG\.GPU"
    r"|buffer_(?:wbl2|inv) sc1|global_atomic_add)\b"
)


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel for one target.

    `registers` are per thread; `spills` counts registers spilled (AMD) or bytes of stack and local memory (NVIDIA), and
    `looped_spills` the instructions that move them within a loop; `shared` is in bytes per program. `loads` maps a
    tensor, as the source calls it, to how many load instructions there are by width in bytes. `ordering` names
    instructions that order memory between programs. `files` are Triton's texts and binaries by their suffix (``ttir``,
    ``ptx``, ``cubin``, ``amdgcn``, ``hsaco`` …).
    """

    kernel: str
    target: str
    constants: dict[str, int]
    warps: int
    registers: int
    spills: int
    looped_spills: int
    shared: int
    loads: dict[str, dict[int, int]]
    ordering: dict[str, int]
    disassembly: str = field(repr=False)
    files: dict[str, str | bytes] = field(repr=False)

    @property
    def name(self) -> str:
        """The kernel, with what varies in it: ``expand_tile-16``."""
        return "-".join([self.kernel, *map(str, self.constants.values())])


def compile_plan(spec: KernelSpec, plan: emitter.Plan, target: str) -> list[Compiled]:
    """Every variant of every kernel of `plan`. Raises `SpecError` for a plan that cannot run `spec` and a target that
    is not understood, and `ImportError` where Triton is not installed."""
    module = emitter.load(spec, plan)
    return [compile_variant(getattr(module, v.kernel), v, target) for v in emitter.variants(spec, plan)]


def compile_variant(kernel: Any, variant: emitter.Variant, target: str) -> Compiled:
    """One variant of a generated module's `kernel`, with pointers aligned as torch aligns them."""
    import triton
    from triton.compiler import ASTSource

    kernel = kernel if isinstance(kernel, triton.JITFunction) else kernel.fn  # below the autotuner
    pointers = [i for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        variant.signature,
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION is unset")
        made: Any = triton.compile(source, target=parse_target(target), options=variant.options)
    lines = Path(kernel.fn.__code__.co_filename).read_text().splitlines()
    nvidia = "cubin" in made.asm
    text = _disassemble(made.asm["cubin"]) if nvidia else made.asm["amdgcn"]
    registers, spills = _nvidia(made.asm["cubin"]) if nvidia else _amd(text)
    return Compiled(
        kernel=variant.kernel,
        target=target,
        constants=variant.constants,
        warps=variant.options["num_warps"],
        registers=registers,
        spills=spills,
        looped_spills=_looped_spills(text),
        shared=made.metadata.shared,
        loads=_loads(made.asm["ptx"] if nvidia else text, lines),
        ordering=dict(Counter(_ORDERING.findall(text))),
        disassembly=text,
        files=dict(made.asm),
    )


def parse_target(text: str) -> Any:
    """Triton's ``GPUTarget``. Raises `SpecError` for what is not in `KNOWN`, and `ImportError` without Triton."""
    if text not in KNOWN:
        near = _nearest(str(text))
        raise SpecError(
            f"not a target: {text!r}{f'; did you mean {near}?' if near else ''}"
            f" There are {', '.join(sorted(KNOWN, key=lambda target: (len(target), target)))}"
        )
    from triton.backends.compiler import GPUTarget

    kind, _, architecture = text.partition(":")
    return GPUTarget("cuda", int(architecture), 32) if kind == "cuda" else GPUTarget("hip", architecture, 64)


_SPELLINGS = (
    (r"^(sm|compute|cuda)?[ _:-]*(?=\d)", "cuda:"),
    (r"^(rocm|amdgpu|amd|hip)?[ _:-]*(?=gfx)", "hip:"),
    (r"^(rocm|amdgpu|amd)\b:?", "hip:"),
    (r"^(cuda:\d+)\.(?=\d)", r"\1"),
)
"""How else targets are written: sm_90, compute_90, 9.0, gfx942, rocm:gfx942."""


def _nearest(text: str) -> str | None:
    """The target that `text` may stand for: another spelling of it, its beginning, its beginning and more, a slip."""
    plain = unicodedata.normalize("NFKC", text).strip().lower()
    for pattern, replacement in _SPELLINGS:
        plain = re.sub(pattern, replacement, plain)
    near = [target for target in KNOWN if plain == target]
    near += [target for target in KNOWN if plain and target.startswith(plain)]
    near += [target for target in KNOWN if plain.startswith(target)]  # sm_90a, gfx942:sramecc+
    return next(iter([*near, *difflib.get_close_matches(plain, KNOWN, cutoff=0.75)]), None)


# --- What assembly tells -----------------------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> str:
    from triton import knobs

    return str(getattr(knobs.nvidia, name).path)


def _run(tool: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin=cubin)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory."""
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "--dump-resource-usage", cubin=cubin)))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _amd(assembly: str) -> tuple[int, int]:
    """Vector registers, and registers spilled or bytes of scratch."""
    fields = re.findall(r"\.(vgpr_count|[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly)
    values = {name: int(value) for name, value in fields}
    return values.pop("vgpr_count"), sum(values.values())


_LABEL = re.compile(r"^\s*(\.?L\w+):")
_BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.?LB?\w+)")
_SPILL = re.compile(r"\b(?:LDL|STL|scratch_(?:load|store)_\w+)\b")


def _looped_spills(disassembly: str) -> int:
    """Loads and stores of local memory between a label and a branch back to it."""
    labels: dict[str, int] = {}
    spills: list[int] = []
    looped: set[int] = set()
    for number, line in enumerate(disassembly.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            looped |= {at for at in spills if at > labels[branch[1]]}
        elif _SPILL.search(line):
            spills.append(number)
    return len(looped)


_LOC = re.compile(r"\.loc\s+\d+\s+(\d+)")
_WIDTHS = {"b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_LOAD = re.compile(
    r"\bld\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(?P<count>\d))?\.(?P<type>[bfu]\d+)"
    r"|\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (?P<bytes>0x[0-9a-f]+|\d+)"
    r"|\b(?:global|buffer)_load_(?P<amd>(?:ubyte|sbyte|ushort|short|dword)(?:x\d)?)"
)
_TENSOR = re.compile(r"tl\.load\($|tl\.load\((?:tl\.broadcast_to\()?\(*(\w+)")


def _loads(assembly: str, source: list[str]) -> dict[str, dict[int, int]]:
    """Load instructions by the tensor of the ``tl.load`` that they come from, and by width in bytes."""
    found: dict[str, Counter[int]] = {}
    tensor, inline = "", False
    for line in assembly.splitlines():
        if "inline asm" in line:  # inside, LLVM counts lines on
            inline = "begin" in line
        elif location := _LOC.search(line):
            tensor = tensor if inline else _tensor(source, int(location[1]))
        elif load := _LOAD.search(line):
            if load["amd"]:
                width = _AMD_WIDTHS[load["amd"]]
            elif load["bytes"]:
                width = int(load["bytes"], 0)
            else:
                width = int(load["count"] or 1) * _WIDTHS[load["type"]]
            found.setdefault(tensor, Counter())[width] += 1
    return {name: dict(sorted(widths.items())) for name, widths in sorted(found.items())}


def _tensor(source: list[str], number: int) -> str:
    """The tensor whose ``tl.load`` begins on a line, if one does."""
    text = source[number - 1] if 0 < number <= len(source) else ""
    match = _TENSOR.search(text)
    if match is None:
        return ""
    if match[1]:
        return match[1]
    following = re.search(r"(?:tl\.broadcast_to\()?\(*(\w+)", source[number].strip())
    return following[1] if following else ""
