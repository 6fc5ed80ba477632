"""The command line: ``gawscompile explain --model DIR [--adapter DIR]``, ``emit``, ``bisect``, ``repro`` …"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from gawscompile import cache
from gawscompile.cache import CacheError
from gawscompile.ir.types import SpecError
from gawscompile.loading.arguments import Parser, new_file, new_folder, one_line, path, whole
from gawscompile.loading.errors import ModelError
from gawscompile.loading.quiet import quiet
from gawscompile.options import OptionError
from gawscompile.planning.devices import Gpu


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did its work, 2 with one line on stderr where it could not, 130 where it was stopped.

    ``GAWS_STRICT=1``: errors that are not foreseen come with their traceback.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as said:  # by argparse: an error, or help
        return int(said.code or 0)
    try:
        print(arguments.run(arguments))
    except (CacheError, ModelError, OptionError, SpecError, OSError, ImportError, ValueError) as error:
        print(f"gawscompile: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gawscompile: {arguments.command} was interrupted, and kept nothing unfinished", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("GAWS_STRICT", "0") not in ("", "0"):
            raise
        kind = type(error).__name__
        print(f"gawscompile: {kind}: {one_line(error)} (GAWS_STRICT=1 shows where)", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(prog="gawscompile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what becomes of every linear of a model")
    _model_arguments(explain)
    shown = explain.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="plain data instead of tables")
    shown.add_argument("--html", type=path, help="write a page to this file instead")
    explain.add_argument("--measure", action="store_true", help="time kernels, guards and the parts of a call, too")
    explain.add_argument("--serving", action="store_true", help="compile the whole model as one graph")
    explain.add_argument("--dump", type=path, help="a folder for every step of the compiler, with a page")
    explain.set_defaults(run=_explain)
    emit = commands.add_parser("emit", help="a model's Triton kernels as files, for a GPU that need not be here")
    _model_arguments(emit)
    emit.add_argument("--target", default="cuda:90", help="cuda:80, cuda:90, cuda:100, hip:gfx942, … (default cuda:90)")
    emit.add_argument("--out", type=path, required=True, help="a folder, new or empty")
    emit.set_defaults(run=_emit)
    calibrate = commands.add_parser("calibrate", help="measure this machine for the cost model and keep what is found")
    calibrate.add_argument("--threads", type=whole(1, os.cpu_count()), help="for so many (default: torch's own number)")
    calibrate.add_argument(
        "--device", choices=("cpu", "cuda"), help="this alone (default: the CPU, and the current GPU if there is one)"
    )
    calibrate.set_defaults(run=_calibrate)
    bisect = commands.add_parser("bisect", help="the first rewrite with which a script fails: its pass and its place")
    bisect.add_argument("--out", type=path, help="for the dump of the failing run (default: a new temporary folder)")
    bisect.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT …", help="a Python script that fails")
    bisect.set_defaults(run=_bisect)
    repro = commands.add_parser("repro", help="a graph of a dump as a script: random weights, compile, compare")
    repro.add_argument("folder", type=path, metavar="DIR", help="a dump (GAWS_DUMP=DIR), or one graph's folder in it")
    repro.add_argument("--out", type=path, help="the script (default: repro.py in the graph's folder)")
    repro.set_defaults(run=_repro)
    kept = commands.add_parser("cache", help="what is cached, and where").add_subparsers(dest="action", required=True)
    kept.add_parser("info", help="place, limit and sizes").set_defaults(run=_cache_info)
    clear = kept.add_parser("clear", help="remove kernels and records")
    clear.add_argument("--models", action="store_true", help="remove the fetched models too")
    clear.set_defaults(run=_cache_clear)
    return parser


def _model_arguments(command: argparse.ArgumentParser) -> None:
    """What `_load` and a call of the model need."""
    command.add_argument(
        "--model",
        type=path,
        help="a folder of a transformers model, or of a diffusers pipeline or its denoiser, with random weights where "
        "it has a config.json alone (default: SmolLM2-135M from the package index)",
    )
    command.add_argument(
        "--adapter",
        type=lambda text: str(path(text)),
        help="lora or gaws with random weights on every linear, or a PEFT adapter folder",
    )
    command.add_argument("--rank", type=whole(1), help="of the random LoRA (default 16)")
    command.add_argument("--splits", type=whole(1), help="of the random GAWS (default 8)")
    command.add_argument("--bank", action="store_true", help="put the adapters into an adapter bank")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    command.add_argument(
        "--tokens", type=whole(1), default=1, help="tokens of text in the call that is compiled (default 1)"
    )
    command.add_argument("--training", action="store_true", help="compile the backward of the adapter too")


def _explain(arguments: argparse.Namespace) -> str:
    import gawscompile

    if arguments.html:
        new_file("--html", arguments.html)
    if arguments.dump:
        new_folder("--dump", arguments.dump)
    model, inputs = _load(arguments)
    options = {"dump": arguments.dump} if arguments.dump else {}
    way = {name: getattr(arguments, name) for name in ("measure", "serving", "training")}
    report = gawscompile.explain(model, options=options, **way, **inputs)
    if arguments.html:
        arguments.html.write_text(report.to_html(), encoding="utf-8")
        return str(arguments.html)
    return json.dumps(report.to_dict(), indent=2) if arguments.json else str(report)


def _emit(arguments: argparse.Namespace) -> str:
    from gawscompile import ahead

    gpu = ahead.gpu_for(arguments.target)
    new_folder("--out", arguments.out, empty=True)
    model, inputs = _load(arguments, gpu)
    traced = ahead.trace(model, gpu, training=arguments.training, **inputs)
    return ahead.emit(traced, arguments.target, arguments.tokens, arguments.out)


def _calibrate(arguments: argparse.Namespace) -> str:
    import torch

    from gawscompile.calibration import fit_cpu, fit_gpu

    gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not gpu:
        raise ValueError("--device cuda: torch sees no GPU here (torch.cuda.is_available() is False)")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = [fit_cpu.calibrate().summary()] if arguments.device != "cuda" else []
    found += [fit_gpu.calibrate().summary()] if gpu and arguments.device != "cpu" else []
    return "\n\n\n".join(found)


def _bisect(arguments: argparse.Namespace) -> str:
    from gawscompile.debug.bisect import bisect

    if not arguments.script:
        raise ValueError("bisect: which script? gawscompile bisect [--out DIR] SCRIPT [ARGUMENTS]")
    if arguments.out:
        new_folder("--out", arguments.out)
    return str(bisect(arguments.script, arguments.out, lambda text: print(text, file=sys.stderr, flush=True)))


def _repro(arguments: argparse.Namespace) -> str:
    from gawscompile.debug.repro import repro

    if arguments.out:
        new_file("--out", arguments.out)
    made = repro(arguments.folder, arguments.out)
    return f"{made}: run it with {shlex.join([sys.executable, str(made)])}; it exits with 1 where the answer is wrong"


def _cache_info(arguments: argparse.Namespace) -> str:
    lines = [f"{cache.root()}: at most {cache.limit_bytes() >> 20} MB of kernels and records (GAWS_CACHE_MB)"]
    lines += [f"  {name:10s} {count:6d} files {size / 1e6:10.1f} MB" for name, (count, size) in cache.usage().items()]
    return "\n".join(lines)


def _cache_clear(arguments: argparse.Namespace) -> str:
    before = sum(size for _, size in cache.usage().values())
    cache.clear(arguments.models)
    freed = before - sum(size for _, size in cache.usage().values())
    return f"{cache.root()}: {freed / 1e6:.1f} MB removed"


def _load(arguments: argparse.Namespace, gpu: Gpu | None = None) -> tuple[Any, dict[str, Any]]:
    """The model, and the inputs of one call. Its bank, if it is to have one, is as for `gpu`."""
    quiet()
    import torch

    from gawscompile.banks.bank import AdapterBank
    from gawscompile.demo import packaged
    from gawscompile.loading import folders
    from gawscompile.planning import devices

    if arguments.training and arguments.bank:
        raise OptionError("--training: adapters in a bank are not trained: leave out --bank")
    dtype = getattr(torch, arguments.dtype)
    folder = arguments.model or packaged.smollm2()
    model = folders.load(folder, dtype, arguments.adapter, arguments.rank, arguments.splits)
    if arguments.training:
        prefix = getattr(getattr(model, "base_model", None), "prefix", None)  # of the factors' names
        factors = [parameter for name, parameter in model.train().named_parameters() if prefix and prefix in name]
        if not factors:
            raise OptionError("--training: this model has no adapter to train: name one by --adapter")
        for parameter in factors:  # an adapter from a folder comes frozen
            parameter.requires_grad_(True)
    if arguments.bank:
        with devices.planning_for(gpu) if gpu else contextlib.nullcontext():
            AdapterBank(model)
    return model, folders.example(model, arguments.tokens)


if __name__ == "__main__":
    sys.exit(main())
