"""Names in loops of Triton kernels. A name that is known before a loop is carried into it, where it must keep its type,
which the interpreter does not mind. So a loop may not write first what something before it has written."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from gawscompile.codegen import triton as emitter
from gawscompile.ir.spec import KernelSpec

pytest.importorskip("triton")

BASES = {
    "plain": "w=bf16",
    "transposed": "wt=bf16",
    "nf4": "packed(nf4 g=64 s=u8)",
    "nf4 zeros": "packed(nf4 g=64 s=f32 z=f32)",
    "int8": "packed(int8 g=64 s=bf16)",
}
ADDED = {
    "nothing": "",
    "lora": "lora(r=16 f32 s=2.0)",
    "two": "lora(r=16 f32 s=2.0) lora(r=40 bf16 s=0.5)",
    "gaws": "lora(r=16 bf16 s=2.0) kron(4*128x{quarter}*1 f32 s=1.0)",
    "lokr": "kron(1*16x16*{sixteenth} f32 s=1.0) lora(r=8 bf16 s=1.0)",
    "bank": "bank(f32 x4)",
    "bank of modes": "bank(f32 x4 modes=3)",
    "beside a bank": "lora(r=16 f32 s=2.0) bank(f32 x4)",
    "given": "given(r=16 f32 z=f32) lora(r=16 f32 s=2.0)",
    "scaled": "rowscale=f32 lora(r=16 f32 s=2.0)",
}
SIZES = (128, 512, 1024, 4096)
"""Of x: loops of W, A and G run once, or several times, in every combination."""


def texts(base: str, added: str) -> Iterator[str]:
    for k, beside in itertools.product(SIZES, ("", " residual=bf16")):
        n = k if added == "lokr" else 512
        extra = ADDED[added].format(quarter=k // 4, sixteenth=k // 16)
        one = f"n={n} {BASES[base]} out=bf16{beside} {extra}".strip()
        yield f"k={k} x=bf16; {one}"
        if not beside:
            yield f"k={k} x=bf16; {one}; n=128 w=bf16 out=bf16 lora(r=16 f32 s=1.0)"
            yield f"k={k} x=bf16 swiglu; {one}; {one}"


def _events(node: ast.AST) -> Iterator[tuple[str, bool]]:
    """Names in the order in which a statement reads or writes them: the name, and whether it is written anew."""
    if isinstance(node, ast.Assign):
        yield from _events(node.value)
        for target in node.targets:
            for one in ast.walk(target):
                if isinstance(one, ast.Name):
                    yield one.id, isinstance(one.ctx, ast.Store)
    elif isinstance(node, ast.AugAssign):
        yield from _events(node.value)
        yield from ((one.id, False) for one in ast.walk(node.target) if isinstance(one, ast.Name))
    elif isinstance(node, ast.Name):
        yield node.id, isinstance(node.ctx, ast.Store)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _events(child)


def carried(function: ast.FunctionDef) -> list[str]:
    """Names that a loop writes before it reads them, and that something before the loop has written."""
    found: list[str] = []

    def walk(body: list[ast.stmt], known: set[str]) -> None:
        for statement in body:
            if isinstance(statement, ast.For):
                seen: set[str] = set()
                for inner in statement.body:
                    for name, written in _events(inner):
                        if written and name not in seen and name in known:
                            found.append(f"{function.name}: {name}, line {inner.lineno}")
                        seen.add(name)
                unrolled = "static_range" in ast.unparse(statement.iter)  # straight-line code: its names stay known
                walk(statement.body, known if unrolled else set(known))
            elif isinstance(statement, ast.If):
                walk(statement.body, known)
                walk(statement.orelse, known)
            else:
                known.update(name for name, written in _events(statement) if written)

    walk(function.body, {argument.arg for argument in function.args.args})
    return found


def test_a_name_that_is_carried_is_found():
    source = "def f(a):\n  b = a\n  for k in r:\n    b += 1\n    c = b\n  for k in r:\n    c = k\n    b = c\n"
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert carried(function) == ["f: b, line 8"]


def pair(base: str, added: str) -> Any:
    few = base == "plain" or added == "gaws"  # each loop over a weight, and each over what is added
    return pytest.param(base, added, marks=() if few else pytest.mark.slow)


@pytest.mark.parametrize(("base", "added"), itertools.starmap(pair, itertools.product(BASES, ADDED)))
def test_loops_share_no_names(base: str, added: str):
    for text in texts(base, added):
        spec = KernelSpec.parse(text)
        plans = {plan.name: plan for plan in emitter.plans(spec)}  # one size of each: a minute and a half less
        assert plans
        for plan in plans.values():
            module = ast.parse(emitter.emit(spec, plan))
            for function in module.body:
                if isinstance(function, ast.FunctionDef):
                    assert carried(function) == [], f"{text}, {plan}"
