"""The command line: ``gawscompile explain --model DIR [--adapter DIR]``, ``gawscompile cache {info,clear}``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from gawscompile.codegen import cache
from gawscompile.codegen.cache import CacheError
from gawscompile.codegen.spec import SpecError
from gawscompile.models import ModelError
from gawscompile.options import OptionError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did its work, 2 with one line on stderr where it could not."""
    parser = argparse.ArgumentParser(prog="gawscompile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="what becomes of every linear of a model")
    explain.add_argument("--model", help="a transformers model folder (default: SmolLM2-135M from the package index)")
    explain.add_argument("--adapter", help="a PEFT adapter folder")
    explain.add_argument("--rank", type=int, default=0, help="without --adapter: a random LoRA of this rank")
    explain.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    explain.add_argument("--tokens", type=int, default=1, help="tokens in the call that is compiled (default 1)")
    explain.add_argument("--json", action="store_true", help="plain data instead of a table")
    explain.set_defaults(run=_explain)
    kept = commands.add_parser("cache", help="what is cached, and where").add_subparsers(dest="action", required=True)
    kept.add_parser("info", help="place, limit and sizes").set_defaults(run=_cache_info)
    clear = kept.add_parser("clear", help="remove kernels and records")
    clear.add_argument("--models", action="store_true", help="remove the fetched models too")
    clear.set_defaults(run=_cache_clear)
    arguments = parser.parse_args(argv)
    try:
        print(arguments.run(arguments))
    except (CacheError, ModelError, OptionError, SpecError, OSError, ImportError, ValueError) as error:
        print(f"gawscompile: {error}", file=sys.stderr)
        return 2
    return 0


def _explain(arguments: argparse.Namespace) -> str:
    import torch

    import gawscompile

    model = _load(arguments)
    tokens = torch.randint(0, 100, (1, arguments.tokens))
    report = gawscompile.explain(model, input_ids=tokens)
    return json.dumps(report.to_dict(), indent=2) if arguments.json else str(report)


def _cache_info(arguments: argparse.Namespace) -> str:
    lines = [f"{cache.root()}: at most {cache.limit_bytes() >> 20} MB of kernels and records (GAWS_CACHE_MB)"]
    lines += [f"  {name:10s} {count:6d} files {size / 1e6:10.1f} MB" for name, (count, size) in cache.usage().items()]
    return "\n".join(lines)


def _cache_clear(arguments: argparse.Namespace) -> str:
    before = sum(size for _, size in cache.usage().values())
    cache.clear(arguments.models)
    freed = before - sum(size for _, size in cache.usage().values())
    return f"{cache.root()}: {freed / 1e6:.1f} MB removed"


def _load(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from gawscompile import models

    folder = arguments.model or str(models.smollm2())
    dtype = getattr(torch, arguments.dtype)
    kinds = AutoConfig.from_pretrained(folder).architectures or []
    loader = AutoModelForCausalLM if any(kind.endswith("CausalLM") for kind in kinds) else AutoModel
    model = loader.from_pretrained(folder, dtype=dtype).eval()
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, models.adapter_folder(arguments.adapter)).eval()
    elif arguments.rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=arguments.rank, target_modules="all-linear")).eval()
    return model


if __name__ == "__main__":
    sys.exit(main())
