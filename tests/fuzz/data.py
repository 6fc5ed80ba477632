"""Numbers for the inputs of a program: drawn anew as often as a judgement needs them."""

from __future__ import annotations

import torch

from tests.fuzz.programs import Program, compiled, draw

WAYS = ("plain", "plain", "plain", "cancelling", "cancelling", "nan", "inf", "large")
"""How numbers are drawn. Cancelling: activations far from zero and weights whose rows sum to none, so that sums in too
narrow a dtype lose what is left of them. NaN, inf: in one place of one input. Large: fp16 may overflow."""


def tensors(program: Program, seed: int, way: str = "plain", batch: dict[str, int] | None = None) -> list[torch.Tensor]:
    """All inputs of one call. `batch`: other values for some sizes (those that were traced as symbols)."""
    sizes = program.sizes | (batch or {})
    scope: dict[str, torch.Tensor] = {}
    for number, one in enumerate(program.inputs):
        generator = torch.Generator().manual_seed(7919 * seed + number)
        shape = [eval(compiled(expression), {}, sizes) for expression in one.shape]
        plain = draw(one.kind, shape, one.dtype, generator)
        if way == "cancelling" and one.kind == "normal" and not one.stored:
            plain = (plain.double() / 4 + 30).to(one.dtype)
        if way == "cancelling" and one.kind == "weight" and plain.dim() == 2:
            plain = (plain.double() - plain.double().mean(-1, keepdim=True)).to(one.dtype)
        if way == "large" and not one.stored and plain.is_floating_point():
            plain *= 300
        scope[one.name] = eval(compiled(one.layout), dict(sizes) | scope | {"t": plain})
    floats = [t for t in scope.values() if t.is_floating_point() and t.numel()]
    if way in ("nan", "inf") and floats:
        chosen = floats[seed % len(floats)]
        place = tuple((seed // 7) % size for size in chosen.shape)
        chosen[place] = float("nan") if way == "nan" else float("-inf" if seed % 2 else "inf")
    return list(scope.values())
