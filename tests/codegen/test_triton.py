"""The Triton emitter: its text, and what it refuses. No GPU needed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gawscompile.codegen import triton as emitter
from gawscompile.codegen.triton import Plan
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from tests.codegen import triton_interpret_cases as cases
from tests.codegen.interpreted_specs import CASES
from tests.codegen.triton_specs import (
    CROSSING,
    F32,
    GAWS,
    GAWS_DIAG,
    GAWSD,
    KRONECKER,
    LOKR,
    LOKR_LOW,
    LONG,
    MIXED,
    QKV,
    SWIGLU,
    llama,
)

HERE = Path(__file__).parent
UPDATE = "GAWS_UPDATE_SNAPSHOTS"

SPECS = sorted({text for text, _ in CASES.values()})

SMALL_GAWS = KernelSpec.parse(
    "k=576 x=bf16; " + "; ".join(f"n={n} w=bf16 out=bf16 kron(3*{n // 3}x192*1 bf16 s=1.0)" for n in (576, 192, 192))
)
SMALL_BANK = KernelSpec.parse("k=576 x=bf16; n=576 w=bf16 out=bf16 bias=bf16 bank(bf16 x4)")
SMALL_NF4 = KernelSpec.parse("k=576 x=bf16; n=576 packed(nf4 g=64 s=u8) out=bf16 bias=bf16 lora(r=16 bf16 s=2.0)")
SNAPSHOTS = {
    "single_launch_qkv": (QKV, Plan("single_launch", 4)),
    "redundant_shrink_qkv": (QKV, Plan("redundant_shrink", 4)),
    "two_launch_qkv": (QKV, Plan("two_launch", 4)),
    "fused_tile_qkv": (QKV, Plan("fused_tile")),
    "gemm_accumulate_qkv": (QKV, Plan("gemm_accumulate")),
    "single_launch_swiglu": (SWIGLU, Plan("single_launch", 8)),
    "single_launch_bank": (SMALL_BANK, Plan("single_launch", 8)),
    "fused_tile_bank": (SMALL_BANK, Plan("fused_tile")),
    "single_launch_nf4": (SMALL_NF4, Plan("single_launch", 8)),
    "fused_tile_nf4": (SMALL_NF4, Plan("fused_tile")),
    "kron_epilogue_gaws": (SMALL_GAWS, Plan("kron_epilogue", 4)),
}
SINGLE, TILE = Plan("single_launch", 8), Plan("fused_tile")


def emit(text: str, *plans: str) -> str:
    """Modules of a spec by the plans of these names, or by all; of decode plans the one with the fewest rows."""
    spec = KernelSpec.parse(text)
    fewest = {plan.name: plan for plan in emitter.plans(spec) if not plans or plan.name in plans}
    return "\n".join(emitter.emit(spec, plan) for plan in fewest.values())


def _plans(spec: KernelSpec) -> list[Plan]:
    """One plan of each name."""
    return list({plan.name: plan for plan in emitter.plans(spec)}.values())


TEXTS = [*SPECS, *map(str, (MIXED, LONG, LOKR_LOW, CROSSING))]

ODD_SCALES = ("-0.0", "1e-50", "1e+40", "inf", "-inf", "nan", "0.3333333333333333", "-2.5e-08", "1.0")


# --- Text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshot(name: str):
    snapshot = HERE / "snapshots" / f"{name}.py.txt"
    text = emitter.emit(*SNAPSHOTS[name])
    if os.environ.get(UPDATE):
        snapshot.write_text(text)
    assert text == snapshot.read_text(), f"the generated code has changed; if it should, run with {UPDATE}=1"


@pytest.mark.parametrize("text", TEXTS)
def test_header_names_plan_formulas_and_spec(text: str):
    spec, again = KernelSpec.parse(text), KernelSpec.parse.__wrapped__(text)
    for plan in _plans(spec):
        module = emitter.emit(spec, plan)
        assert module == emitter.emit(again, Plan.parse(str(plan)))
        header = ast.get_docstring(ast.parse(module))
        assert header is not None and f"plan `{plan}`" in header
        assert all(formula in header for formula in spec.formulas())
        assert "; ".join(line.strip() for line in header.split("Spec:\n")[1].splitlines()) == text


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_unused(text: str):
    spec = KernelSpec.parse(text)
    for plan in _plans(spec):
        module = ast.parse(emitter.emit(spec, plan))
        constants = {node.targets[0].id for node in module.body if isinstance(node, ast.Assign)}
        read = {node.id for node in ast.walk(module) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert constants <= read
        for function in _jit_functions(module):
            names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
            loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
            changed = {node.target.id for node in ast.walk(function) if isinstance(node, ast.AugAssign)}
            stored = {node.id for node in names if isinstance(node.ctx, ast.Store)} - changed
            assert stored | {argument.arg for argument in function.args.args} <= loaded, function.name


def test_no_mask_but_for_tokens_where_blocks_divide():
    few, many = ([name for name, kind in emitter.PLANS.items() if kind.decodes == decodes] for decodes in (True, False))
    assert "mask=" not in emit(str(QKV), *few)
    assert set(re.findall(r"mask=(\w+)", emit(str(QKV), *many))) == {"token_ok"}


def test_masks_where_no_block_divides():
    text = emit("k=101 x=f32; n=37 w=f32 out=f32 lora(r=17 f32 s=1.0)")
    assert {"row_ok", "col_ok", "rank0_ok", "token_ok"} <= set(re.findall(r"\w+_ok", text))


def test_no_shrink_without_lowrank_terms():
    text = emit("k=64 x=f32; n=40 w=f32 out=f32 bias=f32; n=8 w=f32 out=f32")
    assert "shrink" not in text and "rank" not in text and "u +=" not in text and "publish" not in text


def test_equal_siblings_share_code_and_unequal_ones_do_not():
    def count(text: str) -> int:
        return emit(text, "two_launch").count("tl.store(y + rows")

    assert count(str(QKV)) == 1
    assert count("k=64 x=f32; n=48 w=f32 out=f32 lora(r=4 f32 s=1.0); n=16 w=f32 out=f32") == 2


def test_only_fp32_dots_ask_for_precision():
    assert "ieee" not in emit(str(QKV))
    dots = [line for line in emit(str(F32)).splitlines() if "tl.dot" in line]
    assert dots and all('input_precision="ieee"' in line for line in dots)


@pytest.mark.parametrize("scale", ODD_SCALES)
def test_odd_scales(scale: str):
    text = emit(f"k=64 x=f32; n=40 w=f32 out=f32 lora(r=4 f32 s={scale})", "two_launch")
    if scale == "1.0":
        assert re.search(r"tl\.store\(u \+ block, tl\.sum\(acc\)\)", text)
        return
    (found,) = re.findall(r"tl\.store\(u \+ block, (.*) \* tl\.sum", text)
    assert str(eval(found)) == scale  # by their text, as nan is not equal to itself


@pytest.mark.parametrize(
    "text",
    [
        "k=0 x=f32; n=4 w=f32 out=f32",
        "k=4 x=f32; n=0 w=f32 out=f32",
        "k=4 x=f32; n=4 w=f32 out=f32 lora(r=0 f32 s=1.0)",
    ],
)
def test_empty_dimensions_are_refused(text: str):
    with pytest.raises(SpecError, match="at least 1"):
        emit(text)


def test_no_projections_are_refused():
    with pytest.raises(SpecError, match="no projections"):
        emitter.plans(KernelSpec(4, "f32", ()))


def test_many_rows_fit_into_a_grid():
    emit(f"k=4 x=f32; n={4 * 65537} w=f32 out=f32")


@pytest.mark.parametrize(
    "text",
    [
        "k=64 x=bf16; n=262148 w=bf16 out=bf16",  # 4 divides it, 8 does not, and 65537 blocks of 4 are too many
        "k=64 x=bf16; n=262080 w=bf16 out=bf16 lora(r=64 bf16 s=2.0)",  # so are 65520 of rows and 64 of u
        "k=64 x=bf16; n=1000012 w=bf16 out=bf16",
    ],
)
def test_every_plan_keeps_within_a_grid(text: str):
    spec = KernelSpec.parse(text)
    assert all(sum(emitter.launches(spec, plan).values()) <= 65535 for plan in emitter.plans(spec))


def test_more_rows_than_a_grid_are_refused():
    with pytest.raises(SpecError, match="row blocks"):
        emit("k=4 x=f32; n=3000000 w=f32 out=f32")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("single_launch", "single_launch with None rows; these are: .*single_launch.rows., .*gemm_accumulate"),
        ("fused_tile[8]", "fused_tile with 8 rows"),
        ("two_launch[7]", "takes 32, 16, 8, 4 rows, not 7"),
        ("two launch", "not a plan for Triton: 'two launch'"),
    ],
)
def test_bad_plans_name_the_good_ones(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        Plan.parse(text)


@pytest.mark.parametrize(
    ("spec", "plan"), [(GAWS, SINGLE), (LOKR, Plan("redundant_shrink", 4)), (QKV, Plan("stream", 4))]
)
def test_plans_that_cannot_run_a_spec_are_refused(spec: KernelSpec, plan: Plan):
    with pytest.raises(SpecError, match=re.escape(f"the plan {plan} cannot run k=")):
        emitter.emit(spec, plan)


def test_the_autotuner_is_asked_only_when_wanted():
    for plan in _plans(QKV):
        plain, tuned = emitter.emit(QKV, plan), emitter.emit(QKV, plan, tuned=True)
        assert "autotune" not in plain and tuned.count("@triton.autotune(") == len(emitter.launches(QKV, plan))
        assert "num_warps=" in plain and "num_warps=" not in tuned[tuned.index("def launch(") :]
        restored = re.findall(r"restore_value=\[(.*)\]", tuned)
        assert restored == (['"y0", "y1", "y2"'] if plan.name == "gemm_accumulate" else [])


@pytest.mark.slow
def test_autotuned_modules_of_unlike_siblings_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Triton checks the names in `restore_value` when it decorates."""
    pytest.importorskip("triton")
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    restored = 0
    for spec in {KernelSpec.parse(text) for text, _ in CASES.values()}:
        for plan in {plan.name: plan for plan in emitter.plans(spec)}.values():
            restored += "restore_value" in emitter.emit(spec, plan, True)
            assert emitter.load(spec, plan, True).launch
    assert restored > 10


def test_text_is_formatted_and_lints(tmp_path: Path):
    for i, text in enumerate([*SPECS, *map(str, (QKV, MIXED, LONG, *KRONECKER.values()))]):
        spec = KernelSpec.parse(text)
        for plan in _plans(spec):
            for tuned in (False, True):
                (tmp_path / f"case{i}_{plan.name}_{tuned}.py").write_text(emitter.emit(spec, plan, tuned))
    for command in (["format", "--diff", "--line-length", "100"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", str(tmp_path)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("launches", "spec"),
    [
        (1, GAWS),
        (1, GAWSD),
        (1, GAWS_DIAG),
        (1, KernelSpec.parse(f"{GAWS}; n=64 wt=bf16 out=bf16 bias=bf16")),
        (2, KernelSpec.parse(f"{GAWS}; n=64 w=bf16 out=bf16 lora(r=16 bf16 s=2.0)")),
        (2, QKV),
        (2, LOKR),
        (2, llama("kron(1*48x48*64 48*16x64*1 48*64x16*1 bf16 s=0.5)", "", "")),
        (2, llama("kron(48*16x64*1 1*48x48*16 48*64x16*1 bf16 s=0.5)", "", "")),
        (3, LOKR_LOW),
    ],
)
def test_launches(launches: int, spec: KernelSpec):
    for plan in _plans(spec):
        (host,) = (f for f in ast.parse(emitter.emit(spec, plan)).body if getattr(f, "name", "") == "launch")
        calls = [node for node in ast.walk(host) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
        alone = plan.name in ("single_launch", "redundant_shrink")
        assert len(calls) == len(emitter.launches(spec, plan)) == (1 if alone else launches)
        assert len(emitter.variants(spec, plan)) == (1 if plan.rows else 2) * len(calls)


def test_offsets_into_a_large_transposed_weight_are_wide():
    small, large = (emit(f"k={k} x=bf16; n=65536 wt=bf16 out=bf16") for k in (16384, 32768))
    assert "cols[:, None] * 65536" in small and "cols[:, None].to(tl.int64) * 65536" in large


def test_gaws_reads_one_slice_where_blocks_divide_and_loops_over_slices_where_not():
    even, odd = emit(str(GAWS)), emit(str(CROSSING))
    assert "x_from0 = start // 384 * 384" in even and "for slice0" not in even and "row_ok" not in even
    assert "for slice0 in range(start // 9, tl.minimum((start + BLOCK_N - 1) // 9 + 1, 123)):" in odd


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("8*16x16*1 8*diag16*1", r"kron\(8\*16x16\*1 8\*diag16\*1 f32 s=1.0\) does not end with a matrix"),
        ("1*diag128*1", "does not end with a matrix"),
        ("4*16x16*1", "takes 64 features, not 128"),
        ("8*16x16*1 4*16x16*1", r"mode 4\*16x16\*1 of kron\(8\*16x16.* takes 64 features, not 128"),
        ("8*8x16*1", "makes 64 features, not 128"),
        ("8*0x16*1", "must be at least 1"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(term: str, message: str):
    with pytest.raises(SpecError, match=message):
        emit(f"k=128 x=f32; n=128 w=f32 out=f32 kron({term} f32 s=1.0)")


def _jit_functions(module: ast.Module) -> list[ast.FunctionDef]:
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


# --- Arguments ---------------------------------------------------------------------------------------------


def _change(operand: int, change) -> tuple[torch.Tensor, list[torch.Tensor]]:
    problem = cases.problem(KernelSpec.parse("k=8 x=f32; n=6 w=f32 out=f32 bias=f32 lora(r=2 f32 s=tensor.f64)"), 3)
    operands = list(problem.arguments.values())
    operands[operand] = change(operands[operand])
    return problem.x, operands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_change(0, lambda t: t.half()), r"w0 is \[6, 8\] torch.float16, not \[6, 8\] torch.float32"),
        (_change(1, lambda t: t[:5]), r"bias0 is \[5\]"),
        (_change(2, lambda t: t.T.contiguous().T), "a0_0 is not contiguous"),
        (_change(4, lambda t: t[None]), r"scale0_0 is \[1\]"),
        (_change(0, lambda t: t.to("meta")), "w0 is on meta, x on cpu"),
    ],
)
def test_wrong_operands_are_named(arguments: tuple[torch.Tensor, list[torch.Tensor]], message: str):
    spec = KernelSpec.parse("k=8 x=f32; n=6 w=f32 out=f32 bias=f32 lora(r=2 f32 s=tensor.f64)")
    with pytest.raises(ValueError, match=message):
        emitter.launch(spec, SINGLE, *arguments)


def test_wrong_activations_and_counts_are_named():
    spec = KernelSpec.parse("k=8 x=f32; n=6 w=f32 out=f32")
    weight = torch.zeros(6, 8)
    for x in (torch.zeros(8), torch.zeros(0, 8), torch.zeros(1, 7), torch.zeros(1, 8).double()):
        with pytest.raises(ValueError, match="x is"):
            emitter.launch(spec, TILE, x, [weight])
    with pytest.raises(ValueError, match="2 operands for 1: w0"):
        emitter.launch(spec, TILE, torch.zeros(1, 8), [weight, weight])


def test_generated_module_is_a_file_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    module = emitter.load.__wrapped__(QKV, SINGLE)
    path = Path(str(module.__file__))
    assert path.is_relative_to(tmp_path) and path.read_text() == emitter.emit(QKV, SINGLE)
    written = path.stat().st_ino
    again = emitter.load.__wrapped__(QKV, SINGLE)
    assert again.__file__ == module.__file__ and path.stat().st_ino == written
