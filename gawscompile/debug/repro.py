"""``gawscompile repro DIR``: one graph of a dump as a script of its own.

The script builds the graph that our passes were given, with random weights and inputs of the same shapes, compiles it
with the same options and compares with the graph as it is. It needs torch and gawscompile, and nothing of the model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gawscompile.ir.records import plain

SCRIPT = '''"""Made by `gawscompile repro` from graph {key}: compiles it with random weights and compares."""

import operator
import sys

import torch

torch.manual_seed(0)
options = {options}
dynamic = {dynamic}


def numbers(size, stride, dtype, device):
    """Random numbers, laid out as they were; floats are sized so that W x is near 1, integers are 0 or 1."""
    made = torch.empty_strided(size, stride, dtype=dtype, device=device)
    if dtype == torch.bool:
        return made.fill_(True)
    if not dtype.is_floating_point:
        return made.copy_(torch.randint(0, 2, size))
    return made.copy_(torch.randn(size) / (max(size[-1], 1) ** 0.5 if len(size) == 2 else 1))


class Graph(torch.nn.Module):
    def __init__(self):
        super().__init__()
{constants}
    def forward(
        self,
{parameters}
    ):
{namespaces}
{body}


inputs = [
{inputs}
]
model = Graph()
with torch.no_grad():
    wanted = model(*inputs)
    compiled = torch.compile(model, backend="gaws", options=options, dynamic=dynamic)
    got = compiled(*inputs)
worst = 0.0
for number, (mine, theirs) in enumerate(zip(got, wanted)):
    if not isinstance(theirs, torch.Tensor) or not theirs.numel():
        continue
    error = (mine.double() - theirs.double()).abs().max().item() / (theirs.double().abs().max().item() + 1e-30)
    allowed = {{torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}}.get(theirs.dtype, 1e-9)
    print(f"output {{number}}: off by {{error:.3g}} of its largest number, {{allowed:g}} allowed")
    worst = max(worst, error / allowed) if error == error else float("inf")
print("WRONG" if worst > 1 else "right")
sys.exit(1 if worst > 1 else 0)
'''


class ReproError(ValueError):
    """A dump that no script can be made of; the message says why."""


def repro(folder: Path, out: Path | None = None) -> Path:
    """Write the script of one graph's dump, by default as ``repro.py`` in its folder, and return its path.

    Raises `ReproError`, naming what is missing or what cannot be written as a script.
    """
    file = _graph(folder) / "graph.json"
    try:
        text = script(json.loads(file.read_text(encoding="utf-8")))
    except ReproError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReproError(
            f"{file} is no whole dump of a graph ({type(error).__name__}: {error}); make it again with GAWS_DUMP=DIR"
        ) from error
    out = out or file.parent / "repro.py"
    out.write_text(text, encoding="utf-8")
    return out


def _graph(folder: Path) -> Path:
    """The folder of a graph: `folder` itself, or the only one inside."""
    if not folder.is_dir():
        wrong = "this is a file" if folder.exists() else "there is no such folder"
        raise ReproError(f"{folder}: {wrong}; name a dump's folder (GAWS_DUMP=DIR makes one)")
    if (folder / "graph.json").is_file():
        return folder
    inside = sorted(path.parent for path in folder.glob("*/graph.json"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ReproError(f"{folder} holds {len(inside)} graphs; name one: {', '.join(path.name for path in inside)}")
    raise ReproError(f"{folder} holds no dump of a graph; make one with GAWS_DUMP={folder} or options={{'dump': …}}")


def script(data: dict[str, Any]) -> str:
    """The script for the contents of a ``graph.json``."""
    body = [line for line in data["lines"] if not line.endswith(",")]
    if unknown := [line for line in body if "higher_order." in line]:
        raise ReproError(f"the graph calls what is no operation of aten: {plain(unknown[0])}")
    code = "\n".join(body)
    spaces = sorted(set(re.findall(r"= (\w+)\.\w+\.\w+\(", code)) - {"torch", "operator", "self"})
    return SCRIPT.format(
        key=data["key"],
        options={name: value for name, value in data["options"].items() if value},
        dynamic=any(one.get("symbolic") or "value" in one for one in data["inputs"]) or None,
        constants="".join(f"        self.{name} = {_tensor(made)}\n" for name, made in data["constants"].items()),
        parameters="\n".join(f"        {one['name']},  # {plain(one['path'])}" for one in data["inputs"]),
        namespaces="\n".join(f"        {space} = torch.ops.{space}" for space in spaces),
        body="\n".join(f"        {line}" for line in body),
        inputs="\n".join(f"    {_input(one)},  # {one['name']}" for one in data["inputs"]),
    )


def _input(one: dict[str, Any]) -> str:
    if "object" in one:
        raise ReproError(f"the graph takes {plain(one['path'] or one['name'])}, which is no tensor: {one['object']}")
    if "value" in one:
        return repr(one["value"])
    return f'numbers({one["size"]}, {one["stride"]}, {one["dtype"]}, "{one["device"]}")'


def _tensor(made: Any) -> str:
    if made is None:
        raise ReproError("the graph holds a constant that is no tensor")
    if "is" in made:
        text = re.sub(r"\b(nan|inf)\b", r'float("\1")', repr(made["is"]))
        return f'torch.tensor({text}, dtype={made["dtype"]}, device="{made["device"]}").reshape({made["size"]})'
    return f'torch.ones({made["size"]}, dtype={made["dtype"]}, device="{made["device"]}")  # too large to keep'
