"""LoRA, GAWS, GAWS-D and zFLoRA at equal budgets: held-out loss of SmolLM2 on our text, optionally decode latency.

    python -m benchmarks.adapter_quality --markdown benchmarks/results/quality.md --plot benchmarks/results/quality.png

Small and honest about it: one model, nine question-answer pairs to train on and three held out, a few dozen steps, the
mean of a few seeds. It shows that the adapters learn, and roughly what a parameter buys; it is no ranking of methods.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from gawscompile.adapters import GAWSConfig, GAWSDConfig, approximate
from gawscompile.adapters.approximate import Target
from gawscompile.calibration import measure
from gawscompile.demo import persona
from gawscompile.demo.decoding import Decoder

HELD_OUT = 3
"""The last pairs of the text, which no adapter is trained on."""
RATES = {"LoRA": 2e-3, "GAWS": 2e-3, "GAWS-D": 2e-3, "zFLoRA": 2e-3}
"""Learning rates, chosen for LoRA and GAWS by the held-out loss: of 1e-3, 2e-3 and 5e-3, tried with ``--splits 8
--rates``, this one was the best for both (LoRA 3.445, 2.727, 2.921; GAWS 2.833, 2.656, 3.032). Not tried for GAWS-D
and zFLoRA."""
KINDS = tuple(RATES)


@dataclass
class Result:
    """One adapter, and what became of it: losses in nats per answer token, one for each seed."""

    kind: str
    setting: str
    parameters: int
    rate: float
    trained: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    decode: dict[str, float] = field(default_factory=dict)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_quality", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a local Hugging Face directory of a decoder")
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[12, 8, 4], help="a budget each: GAWS splits = GAWS-D dim"
    )
    parser.add_argument("--steps", type=int, default=16, help="training steps of three pairs")
    parser.add_argument("--demo-steps", type=int, default=28, help="of the demo's LoRA, which is then approximated")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each adapter")
    parser.add_argument("--rates", type=float, nargs="+", help="try these learning rates for every kind instead")
    parser.add_argument("--decode", nargs="*", choices=common.BACKENDS, help="backends to time one decode step under")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (one is faster where cores are shared)")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="write a plot of loss over parameters here (needs matplotlib)")
    return parser.parse_args(argv)


def configuration(kind: str, base: Any, splits: int) -> tuple[Any, str]:
    """(PEFT configuration, its setting in words) of `kind` at the budget of GAWS with `splits` splits.

    GAWS-D with slices of that length has exactly as many parameters; LoRA and zFLoRA get the nearest rank.
    """
    from peft import LoraConfig

    if kind == "GAWS":
        return GAWSConfig(target_modules="all-linear", input_splits=splits), f"{splits} splits"
    if kind == "GAWS-D":
        return GAWSDConfig(target_modules="all-linear", input_split_dim=splits), f"slices of {splits}"
    head = base.get_output_embeddings()
    shapes = [m.weight.shape for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    rank = max(1, round(sum(n * k for n, k in shapes) / splits**2 / sum(n + k for n, k in shapes)))
    if kind == "zFLoRA":
        config = common.adapter_config(base, "zflora", rank)
        return config, f"z of {config.r}"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), f"r = {rank}"


def train(base: Any, tokenizer: Any, kind: str, splits: int, steps: int, rate: float, seeds: int) -> tuple[Result, Any]:
    """What `kind` learns at one budget, and the last seed's model; base weights are shared, not copied."""
    from peft import get_peft_model

    text = persona.pairs()
    for seed in range(seeds):
        torch.manual_seed(seed)
        config, setting = configuration(kind, base, splits)
        model = get_peft_model(measure.sharing_copy(base), config)
        if seed == 0:
            result = Result(kind, setting, model.get_nb_trainable_parameters()[0], rate)
        last = persona.train(model, tokenizer, steps, seed, progress=False, text=text[:-HELD_OUT], rate=rate)
        result.trained.append(last)
        result.held_out.append(persona.loss_on(model, tokenizer, text[-HELD_OUT:]))
    return result, model


def decode_latency(models: Sequence[Any], backend: str, rounds: int = 6, steps: int = 6) -> list[float]:
    """Median milliseconds of one decode step of every model under `backend`, in turns."""
    decoders = {}
    for index, model in enumerate(models):
        decoder = Decoder(model, measure.compiled(model, backend), 2 * common.PAST)
        decoder.fill(list(range(1, common.PAST + 1)))
        decoder.timed_step()
        decoders[str(index)] = decoder.timed_step
    samples, _ = measure.interleave(decoders, rounds, steps)
    return [statistics.median(values) for values in samples.values()]


def quality_table(results: Sequence[Result], markdown: bool = False) -> str:
    """A row for every adapter; the base is the first. ``over LoRA``: held-out loss minus LoRA's at the same budget."""
    backends = list(results[0].decode)
    headers = ["adapter", "setting", "parameters", "rate", "last training loss", "held-out loss", "over LoRA"]
    rows, lora = [], float("nan")
    for result in results:
        mean = statistics.mean(result.held_out)
        lora = mean if result.kind == "LoRA" else lora
        spread = f" ± {statistics.stdev(result.held_out):.3f}" if len(result.held_out) > 1 else ""
        rows.append(
            [
                result.kind,
                result.setting,
                f"{result.parameters:,}",
                f"{result.rate:g}" if result.trained else "",
                f"{statistics.mean(result.trained):.3f}" if result.trained else "",
                f"{mean:.3f}{spread}",
                f"{mean - lora:+.3f}" if result.kind not in ("base", "LoRA") else "",
                *(f"{result.decode[backend]:.1f}" for backend in backends),
            ]
        )
    return measure.table(headers + [f"decode {backend}, ms" for backend in backends], rows, markdown)


def approximation_table(model: Any, base: Any, tokenizer: Any, splits: Sequence[int], markdown: bool = False) -> str:
    """What is left of a LoRA when GAWS or GAWS-D adapters nearest to it take its place, by the loss on its own text."""
    text = persona.pairs()
    rows = [["the LoRA itself", "", "", "", f"{persona.loss_on(model, tokenizer, text):.3f}"]]
    for count in splits:
        wanted: dict[Target, dict[str, int]] = {"gaws": {"splits": count}, "gawsd": {"split_dim": count}}
        for kind, settings in wanted.items():
            found = approximate(model, kind, **settings, tolerance=float("inf"))  # type: ignore[arg-type]
            errors = [fit.error for fit in found.fits]
            attached = found.attach(measure.sharing_copy(base))
            rows.append(
                [
                    f"nearest {kind.upper()}, {count}",
                    f"{sum(fit.parameters for fit in found.fits):,}",
                    f"{statistics.median(errors):.3f}",
                    f"{max(errors):.3f}",
                    f"{persona.loss_on(attached, tokenizer, text):.3f}",
                ]
            )
    headers = ["in place of the LoRA", "parameters", "median relative error", "largest", "loss on its text"]
    return measure.table(headers, rows, markdown)


def notes(options: argparse.Namespace) -> str:
    """How to read the tables."""
    random = ", ".join(f"{math.sqrt(1 - 1 / count**2):.3f} ({count})" for count in options.splits)
    return (
        f"{options.seeds} seed(s), {options.steps} steps of three of the nine pairs, no early stopping; losses in nats"
        " per answer token, held-out ones over three pairs. Budgets are equal up to LoRA's whole ranks: compare over"
        " the parameters, and compare training loss with held-out loss before calling a large adapter a bad one.\n\n"
        "Approximations: the nearest to a *random* matrix is off by √(1 − 1/n²) on average, both for GAWS with n splits"
        f" and GAWS-D with slices of n: {random}."
    )


def plot(results: Sequence[Result], file: Path) -> None:
    """Held-out loss over parameters, a line for each kind. Says so and draws nothing where matplotlib is missing."""
    if (figure := common.figure(5.5, 3.6)) is None:
        return
    axes = figure.subplots()
    for kind, mark in zip(KINDS, "os^D", strict=True):
        points = sorted((r.parameters, statistics.mean(r.held_out)) for r in results if r.kind == kind)
        axes.plot(*zip(*points, strict=True), marker=mark, label=kind)
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters", ylabel="held-out loss (nats per token)")
    axes.set_title("SmolLM2-135M, our text, equal budgets", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    common.save(figure, file)


def main(argv: list[str] | None = None) -> None:
    """Trains, prints, writes."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    from transformers import AutoTokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    facts = measure.machine()
    base = common.load_base(common.Setup(options.model))
    tokenizer = AutoTokenizer.from_pretrained(common.folder_of(options.model))
    held_out = persona.loss_on(base, tokenizer, persona.pairs()[-HELD_OUT:])
    results = [Result("base", "no adapter", 0, 0.0, held_out=[held_out])]
    models = [base]
    for splits in options.splits:
        for kind in KINDS:
            for rate in options.rates or [RATES[kind]]:
                result, model = train(base, tokenizer, kind, splits, options.steps, rate, options.seeds)
                results.append(result)
                models.append(model)
                print(f"{time.perf_counter() - began:4.0f} s  {kind}, {result.setting}, {rate:g}: ", end="")
                print(f"held-out {statistics.mean(result.held_out):.3f}", flush=True)
    for backend in options.decode or []:
        for result, taken in zip(results, decode_latency(models, backend), strict=True):
            result.decode[backend] = taken
    torch.manual_seed(0)
    lora = persona.attach_lora(measure.sharing_copy(base))  # as the demo trains it
    persona.train(lora, tokenizer, options.demo_steps, progress=False)
    without = persona.loss_on(base, tokenizer, persona.pairs())

    def report(markdown: bool) -> str:
        parts = [measure.describe(facts), quality_table(results, markdown)]
        parts += [f"The demo's LoRA (r = {persona.RANK}, all of the text; the base's loss on it is {without:.3f}):"]
        parts += [approximation_table(lora, base, tokenizer, options.splits, markdown), notes(options)]
        return "\n\n".join(parts)

    print(report(markdown=False))
    print(f"\n{time.perf_counter() - began:.0f} s in all.")
    if options.markdown:
        command = "python -m benchmarks.adapter_quality " + " ".join(argv)
        common.write(options.markdown, f"# Quality at equal budgets\n\n`{command.rstrip()}`\n\n{report(markdown=True)}")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
