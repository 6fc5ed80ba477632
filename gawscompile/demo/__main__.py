"""``python -m gawscompile.demo``: a real model, an unmerged LoRA, and what it costs under each compiler.

Trains a LoRA on SmolLM2 until its effect is plain to see (or takes yours: ``--adapter``), writes the same text with
eager PEFT, PEFT under Inductor and PEFT under gaws, checks that the texts agree token for token, and times one token
of each beside the model without an adapter. The exit code is 1 where an fp32 text differs, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from gawscompile.calibration import measure
from gawscompile.debug.explain import Report, assemble
from gawscompile.demo import packaged, persona, serving
from gawscompile.demo.decoding import Decoder
from gawscompile.loading import folders
from gawscompile.loading.arguments import Parser, one_line, path, whole
from gawscompile.loading.errors import ModelError
from gawscompile.loading.quiet import quiet
from gawscompile.observe.store import RECORDS

QUESTION = "How do I make a good cup of tea?"
BACKENDS = ("eager", "inductor", "gaws")
TITLES = {"eager": "eager", "inductor": "Inductor", "gaws": "gaws"}
ROUNDS, STEPS_PER_ROUND = 10, 6
"""60 timed steps of each variant, in turns."""


@dataclass
class Variant:
    """One model under one backend, and what was found out about it."""

    title: str
    backend: str
    adapted: bool
    decoder: Decoder
    compile_seconds: float = 0.0
    compile_hits: int = 0
    tokens: list[int] = field(default_factory=list)
    timing: measure.Timing | None = None
    report: Report | None = None


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 on what it cannot understand, as argparse does."""
    parser = Parser(prog="python -m gawscompile.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base weights")
    parser.add_argument("--model", type=path, help="a local Hugging Face directory of a decoder (default: SmolLM2)")
    parser.add_argument("--adapter", type=path, help="a PEFT adapter directory for it, instead of training one")
    parser.add_argument("--tokens", type=whole(1), default=72, help="tokens of text to write (default 72)")
    parser.add_argument("--steps", type=whole(0), default=28, help="training steps (default 28, about a second each)")
    parser.add_argument("--train-backend", choices=("gaws", "eager"), help="(default: gaws on a CPU)")
    parser.add_argument("--question", default=QUESTION, help="what the model is asked")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated, of: " + ", ".join(BACKENDS))
    parser.add_argument("--serve", action="store_true", help="serve several adapters at once instead")
    parser.add_argument("--plot", type=path, help="with --serve: a picture of every token's latency")
    options = parser.parse_args(argv)
    if options.serve and options.device != "cpu":
        parser.error("--serve: this demo serves on a CPU")
    options.backends = [name.strip() for name in options.backends.split(",") if name.strip()]
    if unknown := set(options.backends) - set(BACKENDS):
        parser.error(f"unknown backends: {', '.join(sorted(unknown))}")
    if not options.backends:
        parser.error("--backends names none")
    try:
        torch.empty(1, device=options.device).cpu()
    except Exception as error:  # an unknown name, no such device here, one without numbers ("meta")
        parser.error(f"--device {options.device}: {one_line(error)}: name a device that torch has here, such as cpu")
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        folder = getattr(options, name)
        if folder is not None and not (folder / file).is_file():
            parser.error(f"--{name} {folder} is not a local directory with a {file}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; the exit code."""
    options = arguments(argv)
    if options.train_backend is None:  # gaws fuses no backward on a GPU unless asked to
        options.train_backend = "gaws" if "gaws" in options.backends and options.device == "cpu" else "eager"
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: {packaged.EXTRA}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    print(measure.describe(measure.machine()))
    try:
        base, adapted, tokenizer = load(options)
    except ModelError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if options.serve:
        serving.serve(base, adapted, tokenizer, options.question, options.tokens, options.plot)
        print(f"\n{time.perf_counter() - began:.0f} s in all.")
        return 0
    prompt = persona.prompt_ids(tokenizer, options.question)
    variants = prepare(base, adapted, options, prompt)
    write(variants, prompt, options.tokens, tokenizer.eos_token_id)
    print(f"\nAsked: {options.question}")
    show_texts(variants, tokenizer)
    same = compare(variants, options.dtype)
    measure_variants(variants)
    print("\n" + timing_table(variants))
    for variant in variants:
        if variant.report is not None:
            print("\n" + fusion_summary(variant.report))
    print(f"\n{time.perf_counter() - began:.0f} s in all.")
    return 0 if same or options.dtype != "float32" else 1


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(bare model, the same with the adapter unmerged, tokenizer); the two share one set of base weights.

    Raises `ModelError` for folders that do not hold them.
    """
    quiet()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # Saving an adapter makes PEFT call a name that transformers 5.24 deprecates; nothing the reader can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    folder = options.model or packaged.smollm2()
    print(f"Loading {folder}", flush=True)
    if options.adapter is not None:
        folders.adapter_settings(options.adapter)
    _, config = folders.model_settings(folder)
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith(("CausalLM", "LMHeadModel")) for kind in kinds):
        raise ModelError(f"--model {folder} is no decoder ({', '.join(map(str, kinds))}): the demo lets one write text")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype), local_files_only=True)
    except Exception as error:
        raise ModelError(f"--model {folder} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    base = base.to(options.device).eval()
    positions = len(persona.prompt_ids(tokenizer, options.question)) + options.tokens
    folders.example(base, positions)  # before anything is trained: whether there are so many
    if options.adapter is not None:
        with folders.quiet():
            adapted = folders.with_adapter(measure.sharing_copy(base), options.adapter)
        return base, adapted.to(options.device).eval(), tokenizer
    # Training is in fp32 whatever the dtype of the run, so both dtypes show the same adapter. It travels through a
    # directory, so that a trained adapter takes the same way in as one given by --adapter.
    full = base if options.dtype == "float32" else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    learner = persona.attach_lora(measure.sharing_copy(full).to(options.device))
    count = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
    how = "by eager PyTorch" if options.train_backend == "eager" else "through gaws, whose first step compiles"
    print(f"\nTraining a LoRA (r = {persona.RANK}, every linear but the head, {count / 1e6:.1f} M numbers) {how}:")
    persona.train(learner, tokenizer, options.steps, backend=options.train_backend)
    with tempfile.TemporaryDirectory(prefix="gaws-demo-") as scratch:
        learner.save_pretrained(scratch, save_embedding_layers=False)
        adapted = PeftModel.from_pretrained(measure.sharing_copy(base), scratch)
    return base, adapted.to(options.device).eval(), tokenizer


def prepare(base: Any, adapted: Any, options: argparse.Namespace, prompt: list[int]) -> list[Variant]:
    """Every variant, compiled: the first step of each is timed as its compile time."""
    capacity = len(prompt) + options.tokens
    variants = []
    print("\nCompiling one decode step (a static cache for all):")
    for backend in options.backends:
        for model, adapted_or_not, kind in ((base, False, "base"), (adapted, True, "with LoRA")):
            decoder = Decoder(model, measure.compiled(model, backend), capacity)
            variant = Variant(f"{TITLES[backend]}, {kind}", backend, adapted_or_not, decoder)
            decoder.fill(prompt)
            mark, hits, began = len(RECORDS), measure.cache_hits(), time.perf_counter()
            decoder.step(prompt[-1])
            variant.compile_seconds = time.perf_counter() - began
            variant.compile_hits = measure.cache_hits() - hits
            if backend == "gaws" and adapted_or_not:
                # what `gawscompile.explain` would say, from this compilation in place of one more
                variant.report = assemble(RECORDS.since(mark), model)
            if backend != "eager":
                print(f"  {variant.title:22s} {compile_note(variant)}", flush=True)
            variants.append(variant)
    return variants


def compile_note(variant: Variant) -> str:
    """The compile time in words: ``-`` for eager, and whether the disk caches helped."""
    if variant.backend == "eager":
        return "-"
    return f"{variant.compile_seconds:.1f} s" + (" (cached)" if variant.compile_hits else "")


def write(variants: list[Variant], prompt: list[int], tokens: int, stop: int | None) -> None:
    """Lets every adapted variant, and the first base one, write its text."""
    first_base = next(variant for variant in variants if not variant.adapted)
    for variant in variants:
        if variant.adapted or variant is first_base:
            variant.tokens = variant.decoder.greedy(prompt, tokens, stop)


def show_texts(variants: list[Variant], tokenizer: Any) -> None:
    """The texts, equal ones once."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for variant in variants:
        if variant.tokens:
            groups.setdefault(tuple(variant.tokens), []).append(variant.title)
    for tokens, titles in groups.items():
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        print(f"\n{' = '.join(titles)}:")
        print(textwrap.indent(textwrap.fill(text, 100), "    "))


def compare(variants: list[Variant], dtype: str) -> bool:
    """Whether all adapted variants wrote the same tokens; says so, and where they part.

    In bf16 they may rightly part: eager rounds after every operation, compilers do not, and near ties fall either way.
    """
    adapted = [variant for variant in variants if variant.adapted]
    reference = adapted[0]
    same = True
    print()
    for variant in adapted[1:]:
        ours, theirs = variant.tokens, reference.tokens
        agreeing = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if ours == theirs:
            print(f"{variant.title}: the same {len(ours)} tokens as {reference.title}")
            continue
        same = False
        agreeing = min(len(ours), len(theirs)) if agreeing is None else agreeing
        verdict = "DIFFERS" if dtype == "float32" else "parts (bf16 rounding allows it)"
        print(f"{variant.title}: {verdict} from {reference.title} after {agreeing} of {len(theirs)} tokens")
    base = next(variant for variant in variants if not variant.adapted)
    if base.tokens == reference.tokens:
        print("note: the adapter changed nothing in this text")
    return same


def measure_variants(variants: list[Variant]) -> None:
    """Times one decode step of every variant, in turns, at the position where its prompt ends."""
    before = measure.graphs_compiled()
    samples, _ = measure.interleave(
        {variant.title: variant.decoder.timed_step for variant in variants}, ROUNDS, STEPS_PER_ROUND
    )
    if measure.graphs_compiled() != before:
        print("warning: something was compiled while timing; the numbers below are not to be trusted")
    for variant in variants:
        variant.timing = measure.Timing.of(samples[variant.title])


def timing_table(variants: list[Variant]) -> str:
    """Milliseconds per token (median; quartiles) and what the adapter costs, one row per variant."""
    median = {(variant.backend, variant.adapted): _median(variant) for variant in variants}
    reference = "inductor" if ("inductor", False) in median else variants[0].backend
    headers = ["one token", "ms", "quartiles", "tokens/s", f"× {TITLES[reference]} base", "× own base", "compile"]
    rows = []
    for variant in sorted(variants, key=lambda variant: variant.adapted):
        timing = variant.timing
        assert timing is not None
        rows.append(
            [
                variant.title,
                f"{timing.median:.2f}",
                f"{timing.low:.2f}-{timing.high:.2f}",
                f"{1e3 / timing.median:.1f}",
                f"{timing.median / median[reference, False]:.2f}",
                f"{timing.median / median[variant.backend, False]:.2f}" if variant.adapted else "",
                compile_note(variant),
            ]
        )
    return measure.table(headers, rows)


def _median(variant: Variant) -> float:
    assert variant.timing is not None
    return variant.timing.median


def fusion_summary(report: Report) -> str:
    """What became of the adapted model's linears: how many were matched and fused, and why the others were not."""
    adapted = [linear for linear in report.linears if linear.adapters]
    fused_adapted = sum(linear.status == "fused" for linear in adapted)
    lines = [
        f"gaws, with LoRA: matched {len(report.linears)} linears, fused {len(report.fused)} into {len(report.groups)}"
        f" groups; of {len(adapted)} with an adapter, {fused_adapted}"
    ]
    reasons: dict[str, list[str]] = {}
    for linear in report.linears:
        if linear.status != "fused":
            reasons.setdefault(f"{linear.reason}: {linear.detail}", []).append(linear.path)
    for why, paths in reasons.items():
        lines.append(f"  left alone: {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "") + f" ({why})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
