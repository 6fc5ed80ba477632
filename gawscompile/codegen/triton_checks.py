"""What the Triton emitter refuses: specs that it has no kernels for, and arguments that do not fit a spec."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gawscompile.codegen import triton_packed as packed
from gawscompile.ir.banked import FIELDS
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import ANY, DTYPES, OPERAND_DTYPES, SpecError


def check_spec(spec: KernelSpec) -> None:
    if not spec.projections:
        raise SpecError(f"no projections in {spec}")
    if any(p.opaque is not None for p in spec.projections):
        raise SpecError(f"no kernel on a GPU adds to what an opaque base makes: {spec}")
    if any(p.banked and p.banked.width is None for p in spec.projections):
        raise SpecError(f"a kernel on a GPU has to know how wide a bank's schedule is: {spec}")
    packed.check(spec)
    ranks = [term.rank for p in spec.projections for term in p.lowrank]
    ranks += [term.rank for p in spec.projections for term in p.given]
    if min(spec.k, *(p.n for p in spec.projections), *ranks) < 1:
        raise SpecError(f"k, n and ranks must be at least 1: {spec}")


def check_schedules(spec: KernelSpec, m: int, operands: Sequence[torch.Tensor]) -> None:
    """Raises `ValueError` where `m` tokens are no whole rows of a bank's schedule, or its rows are not as wide as the
    kernel has them."""
    for operand, tensor in zip(spec.operands(), operands, strict=True):
        bank, rows = spec.projections[operand.projection].banked, tensor.shape[0] - 1 if tensor.dim() else 0
        if operand.role != "schedule" or bank is None:
            continue
        if tuple(tensor.shape[1:]) != (bank.width, FIELDS) or rows < 1 or m % rows:
            what = f"{m} tokens, and {operand.name} is {list(tensor.shape)}, not [rows + 1, {bank.width}, {FIELDS}]"
            raise ValueError(f"{what} for whole rows of the batch: a bank's adapters are given by row")


def check_arguments(spec: KernelSpec, x: torch.Tensor, operands: Sequence[torch.Tensor]) -> None:
    if x.dim() != 2 or x.shape[1] != spec.k or x.shape[0] < 1 or x.dtype != DTYPES[spec.x]:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}, not [m >= 1, {spec.k}] {DTYPES[spec.x]}")
    wanted = list(spec.operands())
    if len(wanted) != len(operands):
        raise ValueError(f"{len(operands)} operands for {len(wanted)}: {', '.join(o.name for o in wanted)}")
    check_schedules(spec, x.shape[0], operands)
    for operand, tensor in zip(wanted, operands, strict=True):
        sizes = (tensor.numel(),) if operand.flat else tuple(tensor.shape)
        known = zip(operand.shape, sizes, strict=False)
        shape = [{"m": x.shape[0], ANY: there}.get(size, size) for size, there in known]
        dtype = OPERAND_DTYPES[operand.dtype]
        if list(sizes) != shape or len(shape) != len(operand.shape) or tensor.dtype != dtype:
            raise ValueError(f"{operand.name} is {list(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
        if not operand.scale and tensor.device != x.device:
            raise ValueError(f"{operand.name} is on {tensor.device}, x on {x.device}")
        if not operand.activation and not tensor.is_contiguous():
            raise ValueError(f"{operand.name} is not contiguous: strides {tensor.stride()} of {shape}")
