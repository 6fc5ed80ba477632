"""Adapters that came from memory, in a file while they are not in the pool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gawscompile.banks.checkpoints import Adapter, Factors
from gawscompile.banks.dora import Scaled
from gawscompile.banks.kronecker import Chain
from gawscompile.ir.operators import Mode


def spilled(config: Mapping[str, Any], factors: Mapping[str, Factors | Chain], file: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    scales, chains = {path: f.scale for path, f in factors.items()}, {}
    for path, f in factors.items():
        parts: dict[str, Tensor | None]
        if isinstance(f, Chain):
            parts = {str(number): mode.matrix for number, mode in enumerate(f.modes)} | {"diag": f.diag}
            chains[path] = [(name, mode.before, mode.after) for name, mode in zip(f.names, f.modes, strict=True)]
        else:
            parts = {"a": f.a, "b": f.b, "bias": f.bias, **(f.scaled._asdict() if f.scaled else {})}
        tensors |= {f"{path}/{name}": part.clone() for name, part in parts.items() if part is not None}
    words = {"config": config, "scales": scales, "chains": chains}
    save_file(tensors, file, metadata={name: json.dumps(word) for name, word in words.items()})


def unspilled(file: Path) -> Adapter:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        words = {name: json.loads(word) for name, word in opened.metadata().items()}
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    factors: dict[str, Factors | Chain] = {}
    for path, scale in words["scales"].items():
        if chain := words["chains"].get(path):
            modes = [Mode(before, found[f"{path}/{i}"], after) for i, (_, before, after) in enumerate(chain)]
            names = tuple(name for name, _, _ in chain)
            factors[path] = Chain(tuple(modes), names, scale, found.get(f"{path}/diag"))
            continue
        a, b, bias, c, m = (found.get(f"{path}/{part}") for part in ("a", "b", "bias", *Scaled._fields))
        assert a is not None and b is not None
        factors[path] = Factors(a, b, scale, bias, None if c is None or m is None else Scaled(c, m))
    return Adapter(factors, words["config"])
