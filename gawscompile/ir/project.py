"""`project`: a fused group as one node of the graph, with its reference meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gawscompile.ir.operators import Kronecker, Mode
from gawscompile.ir.spec import DTYPES, KernelSpec


def project(x: torch.Tensor, operands: list[torch.Tensor], spec: str) -> list[torch.Tensor]:
    """What the generated kernels of `spec` compute, segment by segment, in the dtypes that eager would use.

    x ``[..., k]``; `operands` as ``KernelSpec.operands()`` lists them; one ``[..., n]`` per output.
    """
    parsed = KernelSpec.parse(spec)
    named = {operand.name: tensor for operand, tensor in zip(parsed.operands(), operands, strict=True)}
    outputs = []
    for i, p in enumerate(parsed.projections):
        late = bool(p.rowscale)  # the bias comes after the scale
        if p.dtype:
            weight = named[f"w{i}"].T if p.transposed else named[f"w{i}"]
            bias = named[f"bias{i}"] if p.bias and not late else None
            together = bias is None or bias.dtype == weight.dtype
            y = F.linear(x.to(weight.dtype), weight, bias if together else None)
            y = y if bias is None or together else y + bias
        else:
            y = named[f"res{i}"] + named[f"bias{i}"] if p.bias else named[f"res{i}"]
        for j, term in enumerate(p.lowrank):
            a, b = named[f"a{i}_{j}"], named[f"b{i}_{j}"]
            scale = named[f"scale{i}_{j}"] if term.scale is None else term.scale
            y = y + F.linear(F.linear(x.to(a.dtype), a), b) * scale
        for j in range(len(p.given)):
            c = named[f"c{i}_{j}"]
            y = y + F.linear(named[f"z{i}_{j}"].to(c.dtype), c)
        for j, kron in enumerate(p.kronecker):
            modes = [Mode(mode.before, named[f"g{i}_{j}_{at}"], mode.after) for at, mode in enumerate(kron.modes)]
            scale = named[f"kron_scale{i}_{j}"] if kron.scale is None else kron.scale
            y = y + Kronecker(tuple(modes), scale).apply(x)
        if p.rowscale:
            y = y * named[f"rowscale{i}"]
            y = y + named[f"bias{i}"] if p.bias else y
        y = y.to(DTYPES[p.out]) if x.dtype != torch.float64 else y
        outputs.append(y + named[f"res{i}"] if p.residual and p.dtype else y)
    return [F.silu(outputs[0]) * outputs[1]] if parsed.swiglu else outputs
