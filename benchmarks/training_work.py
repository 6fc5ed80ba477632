"""What a training step of one layer's adapted linears launches and moves on a GPU: as traced, and rewritten.

    python -m benchmarks.training_work [--gpu H100] [--markdown FILE]

The linears of a LLaMA-3.2-1B layer that read its two norms, and `down`; LoRA r = 16 on each, a bf16 base, 512 tokens,
forward and backward. Nothing runs: each operation of a graph counts as a launch that reads its inputs and writes its
outputs, and of the rewritten graph our kernels count as their plans for the GPU say. SwiGLU's own elementwise
operations, which both graphs have and Inductor fuses in both, are left out.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import common
from gawscompile import ahead
from gawscompile.calibration import measure
from gawscompile.planning.devices import GPUS
from gawscompile.verify.work import total

SIZES = {"q": (2048, 2048), "k": (2048, 512), "v": (2048, 512), "gate": (2048, 8192), "up": (2048, 8192)}
SIZES |= {"down": (8192, 2048)}
TOKENS = 512


class SwiGLU(torch.nn.Module):
    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up


class Linears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = torch.nn.ModuleDict({name: torch.nn.Linear(k, n, bias=False) for name, (k, n) in SIZES.items()})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x: ``[tokens, 2048]``; a result for each norm's reader, as a layer gives them."""
        q, k, v, gate, up, down = self.linears.values()
        return q(x), k(x), v(x), down(SwiGLU()(gate(x), up(x)))


class Work(NamedTuple):
    """Launches and bytes of a step, traced and rewritten."""

    launches: tuple[int, int]
    bytes: tuple[int, int]
    traced: ahead.Traced

    @property
    def shares(self) -> tuple[float, float]:
        """Rewritten over traced, of launches and of bytes."""
        return self.launches[1] / self.launches[0], self.bytes[1] / self.bytes[0]


def work(gpu: str, wide: bool) -> Work:
    """Of the adapted linears; with factors in fp32, PEFT's default, if `wide`, else in bf16."""
    import peft

    config = peft.LoraConfig(r=16, target_modules=list(SIZES))
    model = peft.get_peft_model(Linears().bfloat16(), config, autocast_adapter_dtype=wide).train()
    x = torch.randn(TOKENS, SIZES["q"][0], dtype=torch.bfloat16, requires_grad=True)
    (graph,) = ahead.trace(model, GPUS[gpu], x, training=True)
    halves = [torch.randn(TOKENS, SIZES["up"][1], dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    (elementwise,) = ahead.trace(SwiGLU(), GPUS[gpu], *halves, training=True)
    before, after, own = (total(one) for one in (graph.before, graph.after, elementwise.before))
    launches = before.launches - own.launches, after.launches - own.launches
    return Work(launches, (int(before.bytes) - int(own.bytes), int(after.bytes) - int(own.bytes)), graph)


def main(argv: list[str] | None = None) -> None:
    """The table, on stdout and into ``--markdown``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(argv)
    rows: list[list[str]] = []
    for factors, wide in (("fp32", True), ("bf16", False)):
        found = work(options.gpu, wide)
        moved = [f"{one / 1e6:.0f}" for one in found.bytes]
        rows.append([factors, *map(str, found.launches), *moved, *(f"{share:.2f}" for share in found.shares)])
    heads = ["factors", "launches, traced", "rewritten", "MB, traced", "rewritten", "launches", "bytes"]
    title = f"Planned for {options.gpu}: linears of a LLaMA-3.2-1B layer, forward and backward, {TOKENS} tokens"
    given = argv if argv is not None else sys.argv[1:]
    report = functools.partial(measure.table, heads, rows)
    common.publish(title, "training_work", given, options.markdown, report)


if __name__ == "__main__":
    main()
