"""How a model's linears are spread over ranks, for `explain`: what DTensors say, beside the shapes that graphs have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from gawscompile.ir.records import LinearRecord, Reason


def tell(entries: Sequence[LinearRecord], model: torch.nn.Module) -> None:
    """Says of every linear of a sharded `model` how it is sharded: by columns of its output, by rows of its input as
    tensor parallelism calls them, or not at all. Nothing of a model that is not sharded."""
    weights = dict(_weights(model))
    if not any(map(_is_sharded, weights.values())):
        return
    for entry in entries:
        if (weight := weights.get(entry.path)) is not None:
            entry.shard = _told(weight, entry)


def counted(collectives: Iterable[str]) -> list[str]:
    """``collectives of a call: 3 × all_reduce sum 0``."""
    counts = Counter(collectives)
    said = ", ".join(f"{count} × {name}" for name, count in counts.items())
    return [f"collectives of a call: {said}"] if said else []


def _weights(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            yield name.removesuffix(".base_layer") or "(model)", weight


def _is_sharded(weight: torch.Tensor) -> bool:
    return any(one.is_shard() for one in getattr(weight, "placements", ()))


def _told(weight: torch.Tensor, entry: LinearRecord) -> str:
    if not _is_sharded(weight):
        return "replicated"
    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    split = [(one.dim % 2, mesh.size(at)) for at, one in enumerate(placements) if one.is_shard()]
    whole = "x".join(map(str, weight.shape))
    ranks = " and ".join(str(size) for _, size in split)
    if entry.shape == tuple(weight.shape) and entry.reason != Reason.NOT_TRACED.name:
        return f"kept by {ranks} ranks in parts, gathered for a call"
    ways = " and ".join("rowwise" if dim else "colwise" for dim, _ in split)
    return f"{ways}: 1 of {ranks} parts of {whole}"
