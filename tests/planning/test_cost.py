"""The cost model and its tables: crossovers where the expressions cross, for every m a plan."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import sympy

from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.types import SpecError
from gawscompile.planning import cost, cpu_cost, devices, gpu_cost
from gawscompile.planning.table import PlanTable, Program

SPEC = KernelSpec.parse(
    "k=576 x=bf16; n=1536 w=bf16 out=bf16 lora(r=16 bf16 s=2.0); n=1536 w=bf16 out=bf16 lora(r=16 bf16 s=2.0)"
)


def test_costs_are_expressions_in_m_that_grow():
    planned = cost.plan(SPEC)
    assert set(planned.costs) == {"gemv_cpp", "gemm_cpp", "gemm_accumulate"}
    for name, expression in planned.costs.items():
        assert isinstance(expression, sympy.Expr) and expression.free_symbols == {cost.m}
        times = [planned.seconds(name, m) for m in (1, 2, 8, 64, 512, 4096)]
        grows = all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(times))  # those that wait for memory are equal
        assert grows and times[0] > 0


def test_the_table_is_the_argmin_of_the_costs():
    device = dataclasses.replace(devices.cpu(), library_rate={k: v * 5 for k, v in devices.cpu().library_rate.items()})
    for chosen in (devices.cpu(), device):
        planned = cost.plan(SPEC, chosen)
        for m in [*range(1, 300), 1000, 5000, 60000]:
            best = min(planned.costs, key=lambda name: planned.seconds(name, m))
            assert planned.table.pick(m) == best, m


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_many_tokens_of_16_bits_are_the_librarys_only_where_it_has_instructions_for_them(dtype):
    """Without AVX-512 oneDNN leaves such products to a loop of torch's, which is several times slower than panels."""
    plain = KernelSpec.parse(f"k=576 x={dtype}; n=1536 w={dtype} out={dtype}")
    turned = KernelSpec.parse(f"k=1536 x={dtype}; n=576 wt={dtype} out={dtype}")
    for spec in (plain, turned):
        narrow = cost.plan(spec, devices._cpu(2, "AuthenticAMD", "25", "AVX2", ""))
        assert narrow.table.pick(512) == "gemm_cpp"
    tiles = cost.plan(plain, devices._cpu(2, "GenuineIntel", "6", "AVX512", "amx"))
    assert (tiles.table.pick(512) == "gemm_accumulate") == (dtype == "bf16")  # AMX has none of fp16


def test_packed_weights_cost_a_gpu_their_bytes_and_what_unpacks_them():
    row = "n=1536 packed(nf4 g=64 s=u8) out=bf16 lora(r=16 bf16 s=2.0)"
    packed = KernelSpec.parse("; ".join(["k=576 x=bf16", row, row]))
    scales = 1536 * 9
    assert gpu_cost.operand_bytes(packed)[0] == 2 * (1536 * 288 + scales + 4 * (256 + scales // 256 + 1))
    assert gpu_cost.unpacking(packed) == 80 * 2 * 1536 * 576 and gpu_cost.unpacking(SPEC) == 0
    planned = cost.plan(packed, devices.GPUS["H100"])
    assert "gemm_accumulate" not in planned.costs and planned.table.pick(4096) == "fused_tile"
    assert "[" in planned.table.pick(1)  # one of those for few tokens


def test_bytes_are_those_of_the_tensors():
    assert cpu_cost.weight_bytes(SPEC) == 2 * 1536 * 576 * 2
    assert cpu_cost.adapter_bytes(SPEC) == 2 * 16 * (576 + 1536) * 2


def test_the_library_is_no_candidate_where_it_cannot_write_the_output():
    spec = KernelSpec.parse("k=8 x=bf16; n=4 w=bf16 out=f32")
    assert set(cost.plan(spec).costs) == {"gemv_cpp", "gemm_cpp"}


@pytest.mark.parametrize(
    "row",
    [
        "n=4 opaque=bf16 out=bf16 lora(r=2 f32 s=1.0)",
        "n=4 w=bf16 out=bf16 kron(4*1x2*1 f32 s=1.0)",
    ],
)
def test_panels_are_of_plain_weights(row):
    assert "gemm_cpp" in cost.plan(KernelSpec.parse("k=8 x=bf16; n=4 w=f32 out=bf16 lora(r=2 f32 s=1.0)")).costs
    assert "gemm_cpp" not in cost.plan(KernelSpec.parse(f"k=8 x=bf16; {row}")).costs


def test_tables_and_programs_print_and_parse():
    table = PlanTable((("gemv_cpp", 24), ("gemm_accumulate", None)))
    assert str(table) == "gemv_cpp<=24, gemm_accumulate" and PlanTable.parse(str(table)) == table
    assert [table.pick(m) for m in (1, 24, 25, 10**9)] == ["gemv_cpp"] * 2 + ["gemm_accumulate"] * 2
    program = Program(table, SPEC)
    assert Program.parse(str(program)) == program


@pytest.mark.parametrize(
    "text", ["", "gemv_cpp<=3", "gemv_cpp<=3, gemv_cpp<=2, gemm_accumulate", "gemv_cpp, gemm_accumulate"]
)
def test_tables_that_leave_some_m_without_a_plan_are_refused(text):
    with pytest.raises(SpecError, match="not a plan table"):
        PlanTable.parse(text)
