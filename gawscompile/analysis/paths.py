"""Names of modules, from Dynamo's spelling of them."""

from __future__ import annotations

import ast
import re
from typing import Any

MODEL = "(model)"  # the path of the compiled module itself
_ROOT = re.compile(r"L\['\w+'\](\._orig_mod)?|L__self__")
_ONE = re.compile(r"(?:\.__dict__\['_modules'\]|\._modules)\[('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")\]")
_PLAIN = re.compile(r"(\.\w+|\['?\w+'?\])+")


def path_of(stack: dict[str, tuple[str, Any]]) -> str:
    """``model.layers.3.self_attn.q_proj`` from Dynamo's spelling of the modules around a node, outermost first.

    Each entry's path continues the one before it, by ``.name``, ``[index]`` or ``._modules['name']``, where a name may
    be anything that is no dot.
    """
    names, before = [], ""
    for path, _ in stack.values():
        rest = path[len(before) :] if path.startswith(before) else path
        before = path
        rest = rest[root.end() :] if (root := _ROOT.match(rest)) else rest
        while found := _ONE.match(rest):
            names.append(str(ast.literal_eval(found[1])))
            rest = rest[found.end() :]
        if _PLAIN.fullmatch(rest):
            names += re.findall(r"\w+", rest)
        elif rest:
            names.append(rest.removeprefix("."))
    return ".".join(names).removesuffix(".base_layer")


def path_of_source(name: str) -> str:
    """The same of one of Dynamo's sources."""
    return path_of({"": (name, None)})
