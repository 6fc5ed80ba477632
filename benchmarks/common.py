"""What every benchmark shares: models with adapters, cases, fresh processes, output files.

Timing in turns, the machine's description and tables are `gawscompile.calibration.measure`'s, which the demo uses too.
"""

from __future__ import annotations

import copy
import json
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gawscompile
from benchmarks import quantized
from benchmarks.shapes import SHAPES
from gawscompile.calibration import measure
from gawscompile.demo import packaged
from gawscompile.demo.decoding import CacheKind, Decoder
from gawscompile.runtime.bound import Direct
from gawscompile.runtime.executor import Executor
from gawscompile.runtime.wrapper import Code
from gawscompile.watch import unchanged
from gawscompile.watch.found import Found

BACKENDS = ("eager", "inductor", "gaws")
LLAMA_CPP = "llama.cpp"
UNCOMPILED = ("eager", LLAMA_CPP)
PAST, PREFILL = 64, 128
"""Tokens in the cache while decoding, and tokens of a prefill."""


@dataclass(frozen=True)
class Setup:
    """Which model, with which adapter: enough for another process to build the same."""

    model: str
    dtype: str = "float32"
    rank: int = 16
    cast_adapters: bool = False
    kv: CacheKind = "static"
    device: str = "cpu"
    layers: int | None = None
    quantize: str | None = None


QUANTIZED = tuple(quantized.KINDS)
"""How bases can be quantised."""


@dataclass
class Case:
    """One kind of call (``decode``, ``prefill``, ``encode 32``) of one model under one backend.

    `step` makes ready and runs it once, and returns its milliseconds, the making ready not counted.
    """

    name: str
    step: Callable[[], float]


def title(setup: Any) -> str:
    """How tables name the model of a `Setup`'s fields: with its layers, where some were cut."""
    model, layers = setup["model"], setup.get("layers")
    quantized = f", {setup['quantize']} base" if setup.get("quantize") else ""
    if model in SHAPES and layers and layers < SHAPES[model].full:
        return f"{model} ({layers} of {SHAPES[model].full} layers){quantized}"
    return Path(model).name + quantized


def is_causal(architectures: list[str] | None) -> bool:
    """Whether a model decodes by itself. Encoders do not; what has both is asked after otherwise."""
    return any("CausalLM" in name or "LMHead" in name for name in architectures or [])


def folder_of(model: str) -> Path:
    """The directory of ``smollm2`` or ``minilm`` (fetched if need be), or `model` itself as a directory."""
    named = {"smollm2": packaged.smollm2, "minilm": packaged.minilm}
    if model in named:
        return named[model]()
    if not (Path(model) / "config.json").is_file():
        known = ", ".join([*named, *SHAPES])
        raise SystemExit(f"--model {model}: neither one of {known} nor a directory with a config.json")
    return Path(model)


def load_base(setup: Setup, own: bool = True) -> Any:
    """The bare model in `setup`'s dtype, in eval mode, its linears but the head quantised where the setup says so. With
    `own` no weight stays mapped from the checkpoint."""
    model = _load(setup, own)
    if setup.quantize:
        try:
            quantized.quantize(model, setup.quantize, set(linear_sizes(model)))
        except ImportError:
            raise SystemExit("--quantize: pip install 'gawscompile[quant]'") from None
    return model


def _load(setup: Setup, own: bool) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if setup.model in SHAPES:
        return SHAPES[setup.model].build(getattr(torch, setup.dtype), setup.layers).to(setup.device)
    folder = folder_of(setup.model)
    factory = AutoModelForCausalLM if is_causal(AutoConfig.from_pretrained(folder).architectures) else AutoModel
    model: Any = factory.from_pretrained(folder, dtype=getattr(torch, setup.dtype))
    if own:  # as after training, or from a checkpoint of another dtype
        gawscompile.own_memory(model)
    return model.to(setup.device).eval()


ADAPTERS = ("lora", "gaws", "gawsd", "lokr", "zflora")
"""What can be put on every linear (zFLoRA: on the stream's), each with as many parameters as LoRA of the setup's rank
has, or nearly so."""

DORA = "dora"
"""The LoRA with a magnitude for each row."""

MERGED = "merged"
"""The LoRA again, merged into a copy of the weights: what unmerged ones are to be measured by."""


def with_adapter(base: Any, setup: Setup, kind: str = "lora", share: bool = True) -> Any:
    """`base` with an unmerged adapter on every linear (PEFT's ``all-linear``), small and not zero: a zero hides bugs.

    PEFT keeps the factors in fp32 over a half-precision base unless `cast_adapters` is set. With `share` the base
    itself stays bare and lends its weights, but for a `MERGED` LoRA, which needs its own.
    """
    from peft import get_peft_model

    if kind == MERGED:
        return with_adapter(copy.deepcopy(base), setup, share=False).merge_and_unload()
    torch.manual_seed(0)
    inner = measure.sharing_copy(base) if share else base
    config = adapter_config(base, kind, setup.rank)
    adapted = get_peft_model(inner, config, autocast_adapter_dtype=not setup.cast_adapters)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "magnitude" not in name:
                parameter.normal_(std=0.02)
    return adapted.to(setup.device).eval()


def adapter_config(base: Any, kind: str, rank: int) -> Any:
    """PEFT's configuration of `kind` at the budget of a LoRA of `rank` on every linear."""
    from peft import LoKrConfig, LoraConfig

    from gawscompile.adapters import GAWSConfig, GAWSDConfig, ZFLoRAConfig
    from gawscompile.adapters.splits import Kind, all_splits

    sizes = linear_sizes(base)
    if kind in ("lora", DORA):
        # by name: "all-linear" takes no linear of HQQ's
        return LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=kind == DORA, target_modules=sorted(sizes))
    if kind == "zflora":
        stream = ZFLoRAConfig(model_type=base.config.model_type).stream()
        ends = {"reader": 1, "writer": 0}  # a reader's factor has a row for each output, a writer's for each input
        of_one = sum(size[ends[role]] for name, size in sizes.items() if (role := stream.role(name)) in ends)
        return ZFLoRAConfig(r=max(1, round(sum(rank * (k + n) for k, n in sizes.values()) / of_one)))
    if kind == "lokr":
        factors = {factor: sum(_lokr_parameters(k, n, factor) for k, n in sizes.values()) for factor in range(2, 33)}
        budget = sum(rank * (k + n) for k, n in sizes.values())
        factor = min(factors, key=lambda f: abs(factors[f] - budget))
        whole = max(map(max, sizes.values()))  # a rank from which on w2 is kept whole
        return LoKrConfig(r=whole, alpha=whole, decompose_factor=factor, target_modules="all-linear")
    which: Kind = "gaws" if kind == "gaws" else "gawsd"
    splits, wanted, spent = {}, 0, 0
    for name, (k, n) in sizes.items():
        # sizes come in leaps of four where features are powers of two: what one module gets too much, the next lacks
        wanted += rank * (k + n)
        near = [choice for choice in all_splits(which, k, n) if choice.parameters(which, k, n) < 4 * rank * (k + n)]
        splits[name] = min(near, key=lambda choice: abs(spent + choice.parameters(which, k, n) - wanted))
        spent += splits[name].parameters(which, k, n)
    return (GAWSConfig if which == "gaws" else GAWSDConfig)(
        target_modules="all-linear",
        input_splits_pattern={name: choice.inputs for name, choice in splits.items()},
        output_splits_pattern={name: choice.outputs for name, choice in splits.items()},
    )


def linear_sizes(base: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear that ``all-linear`` takes, by path."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, Conv1D):
            k, n = module.weight.shape
            found[name] = (int(k), int(n))
        elif (isinstance(module, torch.nn.Linear) or hasattr(module, "W_q")) and module is not head:  # HQQ's has that
            found[name] = (int(module.in_features), int(module.out_features))
    return found


def _lokr_parameters(k: int, n: int, factor: int) -> int:
    from peft.tuners.lokr.layer import factorization

    (b, d), (a, c) = factorization(k, factor), factorization(n, factor)
    return a * b + c * d


def _ids(model: Any, count: int) -> torch.Tensor:
    """``[1, count]`` token ids of `model`'s vocabulary, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, count), generator=generator).to(model.device)


def cases(model: Any, backend: str, setup: Setup) -> list[Case]:
    """The cases of `model` under `backend`, each compiled for itself, for fixed shapes (``dynamic=False``)."""
    settings = {} if backend in UNCOMPILED else {"dynamic": False}
    if model.config.is_encoder_decoder:
        return _seq2seq_cases(model, backend, settings)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.main_input_name == "pixel_values":
        size, patch = model.config.image_size, model.config.patch_size
        image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
        run = measure.compiled(model, backend, **settings)
        return [Case(f"encode {(size // patch) ** 2 + 1}", _forward(run, pixel_values=image))]
    if not is_causal([type(inner).__name__]):
        runs = {count: measure.compiled(model, backend, **settings) for count in (32, 128)}
        return [Case(f"encode {count}", _forward(run, input_ids=_ids(model, count))) for count, run in runs.items()]
    names = f"decode, {PAST} past", f"prefill {PREFILL}"
    if backend == LLAMA_CPP:
        from benchmarks import ggml

        steps = ggml.steps(model, _ids(model, PAST)[0].tolist(), _ids(model, PREFILL)[0].tolist())
        return [Case(name, step) for name, step in zip(names, steps, strict=True)]
    decoder = Decoder(model, measure.compiled(model, backend, **settings), 2 * PAST, setup.kv)
    decoder.fill(_ids(model, PAST)[0].tolist())
    run = measure.compiled(model, backend, **settings)
    prefill = _forward(run, input_ids=_ids(model, PREFILL), use_cache=True, logits_to_keep=1)
    return [Case(name, step) for name, step in zip(names, (decoder.timed_step, prefill), strict=True)]


def _seq2seq_cases(model: Any, backend: str, settings: dict[str, Any]) -> list[Case]:
    """One more token after `PAST` of them, over `PREFILL` encoded ones; and encoding those for the first token."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    generator = torch.Generator().manual_seed(0)
    encoded = torch.randn(1, PREFILL, model.config.d_model, generator=generator).to(model.device, model.dtype)
    inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "past_key_values": cache}
    with torch.no_grad():
        model(decoder_input_ids=_ids(model, PAST), use_cache=True, **inputs)
    saved = [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
    run, token = measure.compiled(model, backend, **settings), _ids(model, 1)

    @torch.no_grad()
    def decode() -> float:
        for layer, (keys, values) in zip(cache.self_attention_cache.layers, saved, strict=True):
            layer.keys, layer.values = keys, values
        return measure.timed(lambda: run(decoder_input_ids=token, use_cache=True, **inputs))

    encode = measure.compiled(model, backend, **settings)
    first = _forward(encode, input_ids=_ids(model, PREFILL), decoder_input_ids=token, use_cache=False)
    return [Case(f"decode, {PAST} past", decode), Case(f"encode {PREFILL}", first)]


def _forward(run: Any, **keywords: Any) -> Callable[[], float]:
    @torch.no_grad()
    def step() -> float:
        return measure.timed(lambda: run(**keywords))

    return step


def without_python(calls: list[tuple[Any, ...]]) -> Callable[[], None]:
    """These calls of our op, one after the other, as a compiled graph makes them: no Python in between."""
    names: dict[int, str] = {}
    inputs: list[torch.Tensor] = []
    lines = []
    for x, operands, program in calls:
        for one in (x, *operands):
            if id(one) not in names:
                names[id(one)] = f"arg{len(inputs)}_1"
                inputs.append(one)
        given = ", ".join(names[id(one)] for one in operands)
        lines += [f"buf0 = torch.ops.gaws.project.default({names[id(x)]}, [{given}], {program!r})"]
        lines += ["buf1 = buf0[0]", "del buf0"]
    body = "\n    ".join([f"{', '.join(names.values())}, = args", *lines, "return (buf1, )"])
    steps = Executor(Code(f"def call(args):\n    {body}\n", {"torch": torch}, inputs), None)
    for _ in range(2):  # the second call is laid out
        steps(list(inputs))
    if not (steps.replays() and unchanged.available()):
        return lambda: steps(list(inputs))
    found = Found()
    for one in inputs:
        found.add(one)
    state = unchanged.State([], found)
    assert steps.bind(state.handle, inputs)
    direct = Direct(steps, state.handle, list)

    def call() -> None:
        assert inputs and state.same([]) and direct(())  # neither of these keeps the inputs

    return call


def in_fresh_process(module: str, arguments: list[str]) -> Any:
    """Runs ``python -m module … --json FILE`` in a process of its own and returns what it wrote there."""
    with tempfile.TemporaryDirectory(prefix="gaws-bench-") as scratch:
        file = Path(scratch) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--json", str(file)]
        if subprocess.run(command, stdout=2).returncode != 0:
            raise SystemExit(f"failed: {' '.join(command)}")
        return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path | None, text: str) -> None:
    """Writes `text` to `file`, its folder made if need be; nothing where `file` is None."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def publish(title: str, module: str, argv: list[str], file: Path | None, report: Callable[[bool], str]) -> None:
    """Prints ``report(markdown=False)``; ``report(markdown=True)`` goes to `file`, under the title and the command."""
    print(report(False))
    command = f"python -m benchmarks.{module} {shlex.join(argv)}".strip()
    write(file, f"# {title}\n\n`{command}`\n\n" + report(True) if file else "")


def figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches; None, and a line that says so, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install 'gawscompile[bench]'", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, file: Path) -> None:
    """Writes a figure, its folder made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, dpi=110)
