"""Operands that are hoisted follow their sources, whatever is written to these and however: every byte counts."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
import torch

from gawscompile.codegen import build
from gawscompile.codegen.cpp_sums import CHECKSUM
from gawscompile.ir.recipe import hoisted, write
from gawscompile.ir.spec import KernelSpec
from gawscompile.planning.table import Derived, PlanTable, Program
from gawscompile.runtime import ops
from tests.codegen.problems import Problem

aten = torch.ops.aten

GEMV_MAX = 40
TABLE = PlanTable((("gemv_cpp", GEMV_MAX), ("gemm_accumulate", None)))
TOKENS = (1, 2, 3, 5, 6, 7, 13, 40, 41)  # the last where the library multiplies
SPECS = {
    "odd": "k=37 x=f32; n=13 w=f32 out=f32 rowscale=f32 lora(r=3 f32 s=2.0)",
    "halves": "k=70 x=bf16; n=21 w=bf16 out=bf16 rowscale=f32 lora(r=5 f32 s=1.0); "
    "n=44 wt=bf16 out=bf16 rowscale=f32 lora(r=6 bf16 s=1.0)",
    "wide": "k=300 x=f32; n=1100 wt=f32 out=f32 rowscale=f32 lora(r=5 f32 s=2.0)",
    "gated": "k=64 x=f32 swiglu; n=50 w=f32 out=f32 rowscale=f32 lora(r=64 f32 s=1.0); "
    "n=50 w=f32 out=f32 rowscale=f32 lora(r=4 f16 s=1.0)",
}


def recipe(transposed: bool) -> str:
    """DoRA's: magnitude / norm of the rows of W + B A."""
    graph = torch.fx.Graph()
    w, a, b, magnitude = (graph.placeholder(name) for name in ("w", "a", "b", "magnitude"))
    nodes = []

    def call(function, *inputs):
        nodes.append(graph.call_function(function, inputs))
        return nodes[-1]

    def wide(t):
        return call(torch.ops.prims.convert_element_type.default, t, torch.float32)

    rows = call(aten.permute.default, w, [1, 0]) if transposed else w
    total = call(aten.add.Tensor, wide(rows), call(aten.mm.default, wide(b), wide(a)))
    norm = call(aten.linalg_vector_norm.default, total, 2, [1])
    call(aten.div.Tensor, magnitude, norm)
    return write(nodes, [w, a, b, magnitude])


class Group:
    """A group whose row scales are hoisted, with tensors of its own."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.spec = KernelSpec.parse(SPECS[name])
        self.operands = Problem.of(SPECS[name], 1, seed).operands
        kept = [o for o in self.spec.operands() if o.role != "rowscale"]
        names = [o.name for o in kept]
        self.magnitudes = {f"rowscale{i}": torch.rand(p.n) + 0.5 for i, p in enumerate(self.spec.projections)}
        derived = []
        for at, operand in enumerate(self.spec.operands()):
            if operand.role == "rowscale":
                i = operand.projection
                own = [names.index(name) for name in (f"w{i}", f"a{i}_0", f"b{i}_0")]
                text = recipe(self.spec.projections[i].transposed)
                derived.append(Derived(at, (*own, len(kept) + i), text))
        self.program = Program(TABLE, self.spec, derived=tuple(derived))
        self.names = names

    @property
    def sources(self) -> dict[str, torch.Tensor]:
        return {name: self.operands[name] for name in self.names} | self.magnitudes

    def check(self, m: int = 1) -> None:
        """The op's answer for m tokens is that of the sources as they are."""
        x = torch.randn(m, self.spec.k, generator=torch.Generator().manual_seed(m)).to(self.operands["w0"].dtype)
        current = dict(self.operands)
        for d in self.program.derived:
            scale = hoisted(d.recipe, [list(self.sources.values())[source] for source in d.sources])
            current[list(self.spec.operands())[d.operand].name] = scale
        problem = Problem.with_operands(self.spec, x, current)
        problem.check(torch.ops.gaws.project(x, list(self.sources.values()), str(self.program)))


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    ops.ensure_loaded()
    ops.build_all(str(Group(name).program) for name in SPECS)


@pytest.fixture
def derived(monkeypatch) -> list[str]:
    """The recipes that were followed."""
    found: list[str] = []

    def noted(text, sources):
        found.append(text)
        return hoisted(text, sources)

    monkeypatch.setattr(ops, "hoisted", noted)
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SPECS)
def test_gemv_says_the_same_of_its_operands_as_the_op(name, derived, threads):
    """Computed once: whoever takes the checksum, by whatever share of the rows."""
    group = Group(name)
    summed = [operand.name for _, operand in group.program.summed]
    assert summed == group.names
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        for m in TOKENS:
            group.check(m)
    assert len(derived) == len(group.spec.projections)


def one_number(t):
    t.view(-1)[t.numel() // 2] += 1


def first_number(t):
    t.view(-1)[0] += 1


def last_number(t):
    t.view(-1)[-1] += 1


def one_row(t):
    t[t.shape[0] // 2] *= 40


def last_row(t):
    t[-1] *= 40


def two_rows_swapped(t):
    t[[0, 2]] = t[[2, 0]]


def swapped_within_a_row(t):
    row = t.view(-1, t.shape[-1])[0]
    row[[0, 1]] = row[[1, 0]]


def two_signs(t):
    t.view(-1)[:2] *= -1


def negated(t):
    t.neg_()


CHANGES = (
    *(one_number, first_number, last_number, one_row, last_row),
    *(two_rows_swapped, swapped_within_a_row, two_signs, negated),
)


def through_data(t, change):
    change(t.data)


def through_numpy(t, change):
    change(t.detach().view(torch.int16 if t.element_size() == 2 else t.dtype).numpy())


@pytest.mark.parametrize("m", [1, 7, 41])
@pytest.mark.parametrize("name", ["odd", "halves"])
def test_every_number_of_every_source_counts(name, m, derived):
    group = Group(name)
    group.check(m)
    for source, t in group.sources.items():
        for change in CHANGES:
            derived.clear()
            change(t.data)
            group.check(m)
            group.check(m)
            assert len(derived) == 1, f"{change.__name__} of {source}"


def test_a_write_by_numpy_or_another_thread_shows(derived):
    group = Group("odd")
    group.check()
    for t in group.sources.values():
        derived.clear()
        t.numpy()[2] *= 3
        group.check()
        other = threading.Thread(target=lambda t=t: t.data.mul_(-1.5))
        other.start()
        other.join()
        group.check()
        assert len(derived) == 2


def test_tensors_of_inference_mode_have_no_version(derived):
    with torch.inference_mode():
        group = Group("gated")
        assert all(t.is_inference() for t in group.sources.values())
        group.check()
        derived.clear()
        group.operands["w0"][3] *= 40
        group.check()
        group.operands["b1_0"][3] *= 40
        group.check()
        assert len(derived) == 2


def test_sources_that_are_not_contiguous(derived):
    group = Group("odd")
    for name in ("w0", "a0_0", "b0_0"):
        group.operands[name] = group.operands[name].T.contiguous().T
    group.check()
    group.check()
    assert len(derived) == 1
    group.operands["w0"].data[4] *= 3
    group.check()
    assert len(derived) == 2


def test_threads_with_sources_of_their_own_share_a_program():
    groups = [Group("odd", seed) for seed in range(6)]
    failures: list[BaseException] = []

    def work(group: Group) -> None:
        try:
            for turn in range(20):
                group.operands["w0"].data[turn % 13] *= -1.1
                group.magnitudes["rowscale0"].data[turn % 13] += 0.1
                group.check(1 + turn % 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(("source", "shape", "named"), [("w0", (14, 37), "w0"), ("rowscale0", (1, 13), "rowscale0")])
def test_sources_of_another_shape_are_an_error_that_names_the_operand(source, shape, named):
    group = Group("odd")
    group.check()
    (group.magnitudes if source in group.magnitudes else group.operands)[source] = torch.randn(shape)
    with pytest.raises(RuntimeError, match=f"operand {named} no longer"):
        torch.ops.gaws.project(torch.randn(1, 37), list(group.sources.values()), str(group.program))


def test_no_tokens():
    group = Group("odd")
    (out,) = torch.ops.gaws.project(torch.randn(0, 37), list(group.sources.values()), str(group.program))
    assert out.shape == (0, 13)


def test_programs_say_what_is_derived():
    program = Group("halves").program
    assert Program.parse(str(program)) == program
    assert "uint64_t* sums)" in program.sources()["kernel.cpp"]
    plain = Program(TABLE, program.spec)
    text = plain.sources()["kernel.cpp"]
    assert not plain.summed and "* sums" not in text and "Checksum" not in text
    library = Program(PlanTable((("gemm_accumulate", None),)), program.spec, derived=program.derived)
    assert not library.summed


WRAPPED = (
    CHECKSUM
    + """
extern "C" uint64_t checksum(const char* data, int64_t bytes, int64_t unit, int64_t first) {
  Checksum sum;
  for (int64_t at = first * unit; at < bytes; at += unit)
    sum.add(data + at, at + unit < bytes ? unit : bytes - at, at / unit);
  return sum.folded();
}
extern "C" uint64_t one(const char* data, int64_t bytes, int64_t number) {
  Checksum sum;
  sum.add(data, bytes, number);
  return sum.folded();
}
"""
)


@pytest.fixture(scope="module", params=["", "defined(__VAES__)", "defined(__AES__)"])
def library(request) -> ctypes.CDLL:
    """The checksum of this machine, and those of machines that lack an instruction."""
    found = build.load(WRAPPED.replace(request.param, "0") if request.param else WRAPPED)
    found.checksum.restype = found.one.restype = ctypes.c_uint64
    return found


def number(library: ctypes.CDLL, t: torch.Tensor, unit: int = 1 << 14) -> int:
    bytes_of = t.numel() * t.element_size()
    given = (ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(bytes_of), ctypes.c_int64(unit), ctypes.c_int64(0))
    return int(library.checksum(*given))


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 63, 64, 65, 200, 1000, 5000])
def test_a_checksum_sees_signs_order_and_place(library, count):
    t = torch.randn(count, generator=torch.Generator().manual_seed(count))
    seen = {number(library, t)}
    variants = []
    for at in {0, count // 2, count - 1}:
        for bit in range(32):
            other = t.clone()
            other.view(torch.int32)[at] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            variants.append(other)
    variants += [-t, t.flip(0)] if count > 1 else [-t]
    for a in range(0, count - 1, 1 + count // 40):
        for b in {a + 1, min(a + 16, count - 1), min(a + 64, count - 1), count - 1} - {a}:
            swapped, signs = t.clone(), t.clone()
            swapped[[a, b]] = t[[b, a]]
            signs[[a, b]] *= -1
            variants += [swapped, signs]
    seen |= {number(library, other) for other in variants}
    distinct = len({tuple(other.view(torch.int32).tolist()) for other in variants})
    assert len(seen) == 1 + distinct


def test_a_checksum_is_a_sum_of_units(library):
    t = torch.randn(1003)
    bytes_of, unit = 4 * 1003, 300
    parts = [
        int(library.one(ctypes.c_void_p(t.data_ptr() + at), ctypes.c_int64(min(unit, bytes_of - at)),
                        ctypes.c_int64(at // unit)))
        for at in range(0, bytes_of, unit)
    ]  # fmt: skip
    assert sum(reversed(parts)) % 2**64 == number(library, t, unit)
