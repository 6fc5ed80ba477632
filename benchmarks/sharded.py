"""Tensor parallelism: what a layer costs each rank, and tokens of two processes over gloo.

    python -m benchmarks.sharded --markdown benchmarks/results/sharded.md --plot benchmarks/results/sharded.png
    python -m benchmarks.sharded --parts shapes

*shapes*: one decoder layer of LLaMA-7B and 70B (bf16, LoRA r = 16 in fp32 on all seven linears, one token) for 2, 4 and
8 ranks, as our passes leave it on the first of them. No other rank is there, and no weight is touched: the process
group is torch's fake one. Bytes are predicted from the shapes, and counted in the graph. Plans are those for an H100.

*tokens*: decoding with SmolLM2, whose MLPs two processes of one thread share (its three key heads do not split), with
LoRA r = 16 on all linears. All variants take turns in the same two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks import common
from gawscompile.analysis import collectives
from gawscompile.analysis.reading import aten
from gawscompile.calibration import measure
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import OPERAND_DTYPES
from gawscompile.planning.table import Program

RANK = 16
LAYERS = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "LLaMA-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
ROWWISE = ("o_proj", "down_proj")
MLP = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
PAST = 64


def linears(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's linears."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {**attention, "o_proj": (hidden, hidden), **mlp}


def predicted(sizes: dict[str, int], ranks: int, adapted: bool, joined: bool) -> tuple[int, int]:
    """Bytes of weights and adapters that a rank reads, and bytes that it gives to be summed up, for a token: bf16, but
    for factors, which PEFT has in fp32."""
    read = summed = 0
    for name, (n, k) in linears(sizes).items():
        rows = name in ROWWISE
        read += 2 * n * k // ranks
        if adapted:
            read += 4 * RANK * (k // ranks + n if rows else k + n // ranks)
        summed += (2 * n + (4 * RANK if adapted and not joined else 0)) if rows else 0
    return read, summed


class Layer:
    """One sharded layer as it is traced on the first of `ranks`, and as our passes leave it."""

    def __init__(self, sizes: dict[str, int], ranks: int, adapted: bool) -> None:
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from gawscompile.backend import stored_inputs

        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        try:
            model = _sharded(sizes, ranks, adapted)
            decompositions = select_decomp_table()
            through = aot_autograd(fw_compiler=self._take, inference_compiler=self._take, decompositions=decompositions)

            def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
                self._stored = stored_inputs(gm, inputs)
                return through(gm, inputs)

            torch._dynamo.reset()
            with torch.no_grad():
                torch.compile(model, backend=backend, dynamic=False)(input_ids=torch.zeros(1, 1, dtype=torch.long))
        finally:
            dist.destroy_process_group()

    def _take(self, gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        from gawscompile.backend import GawsPass
        from gawscompile.options import Options
        from gawscompile.planning import devices
        from gawscompile.runtime import ops

        self.traced = torch.fx.Graph()
        self.traced.output(self.traced.graph_copy(gm.graph, {}))
        hook = GawsPass(Options(strict=True), "layer", "cpu", False, self._stored)
        output = gm.graph.output_node().args[0]
        shapes = [(one.meta["val"].shape, one.meta["val"].dtype) for one in output]  # type: ignore[union-attr]
        with devices.planning_for(devices.GPUS["H100"]), mock.patch.object(ops, "prepare", lambda program: None):
            hook(gm.graph)
        assert hook.record is not None
        self.record, self.left = hook.record, gm.graph
        return lambda *inputs: [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]

    @property
    def products(self) -> int:
        """Matrix products as traced."""
        return sum(node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default) for node in self.traced.nodes)

    @property
    def launches(self) -> int:
        """Of the groups' kernels."""
        programs = [Program.parse(group.program) for group in self.record.groups]
        return sum(program.target.launches(program.spec, program.plans[0]) for program in programs)

    def bytes_summed(self, graph: torch.fx.Graph) -> int:
        found = [node for node in graph.nodes if collectives.is_collective(node) and "wait" not in str(node.target)]
        return sum(node.meta["val"].numel() * node.meta["val"].dtype.itemsize for node in found)

    def bytes_read(self) -> int:
        """Of weights and factors: what the groups read but for activations. The library has the small head."""
        total = 0
        for group in self.record.groups:
            operands = KernelSpec.parse(group.spec).operands()
            sizes = [(one, [size for size in one.shape if isinstance(size, int)]) for one in operands]
            total += sum(OPERAND_DTYPES[one.dtype].itemsize * math.prod(s) for one, s in sizes if not one.activation)
        return total


def _sharded(sizes: dict[str, int], ranks: int, adapted: bool) -> Any:
    """A layer between a small embedding and a small head, on memory that nobody touches."""
    import peft
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    config: Any = {**sizes, "vocab_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model = model.bfloat16().eval()
    if adapted:
        lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=list(linears(sizes)))
        model = peft.get_peft_model(model, lora, low_cpu_mem_usage=True).eval()
    mesh = init_device_mesh("cpu", (ranks,))
    plan: dict[str, Any] = {}
    for path, _ in list(model.named_modules()):
        name = path.rpartition(".")[2]
        if name in linears(sizes):
            style: Any = RowwiseParallel if name in ROWWISE else ColwiseParallel
            factor = f"{path}.{'lora_A' if name in ROWWISE else 'lora_B'}.default"
            plan |= {f"{path}.base_layer": style(), factor: style()} if adapted else {path: style()}
    parallelize_module(model, mesh, plan)
    return model.to_empty(device="cpu")


@dataclass
class Shape:
    """What a layer costs one of `ranks`, predicted and counted: bytes read and bytes given to be summed up (PEFT's, and
    ours); collectives of the base, of PEFT and of ours."""

    name: str
    ranks: int
    collectives: tuple[int, int, int]
    products: int
    launches: int
    base: int
    predicted: int
    counted: int
    summed: tuple[int, int]
    counted_summed: tuple[int, int]

    @classmethod
    def of(cls, name: str, ranks: int) -> Shape:
        sizes = LAYERS[name]
        base, adapted = Layer(sizes, ranks, False), Layer(sizes, ranks, True)
        read, summed = predicted(sizes, ranks, True, True)
        return cls(
            name,
            ranks,
            (
                len(collectives.listed(base.left)),
                len(collectives.listed(adapted.traced)),
                len(collectives.listed(adapted.left)),
            ),
            adapted.products - 1,  # without the head
            adapted.launches,
            predicted(sizes, ranks, False, True)[0],
            read,
            adapted.bytes_read(),
            (predicted(sizes, ranks, True, False)[1], summed),
            (adapted.bytes_summed(adapted.traced), adapted.bytes_summed(adapted.left)),
        )


def shapes_table(shapes: list[Shape], markdown: bool) -> str:
    rows = [
        [
            f"{shape.name}, {shape.ranks} ranks",
            " → ".join(map(str, shape.collectives)),
            str(shape.products),
            str(shape.launches),
            *(f"{size / 2**20:.1f}" for size in (shape.base, shape.predicted, shape.counted)),
            " → ".join(map(str, shape.summed)),
            " → ".join(map(str, shape.counted_summed)),
        ]
        for shape in shapes
    ]
    heads = [
        "a layer, a token, a rank",
        "collectives: base → PEFT → gaws",
        "products as traced",
        "launches",
        "base MB",
        "MB predicted",
        "MB counted",
        "bytes summed, predicted",
        "counted",
    ]
    return measure.table(heads, rows, markdown)


# ---- tokens of two processes ----------------------------------------------------------------------------------------

VARIANTS = {
    "Inductor, base": ("inductor", False),
    "PEFT + Inductor": ("inductor", True),
    "gaws, base": ("gaws", False),
    "gaws, adapted": ("gaws", True),
}


def tokens(rounds: int, layers: int | None, dtype: str) -> None:
    """On each rank: prints, on the first, medians as JSON."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    from gawscompile.demo import packaged
    from gawscompile.demo.decoding import Decoder

    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = packaged.smollm2(progress=False)
    config = AutoConfig.from_pretrained(folder)
    config.base_model_tp_plan = {f"layers.*.mlp.{name}": style for name, style in MLP.items()}
    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    settings: dict[str, Any] = {"config": config, "dtype": getattr(torch, dtype), "distributed_config": plan}
    config.num_hidden_layers = layers or config.num_hidden_layers
    runs = {}
    for name, (backend, adapted) in VARIANTS.items():
        model = AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
        if adapted:
            lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
            model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).eval()
        torch._dynamo.reset_code_caches()
        decoder = Decoder(model, measure.compiled(model, backend), PAST + 8)
        decoder.fill(list(range(5, 5 + PAST)))
        decoder.token.fill_(7)
        for _ in range(3):
            decoder.timed_step()
        runs[name] = decoder.timed_step
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            dist.barrier()
            samples[name] += [run() for _ in range(3)]
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({name: statistics.median(found) for name, found in samples.items()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measured(processes: int, rounds: int, layers: int | None, dtype: str) -> list[dict[str, float]]:
    """Medians of each variant, in each of some pairs of processes, which share what they compile."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run += ["-m", "benchmarks.sharded", "--rank", "--rounds", str(rounds), "--dtype", dtype]
        run += ["--layers", str(layers)] if layers else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        for _ in range(processes):
            done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=3000)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(done.stderr[-4000:])
            found.append(json.loads(lines[0].removeprefix("RESULT ")))
    return found


def tokens_table(found: list[dict[str, float]], layers: int | None, dtype: str, markdown: bool) -> str:
    rows = []
    for name in VARIANTS:
        ratios = [one[name] / one["Inductor, base"] for one in found]
        own = [one[name] / one["gaws, base" if "gaws" in name else "Inductor, base"] for one in found]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        median = statistics.median(one[name] for one in found)
        over = [f"{statistics.median(one):.2f}" for one in (ratios, own)]
        rows.append([name, f"{median:.1f}", over[0], spread, over[1]])
    title = f"SmolLM2, {layers or 30} layers, {dtype}: ms a token"
    return measure.table([title, "median", "over Inductor's base", "spread", "over its own base"], rows, markdown)


def plot(shapes: list[Shape], found: list[dict[str, float]], file: Path) -> None:
    """Bytes that a rank reads, over ranks, and the time of a token; a panel for what was run."""
    panels = bool(shapes) + bool(found)
    if not panels or (figure := common.figure(4.2 * panels, 3.2)) is None:
        return
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if shapes:
        panel = axes.pop(0)
        for name, colour in zip(LAYERS, ("#2060c0", "#c06020"), strict=True):
            mine = [shape for shape in shapes if shape.name == name]
            ranks = [shape.ranks for shape in mine]
            panel.plot(ranks, [s.predicted / 2**20 for s in mine], color=colour, label=f"{name}, LoRA, predicted")
            panel.plot(ranks, [s.counted / 2**20 for s in mine], "o", color=colour, label="counted in the graph")
        panel.set(xscale="log", yscale="log", xlabel="ranks", ylabel="MB a rank reads, a layer, a token")
        panel.set_xticks([2, 4, 8], ["2", "4", "8"])
        panel.minorticks_off()
        panel.legend(fontsize=7)
    if found:
        ratios = [[one[name] / one["Inductor, base"] for one in found] for name in VARIANTS]
        middle = [statistics.median(one) for one in ratios]
        spread = [
            [m - min(one) for m, one in zip(middle, ratios, strict=True)],
            [max(one) - m for m, one in zip(middle, ratios, strict=True)],
        ]
        colours = ["#2060c0" if "gaws" in name else "#909090" for name in VARIANTS]
        axes[0].bar([name.replace(", ", ",\n") for name in VARIANTS], middle, yerr=spread, color=colours, capsize=4)
        axes[0].set_ylabel("a token of SmolLM2 on 2 processes,\nover Inductor's base")
        axes[0].tick_params(axis="x", labelsize=7)
    common.save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=("shapes", "tokens"), default=["shapes", "tokens"])
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes, whose medians are taken")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    parser.add_argument("--plot", type=Path, help="needs matplotlib: pip install 'gawscompile[bench]'")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        tokens(given.rounds, given.layers, given.dtype)
        return
    counted = [Shape.of(name, ranks) for name in LAYERS for ranks in (2, 4, 8)] if "shapes" in given.parts else []
    found: list[dict[str, float]] = []
    if "tokens" in given.parts:
        found = measured(given.processes, given.rounds, given.layers, given.dtype)

    def report(markdown: bool) -> str:
        written = [measure.describe(measure.machine())]
        written += [shapes_table(counted, markdown)] if counted else []
        written += [tokens_table(found, given.layers, given.dtype, markdown)] if found else []
        return "\n\n".join(written)

    common.publish("Tensor parallelism", "sharded", sys.argv[1:], given.markdown, report)
    if given.plot:
        plot(counted, found, given.plot)


if __name__ == "__main__":
    main()
