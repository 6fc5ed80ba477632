"""The Triton emitter: its text, its numbers in the interpreter, its kernels compiled ahead of time. No GPU needed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gawscompile.codegen import triton as emitter
from gawscompile.codegen.spec import KernelSpec, LowRankSpec, ProjectionSpec, SpecError
from tests.codegen import triton_interpret_cases as cases

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
UPDATE = "GAWS_UPDATE_SNAPSHOTS"

F32_EPSILON = torch.finfo(torch.float32).eps
SPECS = sorted({text for text, _ in cases.CASES.values()})

LORA = LowRankSpec(rank=16, dtype="bf16", scale=2.0)
QKV = KernelSpec(
    k=576, x="bf16", projections=tuple(ProjectionSpec(n, "bf16", "bf16", lowrank=(LORA,)) for n in (576, 192, 192))
)  # SmolLM2-135M
F32_ADAPTERS = KernelSpec.parse(str(QKV).replace("r=16 bf16", "r=16 f32"))
F32 = KernelSpec.parse(str(QKV).replace("bf16", "f32"))
MIXED = KernelSpec.parse(
    "k=1000 x=bf16; n=577 w=bf16 out=f32 bias=f16 residual=bf16 lora(r=17 f32 s=tensor.f64) lora(r=300 bf16 s=-0.5);"
    " n=576 w=bf16 out=bf16; n=33 w=f32 out=bf16 lora(r=1 f16 s=1.0); n=1 w=f16 out=f16 bias=f16"
)
LONG = KernelSpec.parse(
    "k=5120 x=f16; n=512 w=f16 out=f16 lora(r=48 f16 s=0.25); n=520 w=f16 out=f16 lora(r=48 f16 s=0.25)"
)


def _llama(*terms: str) -> KernelSpec:
    """q, k and v of LLaMA-3.2-3B."""
    rows = (f"n={n} w=bf16 out=bf16 {term}" for n, term in zip((3072, 1024, 1024), terms, strict=True))
    return KernelSpec.parse("; ".join(["k=3072 x=bf16", *rows]))


GAWS = _llama("kron(8*384x384*1 bf16 s=1.0)", *["kron(8*128x384*1 bf16 s=1.0)"] * 2)
GAWSD = _llama("kron(1*24x24*128 bf16 s=1.0)", *["kron(1*8x24*128 bf16 s=1.0)"] * 2)
GAWS_DIAG = _llama("kron(8*diag384*1 8*384x384*1 f32 s=1.0)", *["kron(1*diag24*128 1*8x24*128 f32 s=2.0)"] * 2)
LOKR = _llama("kron(1*48x48*64 48*64x64*1 bf16 s=0.5)", *["kron(1*32x48*64 32*32x64*1 bf16 s=0.5)"] * 2)
LOKR_LOW = _llama(
    "kron(1*48x48*64 48*16x64*1 48*64x16*1 bf16 s=0.5)",
    "kron(48*16x64*1 48*32x16*1 1*32x48*32 bf16 s=0.5)",
    "kron(48*16x64*1 1*32x48*16 32*32x16*1 bf16 s=0.5)",
)
CONV1D = KernelSpec.parse("k=1280 x=bf16; n=3840 wt=bf16 out=bf16 bias=bf16 lora(r=16 bf16 s=2.0)")  # GPT-2 Large
CROSSING = KernelSpec.parse(
    "k=1230 x=bf16; n=1107 wt=bf16 out=bf16 lora(r=9 f32 s=0.5) kron(123*9x10*1 bf16 s=1.0) kron(1*9x10*123 f32 s=2.0);"
    " n=41 w=bf16 out=bf16 kron(1*diag41*30 41*1x30*1 bf16 s=1.0)"
)
KRONECKER = {
    "gaws": GAWS,
    "gawsd": GAWSD,
    "gaws_diag": GAWS_DIAG,
    "lokr": LOKR,
    "lokr_low": LOKR_LOW,
    "conv1d": CONV1D,
    "crossing": CROSSING,
}
SNAPSHOTS = {
    "two_launch_qkv": QKV,
    "kron_epilogue_gaws": KernelSpec.parse(
        "k=576 x=bf16; "
        + "; ".join(f"n={n} w=bf16 out=bf16 kron(3*{n // 3}x192*1 bf16 s=1.0)" for n in (576, 192, 192))
    ),
}
ODD_SCALES = ("-0.0", "1e-50", "1e+40", "inf", "-inf", "nan", "0.3333333333333333", "-2.5e-08", "1.0")


# --- Text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_snapshot(name: str):
    snapshot = HERE / "snapshots" / f"{name}.py.txt"
    text = emitter.emit(SNAPSHOTS[name])
    if os.environ.get(UPDATE):
        snapshot.write_text(text)
    assert text == snapshot.read_text(), f"the generated code has changed; if it should, run with {UPDATE}=1"


@pytest.mark.parametrize("text", [*SPECS, *map(str, (MIXED, LONG, LOKR_LOW, CROSSING))])
def test_text_is_a_function_of_the_spec(text: str):
    first, second = KernelSpec.parse(text), KernelSpec.parse.__wrapped__(text)
    assert emitter.emit(first) == emitter.emit(second)


@pytest.mark.parametrize("text", [*SPECS, *map(str, (MIXED, LONG, LOKR_LOW, CROSSING))])
def test_header_names_plan_formulas_and_spec(text: str):
    spec = KernelSpec.parse(text)
    header = ast.get_docstring(ast.parse(emitter.emit(spec)))
    assert header is not None and f"plan `{emitter.plan(spec)}`" in header
    for formula in spec.formulas():
        assert formula in header
    assert "; ".join(line.strip() for line in header.split("Spec:\n")[1].splitlines()) == text


@pytest.mark.parametrize("text", [*SPECS, *map(str, (MIXED, LONG, LOKR_LOW, CROSSING))])
def test_nothing_is_unused(text: str):
    for function in _jit_functions(emitter.emit(KernelSpec.parse(text))):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        changed = {node.target.id for node in ast.walk(function) if isinstance(node, ast.AugAssign)}
        stored = {node.id for node in names if isinstance(node.ctx, ast.Store)} - changed
        assert stored | {argument.arg for argument in function.args.args} <= loaded, function.name


def test_no_mask_but_for_tokens_where_blocks_divide():
    functions = {f.name: ast.unparse(f) for f in _jit_functions(emitter.emit(QKV))}
    assert functions.keys() == {"shrink_gemv", "expand_gemv", "shrink_tile", "expand_tile"}
    assert "mask=" not in functions["shrink_gemv"] + functions["expand_gemv"]
    masks = re.findall(r"mask=(\w+)", functions["shrink_tile"] + functions["expand_tile"])
    assert set(masks) == {"token_ok"}


def test_masks_where_no_block_divides():
    text = emitter.emit(KernelSpec.parse("k=101 x=f32; n=37 w=f32 out=f32 lora(r=17 f32 s=1.0)"))
    assert {"row_ok", "col_ok", "rank0_ok", "token_ok"} <= set(re.findall(r"\w+_ok", text))


def test_no_shrink_without_lowrank_terms():
    text = emitter.emit(KernelSpec.parse("k=64 x=f32; n=40 w=f32 out=f32 bias=f32; n=8 w=f32 out=f32"))
    assert "shrink" not in text and "RANKS" not in text and "u +=" not in text


def test_equal_siblings_share_code_and_unequal_ones_do_not():
    def count(text: str) -> int:
        return emitter.emit(KernelSpec.parse(text)).count("tl.store(y + rows")

    assert count(str(QKV)) == 1
    assert count("k=64 x=f32; n=48 w=f32 out=f32 lora(r=4 f32 s=1.0); n=16 w=f32 out=f32") == 2


def test_only_fp32_dots_ask_for_precision():
    assert "ieee" not in emitter.emit(QKV)
    dots = [line for line in emitter.emit(F32).splitlines() if "tl.dot" in line]
    assert dots and all('input_precision="ieee"' in line for line in dots)


@pytest.mark.parametrize("scale", ODD_SCALES)
def test_odd_scales(scale: str):
    spec = KernelSpec.parse(f"k=64 x=f32; n=40 w=f32 out=f32 lora(r=4 f32 s={scale})")
    text = emitter.emit(spec)
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
        emitter.emit(KernelSpec.parse(text))


def test_no_projections_are_refused():
    with pytest.raises(SpecError, match="no projections"):
        emitter.emit(KernelSpec(4, "f32", ()))


def test_many_rows_fit_into_a_grid():
    emitter.emit(KernelSpec.parse(f"k=4 x=f32; n={4 * 65537} w=f32 out=f32"))


def test_more_rows_than_a_grid_are_refused():
    with pytest.raises(SpecError, match="row blocks"):
        emitter.emit(KernelSpec.parse("k=4 x=f32; n=3000000 w=f32 out=f32"))


@pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff is not installed")
def test_text_is_formatted_and_lints(tmp_path: Path):
    for i, text in enumerate([*SPECS, *map(str, (QKV, MIXED, LONG, *KRONECKER.values()))]):
        (tmp_path / f"case{i}.py").write_text(emitter.emit(KernelSpec.parse(text)))
    for command in (["format", "--diff", "--line-length", "100"], ["check"]):
        done = subprocess.run(["ruff", *command, "--isolated", str(tmp_path)], capture_output=True, text=True)
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
        (2, _llama("kron(1*48x48*64 48*16x64*1 48*64x16*1 bf16 s=0.5)", "", "")),
        (2, _llama("kron(48*16x64*1 1*48x48*16 48*64x16*1 bf16 s=0.5)", "", "")),
        (3, LOKR_LOW),
    ],
)
def test_launches(launches: int, spec: KernelSpec):
    (host,) = [f for f in ast.parse(emitter.emit(spec)).body if isinstance(f, ast.FunctionDef) and f.name == "launch"]
    (choice,) = [node for node in host.body if isinstance(node, ast.If) and "GEMV_TOKENS" in ast.unparse(node.test)]
    for way in (choice.body, choice.orelse):
        calls = [node for line in way for node in ast.walk(line) if isinstance(node, ast.Call)]
        assert sum(isinstance(node.func, ast.Subscript) for node in calls) == launches
    assert len(emitter.variants(spec)) == 3 * launches


def test_offsets_into_a_large_transposed_weight_are_wide():
    small, large = (emitter.emit(KernelSpec.parse(f"k={k} x=bf16; n=65536 wt=bf16 out=bf16")) for k in (16384, 32768))
    assert "cols[:, None] * 65536" in small and "cols[:, None].to(tl.int64) * 65536" in large


def test_gaws_reads_one_slice_where_blocks_divide_and_loops_over_slices_where_not():
    even, odd = emitter.emit(GAWS), emitter.emit(CROSSING)
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
    spec = KernelSpec.parse(f"k=128 x=f32; n=128 w=f32 out=f32 kron({term} f32 s=1.0)")
    with pytest.raises(SpecError, match=message):
        emitter.emit(spec)


def _jit_functions(text: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
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
        emitter.launch(spec, *arguments)


def test_wrong_activations_and_counts_are_named():
    spec = KernelSpec.parse("k=8 x=f32; n=6 w=f32 out=f32")
    weight = torch.zeros(6, 8)
    for x in (torch.zeros(8), torch.zeros(0, 8), torch.zeros(1, 7), torch.zeros(1, 8).double()):
        with pytest.raises(ValueError, match="x is"):
            emitter.launch(spec, x, [weight])
    with pytest.raises(ValueError, match="2 operands for 1: w0"):
        emitter.launch(spec, torch.zeros(1, 8), [weight, weight])


# --- Numbers, in the interpreter ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `triton_interpret_cases` measured: case → its line."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONHASHSEED": "1",
        "GAWS_CACHE_DIR": str(tmp_path_factory.mktemp("interpreted")),
    }
    command = [sys.executable, str(HERE / "triton_interpret_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", cases.CASES)
def test_numbers(interpreted: dict[str, dict], case: str):
    for measured in interpreted[case]["projections"]:
        tolerance = 1.5 * measured["segments"] + F32_EPSILON
        assert measured["finite"] and measured["guards_hold"] and measured["in_place"]
        assert measured["error"] <= tolerance
        for part, distance in measured["without"].items():
            assert distance > tolerance, f"the tolerance would not notice that {part} is missing"


def test_text_is_the_same_in_another_process(interpreted: dict[str, dict]):
    for case, (text, _) in cases.CASES.items():
        here = hashlib.sha256(emitter.emit(KernelSpec.parse(text)).encode()).hexdigest()
        assert interpreted[case]["digest"] == here


def test_fp16_survives_a_large_scale(interpreted: dict[str, dict]):
    assert interpreted["overflow"]["m1"] < 1e-3 and interpreted["overflow"]["m5"] < 1e-3


def test_replaced_factors_show_in_the_next_call(interpreted: dict[str, dict]):
    assert interpreted["live"]["shows"]


# --- Compilation ahead of time -----------------------------------------------------------------------------

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 99 << 10, "gfx942": 64 << 10}  # sm_86 has 99 KiB


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Compiles one variant of a spec's kernel for a target; all pointers are 16-byte aligned, as torch's are."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter replaces the compiler")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compile_variant(spec: KernelSpec, variant: emitter.Variant, target: str):
        source = ASTSource(
            getattr(emitter.load(spec), variant.kernel),
            variant.signature,
            constexprs=variant.constants,
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, kind in enumerate(variant.signature.values())
                if kind.startswith("*")
            },
        )
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=variant.options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GAWS_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        emitter.load.cache_clear()
        yield compile_variant
        emitter.load.cache_clear()


def _variants(**specs: KernelSpec) -> list:
    return [
        pytest.param(spec, variant, id="-".join([name, variant.kernel, *map(str, variant.constants.values())]))
        for name, spec in specs.items()
        for variant in emitter.variants(spec)
    ]


@pytest.mark.parametrize(("spec", "variant"), _variants(qkv=QKV, f32=F32, mixed=MIXED, long=LONG, **KRONECKER))
def test_sm_90(compiler, tmp_path: Path, spec: KernelSpec, variant: emitter.Variant):
    compiled = compiler(spec, variant, "sm_90")
    usage = _resource_usage(compiled, tmp_path)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, "spills, or arrays in local memory"
    assert usage["REG"] <= 128 or spec is CROSSING
    assert compiled.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize(
    ("spec", "variant"), _variants(qkv=QKV, mixed=MIXED, gaws=GAWS, gawsd=GAWSD, lokr=LOKR, crossing=CROSSING)
)
def test_gfx942(compiler, spec: KernelSpec, variant: emitter.Variant):
    compiled = compiler(spec, variant, "gfx942")
    spills = re.findall(r"\.(?:sgpr|vgpr)_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
    assert spills and set(spills) == {"0"}
    assert compiled.metadata.shared <= SHARED_MEMORY["gfx942"]


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize(("spec", "variant"), _variants(gaws=GAWS, gawsd=GAWSD, lokr=LOKR))
def test_kronecker_on_other_nvidia_gpus(
    compiler, tmp_path: Path, spec: KernelSpec, variant: emitter.Variant, target: str
):
    compiled = compiler(spec, variant, target)
    usage = _resource_usage(compiled, tmp_path)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0 and usage["REG"] <= 128
    assert compiled.metadata.shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("spec", "variant"), [p for p in _variants(adapters=F32_ADAPTERS) if p.values[1].kernel == "shrink_tile"]
)
def test_fp32_is_never_tf32(compiler, spec: KernelSpec, variant: emitter.Variant, target: str):
    assert "tf32" not in compiler(spec, variant, target).asm["ptx"]


def test_decode_streams_weights(compiler):
    (variant,) = [v for v in emitter.variants(QKV) if v.kernel == "expand_gemv"]
    ptx = compiler(QKV, variant, "sm_90").asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 18, "one 16-byte load of W and one of x for each of 9 steps"
    assert "bar.sync" not in ptx, "a barrier would keep loads of later steps from starting"


@pytest.mark.parametrize("spec", [GAWS, GAWSD, CONV1D], ids=["gaws", "gawsd", "conv1d"])
def test_decode_reads_weights_and_factors_in_16_byte_loads(compiler, spec: KernelSpec):
    (variant,) = [v for v in emitter.variants(spec) if v.kernel == "expand_gemv"]
    ptx = compiler(spec, variant, "sm_90").asm["ptx"]
    wide, narrow = (len(re.findall(rf"ld\.global\.{kind}", ptx)) for kind in (r"v4\.b32", r"(?:v2\.)?b(?:16|32)\b"))
    assert wide >= 20 and narrow <= 8, "the narrow ones are x, where threads lie along W's rows, and a row of a mix"


def test_generated_module_is_a_file_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("GAWS_CACHE_DIR", str(tmp_path))
    module = emitter.load.__wrapped__(QKV)
    path = Path(str(module.__file__))
    assert path.is_relative_to(tmp_path) and path.read_text() == emitter.emit(QKV)
    written = path.stat().st_ino
    assert emitter.load.__wrapped__(QKV).__file__ == module.__file__ and path.stat().st_ino == written


def _resource_usage(compiled, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a cubin, by the `cuobjdump` in Triton's package."""
    from triton import knobs

    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
