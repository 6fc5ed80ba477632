"""Weights kept as codes: their texts, what codes mean, and both plans of the C++ kernels against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from gawscompile.codegen import build, cpp
from gawscompile.ir.packed import CODINGS, FP4, NF4, OUTER, Packed
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from gawscompile.planning.table import Program
from gawscompile.runtime import ops
from tests.codegen.problems import Problem, in_bf16, packed, weight
from tests.codegen.test_cpp import run

GEMV, GEMM = "gemv_cpp<=40, gemm_accumulate", "gemv_cpp<=0, gemm_accumulate"
"""One plan or the other, by tables whose kernels are one library."""

TOKENS = (1, 2, 3, 5, 7, 13)
CLOSE = {"f32": 1e-6, "bf16": 4e-3, "f16": 1e-3}
"""Norm of the error, over that of the answer. Twice that where the library multiplies: the weight is
rounded for it, and the product."""

KINDS = ("s=f32", "s=bf16", "s=f16", "s=u8", "s=f32 z=f32", "s=bf16 z=bf16", "s=f16 z=u8", "s=f32 f=0.0625", "")
ROWS = {
    "int8": 13, "uint8": 7, "nf4": 21, "fp4": 6, "uint4_halves": 16, "table4_blocks": 64, "int4_tiles32": 96,
    "int4_tiles64": 128,
}  # fmt: skip
"""Odd ones, where that is allowed; of halves whole tiles, which are summed up apart."""


def base(coding, group, kind="s=f32", n=None, out="f32"):
    words = " ".join([coding, f"g={group}", *kind.split()])
    return f"n={n or ROWS[coding]} packed({words}) out={out}"


def kinds(coding):
    """The ways in which this coding's scales are kept."""
    return KINDS[:3] if CODINGS[coding].by_groups else KINDS


def every_kind(coding, x, k=160):
    """All of a coding's kinds beside each other, with a group of each size."""
    groups = itertools.cycle([64, k] if k % 64 == 0 else [32, k])
    parts = [base(coding, next(groups), kind, out=x) for kind in kinds(coding)]
    parts += [base(coding, next(groups), "s=f32", out=x)]
    return "; ".join([f"k={k} x={x}", *parts])


GRID = {f"{coding}-{x}": every_kind(coding, x) for coding in CODINGS for x in CLOSE}

LORA, KRON = "lora(r=5 f32 s=2.0)", "kron(4*12x16*1 f32 s=1.5)"
BESIDE = {
    "all codings": "k=576 x=f32; " + "; ".join(base(coding, group) for coding in CODINGS for group in (64, 576)),
    "all codings bf16": "k=64 x=bf16; " + "; ".join(base(coding, 32, "s=bf16", out="bf16") for coding in CODINGS),
    "bias, residual": "k=32 x=f32; "
    + "; ".join(f"{base(coding, 32)} bias=f32 residual=f32 {LORA}" for coding in ROWS),
    "fp32 factors": "k=96 x=bf16; "
    + "; ".join(f"{base(coding, 96, 's=bf16', out='bf16')} bias=bf16 {LORA}" for coding in ROWS),
    "two adapters": f"k=64 x=f32; {base('int8', 64)} {LORA} lora(r=17 f32 s=-0.5); "
    f"{base('nf4', 32, 's=u8')} {LORA} lora(r=3 bf16 s=tensor.f32); {base('table4_blocks', 64)} {LORA} {LORA}",
    "row scale": f"k=64 x=f32; {base('int8', 64)} bias=f32 rowscale=f32 {LORA}; "
    f"{base('uint4_halves', 32, 's=f32 z=f32', n=14)} residual=f32 rowscale=f32; "
    f"{base('table4_blocks', 32)} rowscale=f32",
    "modes": f"k=64 x=f32; {base('int8', 64, n=48)} {KRON}; {base('uint4_halves', 32, 's=f16 z=u8', n=48)} bias=f32 "
    f"{KRON} {LORA}; {base('table4_blocks', 64)} kron(1*64x64*1 f32 s=1.0)",
    "given": f"k=64 x=f32; {base('uint8', 64, 's=f32 z=u8')} given(r=4 f32 z=f32); "
    f"{base('fp4', 32)} {LORA} given(r=3 f32 z=bf16); {base('table4_blocks', 64)} given(r=9 f32 z=f32)",
    "banks": f"k=64 x=f32; {base('int8', 64, n=20)} bias=f32 residual=f32 bank(f32); "
    f"{base('nf4', 32, n=9)} {LORA} bank(f32); {base('table4_blocks', 64, n=64)} bank(f32)",
    "beside dense ones": f"k=160 x=f32; n=11 w=f32 out=f32 bias=f32 {LORA}; {base('int8', 160)} {LORA}; "
    f"n=24 wt=f32 out=f32 {LORA}; {base('nf4', 32)}; n=9 opaque=f32 out=f32 {LORA}; {base('uint4_halves', 160)}",
    "ordered": f"k=96 x=bf16; {base('int4_tiles32', 32, 's=bf16 ordered', out='bf16')} bias=bf16 {LORA}; "
    f"{base('int4_tiles64', 96, 's=f32 ordered', out='bf16')} residual=bf16; "
    f"{base('int4_tiles32', 96, 's=bf16', n=32, out='bf16')} {LORA}",
    "ordered-groups": f"k=128 x=bf16; {base('int4_tiles32', 64, 's=bf16 ordered', out='bf16')} {LORA}; "
    f"{base('int4_tiles32', 64, 's=bf16 ordered', out='bf16')}; {base('int4_tiles32', 64, 's=bf16', out='bf16')}; "
    f"{base('int4_tiles32', 128, 's=bf16', out='bf16')}; "
    f"{base('int4_tiles64', 64, 's=bf16 ordered', out='bf16')} {LORA}",
    "groups": f"k=576 x=bf16; {base('nf4', 64, 's=u8', n=64, out='bf16')} {LORA}; "
    f"{base('nf4', 64, 's=f16 z=i8', out='bf16')}; {base('uint4_halves', 64, 's=bf16 z=bf16', out='bf16')}; "
    f"{base('uint4_halves', 64, 's=f16 z=i8', out='bf16')}; {base('uint4_halves', 192, 's=f32 f=0.0625', out='bf16')}; "
    f"{base('int8', 576, 's=bf16', out='bf16')} {LORA}; {base('uint8', 64, 's=f32 z=f32', out='bf16')}",
    "groups-f16": f"k=1088 x=f16; {base('nf4', 64, 's=f32', out='f16')}; "
    f"{base('nf4', 1088, 's=f32 z=f32', out='f16')}; {base('uint4_halves', 64, 's=f32 z=f32', out='f16')}",
    "swiglu": f"k=192 x=f32 swiglu; {base('int8', 192, n=21)} {LORA}; {base('nf4', 64, n=21)} bias=f32",
    "swiglu bf16": f"k=96 x=bf16 swiglu; {base('uint4_halves', 32, 's=f32 z=f32', n=50, out='bf16')} {LORA}; "
    f"{base('uint4_halves', 32, 's=f32 z=f32', n=50, out='bf16')} {LORA}",
    "swiglu-blocks": f"k=192 x=f32 swiglu; {base('table4_blocks', 64, n=320)} {LORA}; "
    f"{base('table4_blocks', 192, n=320)} bias=f32 rowscale=f32 {LORA}",
    "swiglu-halves": f"k=96 x=f32 swiglu; {base('uint4_halves', 96, 's=f16 z=u8', n=264)} {LORA}; "
    f"{base('uint4_halves', 32, n=264)} rowscale=f32",
    "swiglu-halves-bf16": f"k=96 x=bf16 swiglu; {base('uint4_halves', 32, 's=f32 z=f32', n=1040, out='bf16')} {LORA}; "
    f"{base('uint4_halves', 96, 's=bf16', n=1040, out='bf16')} bias=bf16",
    "swiglu-tiles": f"k=96 x=bf16 swiglu; {base('int4_tiles32', 32, 's=bf16 ordered', n=576, out='bf16')} {LORA}; "
    f"{base('int4_tiles32', 96, 's=f32 ordered', n=576, out='bf16')} kron(6*96x16*1 f32 s=1.5)",
    "swiglu-bytes": f"k=128 x=bf16 swiglu; {base('uint4_halves', 64, 's=f32 z=f32', n=48, out='bf16')} {LORA}; "
    f"{base('uint4_halves', 128, 's=bf16', n=48, out='bf16')} bias=bf16",
    "swiglu-tiles-bytes": f"k=128 x=bf16 swiglu; {base('int4_tiles32', 64, 's=bf16 ordered', out='bf16')} {LORA}; "
    f"{base('int4_tiles32', 64, 's=f32 ordered', out='bf16')}",
    "swiglu-bank": f"k=64 x=f32 swiglu; {base('table4_blocks', 64, n=64)} bank(f32); "
    f"{base('table4_blocks', 32, n=64)} {LORA} bank(f32)",
}
# groups of whole steps, which bf16's dot products take
GRID |= {f"{coding}-bf16-steps": every_kind(coding, "bf16", k=192) for coding in CODINGS}
SPECS = {**BESIDE, **GRID}
QUICK = (
    "int8-f32", "uint4_halves-f32", "table4_blocks-f32", "int4_tiles32-f32", "int4_tiles64-f32", "int8-bf16",
    "uint4_halves-bf16-steps", "int4_tiles64-bf16-steps",
)  # fmt: skip
"""The fast ones of the grid. "all codings" has each coding with one kind of scale; f16 and other kinds are slow."""
SLOW = GRID.keys() - set(QUICK) | {"swiglu-halves-bf16", "swiglu-bank", "swiglu-bytes", "swiglu-tiles-bytes"}
NAMED = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SPECS]


@pytest.fixture(scope="module", autouse=True)
def built(request):
    """Kernels of the chosen tests are built side by side."""
    ops.ensure_loaded()
    chosen = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    for name in dict.fromkeys(name for name in chosen if name in SPECS):
        Program.parse(f"{GEMV} | {SPECS[name]}").start()


def call(problem, plan):
    operands = [problem.operands[o.name] for o in problem.spec.operands()]
    return torch.ops.gaws.project(problem.x, operands, f"{plan} | {problem.spec}")


def close(text, m, plan, seed=0):
    problem = Problem.of(text, m, seed)
    outputs = call(problem, plan)
    assert [out.shape for out in outputs] == [(m, n) for n, _ in problem.spec.outputs]
    for i, (got, want) in enumerate(zip(outputs, problem.want, strict=True)):
        error = ((got.double() - want).norm() / want.norm()).item()
        allowed = CLOSE[problem.spec.outputs[i][1]] * (1 if plan == GEMV else 2)
        if problem.spec.x == "bf16" and (term := problem.spec.projections[i].packed) and in_bf16(term):
            allowed *= 1.5
        assert error <= allowed, f"projection {i} of {text}, m = {m}, {plan}: {error:.2g}"
    if plan == GEMV or problem.spec.x == "f32":  # the library's weight is rounded to x's dtype
        problem.check(outputs)


@pytest.mark.parametrize("plan", [GEMV, GEMM], ids=["gemv", "gemm"])
@pytest.mark.parametrize("name", NAMED)
def test_kernels_against_fp64(name, plan):
    for m in TOKENS:
        close(SPECS[name], m, plan, seed=m)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("plan", [GEMV, GEMM], ids=["gemv", "gemm"])
def test_any_number_of_threads(threads, plan):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (1, 7):
            close(SPECS["all codings"], m, plan)
            close(SPECS["bias, residual"], m, plan)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param("all codings", marks=pytest.mark.slow), "bias, residual", "uint4_halves-f32"]
)
def test_nothing_is_written_around_an_output(name):
    source = cpp.emit(KernelSpec.parse(SPECS[name]), ("gemv_cpp",))
    for m in (1, 7):
        problem = Problem.of(SPECS[name], m)
        problem.check(run(build.load(source), "gemv", problem, None))


@pytest.mark.parametrize("plan", [GEMV, GEMM], ids=["gemv", "gemm"])
def test_no_tokens_at_all(plan):
    problem = Problem.of(SPECS["all codings"], 0)
    outputs = call(problem, plan)
    assert [out.shape for out in outputs] == [(0, n) for n, _ in problem.spec.outputs]


def test_other_tokens_than_before_in_the_same_thread():
    """Buffers for x in other orders are kept from call to call."""
    for m in (13, 1, 5):
        close(SPECS["all codings bf16"], m, GEMV, seed=m)


# --- Meaning ------------------------------------------------------------------------------------------------------


def code(term: Packed, row: int, column: int) -> int:
    """The code of one place, by what `Coding` says of where it lies."""
    lies = term.codes.flatten().tolist()
    if term.kept.layout == "bytes":
        return lies[row * term.k + column]
    if term.kept.layout == "pairs":
        byte = lies[(row * term.k + column) // 2]
        return byte & 15 if column % 2 else byte >> 4
    if term.kept.layout == "halves":
        half = term.n // 2
        byte = lies[row % half * term.k + column]
        return byte >> 4 if row < half else byte & 15
    rows = term.kept.rows
    start, upper, row = row // rows * rows * term.k // 2, row % rows >= rows // 2, row % (rows // 2)
    if term.kept.layout == "tiles":
        byte = lies[start + column * rows // 2 + row]
    else:
        byte = lies[start + column // 2 * rows + row * 2 + column % 2]
    return byte >> 4 if upper else byte & 15


def scale(term: Packed, row: int, group: int) -> float:
    at = group * term.n + row if term.kept.by_groups else row * (term.k // term.group) + group
    if term.scales is None:
        return 1.0
    if term.kept.shifted:
        at *= 2
    number = term.scales.flatten()[at].item()
    if term.levels is not None:
        number = term.levels[number].item() * term.outer[at // OUTER].item() + term.offset.item()
    return number * term.factor


@pytest.mark.parametrize(
    "coding", [pytest.param(one, marks=[pytest.mark.slow] * (one == "int4_tiles64")) for one in CODINGS]
)
def test_a_weight_is_what_its_codes_stand_for_one_by_one(coding):
    n, k = ROWS[coding], 96
    for kind, group in itertools.product(kinds(coding), (32, 96)):
        problem = Problem.of(f"k={k} x=f32; {base(coding, group, kind)}", 1)
        term = packed(problem.spec, 0, problem.operands)
        levels = term.table.tolist() if term.table is not None else term.kept.levels or range(-256, 256)
        offset = 256 if isinstance(levels, range) else 0
        want = torch.zeros(n, k, dtype=torch.float64)
        for row, column in itertools.product(range(n), range(k)):
            zero = 0 if term.zeros is None else term.zeros[row * (k // group) + column // group].item()
            number = levels[code(term, row, column) + offset]
            want[row, column] = scale(term, row, column // group) * (number - zero)
            if term.kept.shifted:
                want[row, column] += term.scales.flatten()[2 * (column // group * n + row) + 1].item()
        torch.testing.assert_close(term.dense(torch.float64), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", [GEMV, GEMM], ids=["gemv", "gemm"])
def test_features_that_there_are_not_are_nan(plan):
    """aten raises an error; a kernel reads nothing that lies outside of x."""
    problem = Problem.of(f"k=64 x=f32; {base('int4_tiles32', 32, 's=f32 ordered')}", 2)
    for index in (64, -65, 1 << 30):
        problem.operands["wi0"][5] = index
        assert call(problem, plan)[0].isnan().all()


@pytest.mark.parametrize(
    ("coding", "group"), [("nf4", 64), ("int8", 192), ("uint4_halves", 64), ("int4_tiles32", 192)]
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_x_that_is_no_number_makes_none(dtype, coding, group):
    """Its row alone. The last has numbers too small for their inverse."""
    problem = Problem.of(f"k=192 x={dtype}; {base(coding, group)}", 5)
    x = problem.x.clone()
    x[0, 70], x[1, 130], x[3], x[4] = float("nan"), -float("inf"), 0, x[4] * 1e-30
    (got,) = call(Problem.with_operands(problem.spec, x, problem.operands), GEMV)
    assert got[0].isnan().all() and not got[1].isfinite().any() and (got[3] == 0).all()
    for t in range(5):  # tiles have whole numbers for a lone token
        (alone,) = call(Problem.with_operands(problem.spec, x[t : t + 1], problem.operands), GEMV)
        off, size = (alone - got[t]).double().norm(), got[t].double().norm()
        assert not alone.isfinite().any() if t < 2 else off <= 0.01 * size
    want = (x[4].double() @ weight(problem.spec, 0, problem.operands).T) * 1e30
    assert (got[4].double() * 1e30 - want).norm() <= 0.01 * want.norm()
    torch.testing.assert_close(got[2], call(problem, GEMV)[0][2])


@pytest.mark.parametrize("large", [0, 1e2, 1e4, 1e6])
def test_an_x_of_16_bits_loses_little_beside_a_large_number(large):
    """By AVX2's whole numbers too. Where a row has a zero for x's large numbers, only the others count. The zero of
    tiles is a code of 8, times which the largest of these numbers leaves few digits of fp32 to the others."""
    bases = [("nf4", 64, "s=f32"), ("fp4", 64, "s=f32"), ("nf4", 128, "s=u8")]
    bases += [("int8", 768, "s=f32"), ("uint4_halves", 64, "s=f32"), ("int4_tiles32", 384, "s=f32")]
    bases += [("uint8", 64, "s=f32 z=f32"), ("nf4", 768, "s=f32 z=f32"), ("fp4", 384, "s=f32")]
    problem = Problem.of(f"k=768 x=bf16; {'; '.join(base(*each, out='f32') for each in bases)}", 7)
    x = problem.x.clone()
    if large:
        x[:, 70], x[:, 333] = large, -large
        for i, levels in enumerate((NF4, FP4)):
            codes, zero = problem.operands[f"w{i}"].view(-1, 384), levels.index(0)
            codes[:, 35], codes[:, 166] = codes[:, 35] & 15 | zero << 4, codes[:, 166] & 240 | zero
        for name in ("w3", "w4"):
            problem.operands[name].view(-1, 768)[:, [70, 333]] = 0
        problem.operands["wz6"].fill_(128), problem.operands["w6"].view(-1, 768)[:, [70, 333]].fill_(128)
        problem.operands["w5"].view(-1, 768, 16)[:, [70, 333]] = 0x88
        problem.operands["ws5"].view(-1, 2)[:, 1] = 0
    rounded = in_bf16(packed(problem.spec, 0, problem.operands))
    checked = (0, 1, 3, 4, 6, 5)[: 5 + (large < 1e6)] if large else range(len(bases))
    for tokens in (x, x[:1]):  # tiles have whole numbers for a lone token
        answers = call(Problem.with_operands(problem.spec, tokens, problem.operands), GEMV)
        for i in checked:
            got, want = answers[i], tokens.double() @ weight(problem.spec, i, problem.operands).T
            assert (got - want).norm() <= (4e-3 if rounded else 1e-3 if large else 3e-4) * want.norm(), i


def test_the_second_level_of_scales_has_more_than_one_block():
    assert OUTER < 21 * 576 // 32
    close(f"k=576 x=f32; {base('nf4', 32, 's=u8')}; {base('int8', 32, 's=u8 z=f32', n=30)}", 3, GEMV)
    close(f"k=576 x=f32; {base('nf4', 32, 's=u8')}; {base('int8', 32, 's=u8 z=f32', n=30)}", 3, GEMM)


# --- Texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", CODINGS)
def test_a_text_parses_to_the_spec_that_prints_it(coding):
    for kind, group in itertools.product(kinds(coding), (32, 96)):
        text = f"k=96 x=f32; {base(coding, group, kind)} bias=f32 {LORA}"
        spec = KernelSpec.parse(text)
        assert str(spec) == text
        (total,) = spec.projections
        assert total.packed.coding == coding and total.packed.group == group and total.n == ROWS[coding]
        problem = Problem.of(text, 2)
        again = KernelSpec.of(problem.x, spec.bound([problem.operands[o.name] for o in spec.operands()]))
        assert again == spec and again.projections == spec.projections


MALFORMED = {
    "no coding": "n=32 packed(int9 g=32 s=f32)",
    "no group": "n=32 packed(int8 s=f32)",
    "group of none": "n=32 packed(int8 g=0 s=f32)",
    "group that does not divide k": "n=32 packed(int8 g=64 s=f32)",
    "group of 16": "n=32 packed(int8 g=16 s=f32)",
    "group larger than k": "n=32 packed(int8 g=192 s=f32)",
    "dtype of scales": "n=32 packed(int8 g=32 s=f33)",
    "dtype of zeros": "n=32 packed(int8 g=32 s=f32 z=i64)",
    "factor": "n=32 packed(int8 g=32 s=f32 f=many)",
    "odd halves": "n=33 packed(uint4_halves g=32 s=f32)",
    "rows of blocks": "n=48 packed(table4_blocks g=32 s=f32)",
    "blocks without scales": "n=32 packed(table4_blocks g=32)",
    "blocks with zeros": "n=32 packed(table4_blocks g=32 s=f32 z=f32)",
    "blocks with a factor": "n=32 packed(table4_blocks g=32 s=f32 f=2.0)",
    "bytes in an order": "n=32 packed(int8 g=32 s=f32 ordered)",
    "rows of tiles": "n=32 packed(int4_tiles64 g=32 s=f32)",
    "tiles without scales": "n=32 packed(int4_tiles32 g=32)",
    "tiles with zeros": "n=32 packed(int4_tiles32 g=32 s=f32 z=f32)",
    "tiles with coded scales": "n=32 packed(int4_tiles32 g=32 s=u8)",
    "blocks with coded scales": "n=32 packed(table4_blocks g=32 s=u8)",
    "zeros without scales": "n=32 packed(int8 g=32 z=f32)",
    "factor without scales": "n=32 packed(int8 g=32 f=2.0)",
    "two bases": "n=32 w=f32 packed(int8 g=32 s=f32)",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_packed_weight_is_refused(name):
    assert KernelSpec.parse("k=96 x=f32; n=32 packed(int8 g=32 s=f32) out=f32")
    with pytest.raises(SpecError):
        KernelSpec.parse(f"k=96 x=f32; {MALFORMED[name]} out=f32")


def test_k_is_a_multiple_of_32():
    with pytest.raises(SpecError):
        KernelSpec.parse("k=48 x=f32; n=32 packed(int8 g=48 s=f32) out=f32")


def test_gate_and_up_are_summed_apart_in_one_way():
    text = f"k=64 x=f32 swiglu; {base('table4_blocks', 64)}; {base('uint4_halves', 64, n=64)}"
    with pytest.raises(SpecError, match="kept in different ways"):
        cpp.emit(KernelSpec.parse(text))
