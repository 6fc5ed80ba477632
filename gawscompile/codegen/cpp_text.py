"""Phrases of generated C++ that both entry points of `cpp` use: operands, parameters, the parallel region."""

from __future__ import annotations

from gawscompile.codegen.cpp_modes import Scratch
from gawscompile.ir.spec import KernelSpec, Operand, ProjectionSpec

CPP_TYPES = {"f32": "float", "f64": "double", "bf16": "bf16", "f16": "f16"}


EPILOGUE = ("bias", "residual", "rowscale", "b", "c", "z", "mode")
"""Roles of the operands that are added to a base's product."""


def has_epilogue(p: ProjectionSpec) -> bool:
    """Whether anything is to be added to the plain product W x."""
    return bool(p.bias or p.residual or p.adapted)


def from_x(i: int, ranks: Scratch) -> bool:
    """Whether a row of projection i's Kronecker terms is a dot with x itself."""
    return any(ending.source.pointer == "x" for ending in ranks.endings[i])


def extras(i: int, p: ProjectionSpec, ranks: Scratch) -> bool:
    """Whether projection i reads scratch."""
    return bool(p.lowrank) or any(ending.source.pointer != "x" for ending in ranks.endings[i])


def arguments(spec: KernelSpec, projection: int, roles: tuple[str, ...]) -> list[Operand]:
    return [o for o in spec.operands() if o.projection == projection and o.role in roles]


def parameters(operands: list[Operand]) -> str:
    return "".join(f"const {CPP_TYPES[o.dtype]}* {o.name}, " for o in operands)


def unpack(spec: KernelSpec, roles: tuple[str, ...], outs: list[str]) -> list[str]:
    """Name the operands that the body uses: ``const float* a0_0 = (const float*)in[3];``"""
    return [
        f"  const {CPP_TYPES[o.dtype]}* {o.name} = (const {CPP_TYPES[o.dtype]}*)in[{position}];"
        for position, o in enumerate(spec.operands())
        if o.role in roles
    ] + [
        f"  {CPP_TYPES[p.out]}* {name} = ({CPP_TYPES[p.out]}*)out[{i}];"
        for i, (name, p) in enumerate(zip(outs, [*spec.projections, spec.projections[0]], strict=False))
    ]


def scratch(ranks: Scratch) -> list[str]:
    """Where u and mode products lie, if there are any."""
    if not ranks.width:
        return []
    return [
        "  static thread_local Buffer scratch;  // of the calling thread",
        "  float* u = scratch.of(m * LDU);",
    ]


def region(body: list[str]) -> list[str]:
    return [
        "#pragma omp parallel",
        "  {",
        "    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();",
        *body,
        "  }",
        "}",
    ]


def expanded(p: ProjectionSpec) -> tuple[str, ...]:
    """The operands of `_expand`."""
    return EPILOGUE if p.transposed or not p.dtype else ("weight", *EPILOGUE)
