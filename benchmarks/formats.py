"""One model in several formats, side by side in one process: a token with and without adapters, memory, and quality.

    python -m benchmarks.formats --model smollm2 --dtype bfloat16
    python -m benchmarks.formats --model llama-3.2-1b --layers 4 --formats int8 nf4 --parts speed

Every format takes turns with the plain weights, under gaws and Inductor, with and without a LoRA on every linear. The
first table has medians, ratios to gaws' adapted model with plain weights, to Inductor's base and Inductor's adapted
model in the same format, and the tax over gaws' own base, beside the share of bytes that adapters are. The second says
what a format loses by itself, and what running it by gaws adds: logits against the same model in fp32 with plain
weights, and in fp32 with the weights that the format holds. Real text for models with real weights, else random tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import common, quantized
from benchmarks.common import Setup
from gawscompile.calibration import measure
from gawscompile.loading.quiet import quiet

PLAIN = "plain"
TEXT = Path(common.gawscompile.__file__).parent / "demo" / "lighthouse.txt"
TOKENS = 96
"""Of the text that quality is measured on."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="as benchmarks.runtime takes it")
    parser.add_argument("--layers", type=int, help="cut a shape to its first N layers")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--formats", nargs="+", default=quantized.installed(), choices=list(quantized.KINDS))
    parser.add_argument("--backends", nargs="+", default=["inductor", "gaws"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--parts", nargs="+", default=["speed", "quality"], choices=("speed", "quality"))
    parser.add_argument("--head", action="store_true", help="quantise the head too, which is most of a shape cut short")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    return parser.parse_args(argv)


def setup_of(options: argparse.Namespace, kind: str) -> Setup:
    """The model in one format."""
    setup = Setup(options.model, options.dtype, layers=options.layers)
    return dataclasses.replace(setup, quantize=None if kind == PLAIN else kind)


def loaded(options: argparse.Namespace, kind: str) -> Any:
    """The bare model in one format."""
    model = common.load_base(setup_of(options, kind))
    if options.head and kind != PLAIN:
        head = model.get_output_embeddings()
        quantized.quantize(model, kind, {name for name, module in model.named_modules() if module is head})
    return model


def speed(options: argparse.Namespace) -> list[list[str]]:
    """A row for each format: decode."""
    steppers, share = {}, {}
    for kind in (PLAIN, *options.formats):
        setup = setup_of(options, kind)
        base = loaded(options, kind)
        adapted = common.with_adapter(base, setup)
        share[kind] = adapter_bytes(adapted) / tensor_bytes(base)
        for backend in options.backends:
            for name, model in (("base", base), ("lora", adapted)):
                (case,) = [case for case in common.cases(model, backend, setup) if case.name.startswith("decode")]
                case.step()
                case.step()
                print(f"{kind} {backend} {name} ready", file=sys.stderr, flush=True)
                steppers[f"{kind} {backend} {name}"] = case.step
    guarded = [title for title in steppers if "gaws" in title]
    samples, guardless = measure.interleave(steppers, options.rounds, options.steps, guarded)
    median = {title: measure.Timing.of(times).median for title, times in samples.items()}
    bare = {title: measure.Timing.of(times).median for title, times in guardless.items()}

    def ratio(a: str, b: str, of: dict[str, float] = median) -> str:
        return f"{of[a] / of[b]:.2f}" if a in of and b in of else ""

    return [
        [
            kind,
            f"{median[f'{kind} gaws base']:.2f}",
            f"{median[f'{kind} gaws lora']:.2f}",
            ratio(f"{kind} gaws lora", f"{PLAIN} gaws lora"),
            ratio(f"{kind} gaws lora", f"{PLAIN} gaws lora", bare),
            ratio(f"{kind} gaws lora", f"{kind} inductor base"),
            ratio(f"{kind} gaws lora", f"{kind} inductor lora"),
            ratio(f"{kind} gaws lora", f"{kind} gaws base", bare),
            f"{1 + share[kind]:.3f}",
        ]
        for kind in (PLAIN, *options.formats)
    ]


SPEED = ["format", "gaws base, ms", "gaws LoRA, ms", "over plain gaws LoRA", "no guards", "over Inductor's base",
         "over Inductor's LoRA", "tax, no guards", "1 + byte share"]  # fmt: skip


def tensor_bytes(model: Any) -> int:
    """Of all that a token reads: parameters and buffers, but the table of embeddings where the head has its own."""
    seen = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            names = ("qdata", "scale", "scale_and_zero")
            inner = [getattr(tensor, name) for name in names if hasattr(tensor, name)] or [tensor]
            state = getattr(tensor, "quant_state", None)
            inner += [state.absmax] if state is not None else []
            seen.update({id(one): one.nbytes for one in inner if isinstance(one, torch.Tensor)})
        meta = getattr(module, "meta", None)  # HQQ's
        for one in (meta or {}).values() if isinstance(meta, dict) else ():
            if isinstance(one, torch.Tensor):
                seen[id(one)] = one.nbytes
    return sum(seen.values())


def adapter_bytes(model: Any) -> int:
    """Of LoRA's factors."""
    return sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)


def quality(options: argparse.Namespace) -> list[list[str]]:
    """A row for each format: relative errors of logits, and the loss on a text."""
    reference = common.load_base(Setup(options.model, "float32", layers=options.layers))
    ids = tokens(options, reference)
    want = logits(reference, ids)
    rows = [["plain, fp32", "", "", "", f"{loss(want, ids):.3f}"]] if options.model == "smollm2" else []
    for kind in (PLAIN, *options.formats):
        exact = loaded(options, kind)
        quantized.dequantize(exact)
        base = loaded(options, kind)
        torch.compiler.reset()
        got = logits(torch.compile(base, backend="gaws", dynamic=False), ids)
        eager = logits(base, ids)
        held = logits(exact.float(), ids)
        errors = [f"{100 * cell:.2f} %" for cell in (error(held, want), error(got, held), error(eager, held))]
        rows.append([kind, *errors, f"{loss(got, ids):.3f}" if options.model == "smollm2" else ""])
    return rows


QUALITY = ["format", "what the format loses", "what gaws adds", "what eager adds", "loss"]


def tokens(options: argparse.Namespace, model: Any) -> torch.Tensor:
    if options.model != "smollm2":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(common.folder_of(options.model))
    found: torch.Tensor = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, :TOKENS]
    return found


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids, use_cache=False).logits
    return found.double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def loss(found: torch.Tensor, ids: torch.Tensor) -> float:
    return float(F.cross_entropy(found[0, :-1], ids[0, 1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    quiet()
    options = arguments(argv)
    parts = {"speed": (SPEED, speed), "quality": (QUALITY, quality)}
    tables = [(parts[part][0], parts[part][1](options)) for part in options.parts]

    def report(markdown: bool) -> str:
        name = common.title(dataclasses.asdict(setup_of(options, PLAIN)))
        facts = measure.machine()
        head = f"{measure.describe(facts)}\n\n{name}, {options.dtype}, one token"
        return "\n\n".join([head, *(measure.table(headers, rows, markdown) for headers, rows in tables)])

    common.publish("Formats", "formats", list(argv or sys.argv[1:]), options.markdown, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
