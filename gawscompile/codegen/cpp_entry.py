"""What the entry points of a group share in the C++ emitter: arguments, memory and banks of a call, and u = s A x."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gawscompile.codegen import cpp_packed as packed
from gawscompile.codegen.cpp_modes import Scratch, step_code, work
from gawscompile.codegen.cpp_parts import Parts, scale_of
from gawscompile.codegen.cpp_types import CPP_TYPES
from gawscompile.ir.spec import KernelSpec, Operand


def entry(
    name: str,
    spec: KernelSpec,
    ranks: Scratch,
    x: bool,
    bases: bool,
    ys: list[str],
    body: list[str],
    memory: Sequence[str] = (),
) -> list[str]:
    """An entry point, whose threads all run `body`. It reads x where `x` says so, and all operands, those of bases
    where `bases` says so. It writes `ys`, and `memory` are the lines that reserve what else it needs."""
    types = [CPP_TYPES[p.out] for p in (*spec.projections, spec.projections[0])]
    read = [(at, o) for at, o in enumerate(spec.operands()) if bases or not o.of_base]
    return [
        f'extern "C" void {name.format("int64_t m, const void* x_, const void* const* in, void* const* out")} {{',
        *["  const X* x = (const X*)x_;"] * x,
        *[argument(at, o) for at, o in read],
        *(packed.weights(spec) if bases else []),
        *[f"  {dtype}* {y} = ({dtype}*)out[{at}];" for at, (dtype, y) in enumerate(zip(types, ys, strict=False))],
        *["  static thread_local Buffer scratch;  // of the calling thread"] * bool(ranks.width),
        *["  float* u = scratch.of(m * LDU);"] * bool(ranks.width),
        *_products(spec),
        *memory,
        "#pragma omp parallel",
        "  {",
        "    const int64_t id = omp_get_thread_num(), threads = omp_get_num_threads();",
        *_scheduled(spec),
        *body,
        "  }",
        "}",
    ]


def argument(at: int, operand: Operand) -> str:
    """The pointer to `operand`, the entry point's input number `at`."""
    dtype = CPP_TYPES[operand.dtype]
    return f"  const {dtype}* {operand.name} = (const {dtype}*)in[{at}];"


def banks_of(spec: KernelSpec) -> dict[str, str]:
    """The names of a group's banks, with what the names of their operands end with."""
    return {f"bank{i}": str(i) for i, p in enumerate(spec.projections) if p.banked}


def _products(spec: KernelSpec) -> list[str]:
    """Memory for what the threads share of banks, u = A x and what modes make."""
    sizes = [f"Bank(pool{end}, schedule{end}, m).numbers(m)" for end in banks_of(spec).values()]
    lines = [
        "  static thread_local Buffer products;  // of the calling thread",
        f"  float* const shared = products.of({' + '.join(sizes)});",
    ]
    return lines if sizes else []


def _scheduled(spec: KernelSpec) -> list[str]:
    """What each bank adds in this call. Every thread reads that for itself: to fetch what another thread has just
    written takes longer."""
    banks = banks_of(spec)
    integers = " + ".join(f"{bank}.integers(m)" for bank in banks)
    lines = [
        *(f"    Bank {bank}(pool{end}, schedule{end}, m);" for bank, end in banks.items()),
        "    static thread_local Buffer some;",
        "    Buffer many;  // given back, where tokens are very many",
        f"    const int64_t wanted = {integers};",
        "    int32_t* integers = (int32_t*)(wanted <= KEPT ? some : many).of(wanted);",
        "    float* numbers = shared;",
        *(f"    {bank}.place(numbers, integers, m);" for bank in banks),
    ]
    return lines if banks else []


def shrunk(spec: KernelSpec, ranks: Scratch, parts: Parts) -> list[str]:
    """u = s A x and first mode products, split over all threads by blocks of rows times tiles of tokens; then everyone
    waits; then second mode products, and so on."""
    banks = banks_of(spec)
    if not ranks.width and not banks:
        return []
    lines = []
    for number in range(max(1, len(ranks.phases))):
        steps = ranks.phases[number] if number < len(ranks.phases) else []
        terms = [(i, j, t) for i, p in enumerate(spec.projections) for j, t in enumerate(p.lowrank) if number == 0]
        # costs in multiplications of a block of rows
        unit = "K" if steps or banks else "1"
        costs = [f"blocks({t.rank}, ROWS) * {unit}" if unit == "K" else f"blocks({t.rank}, ROWS)" for _, _, t in terms]
        costs += ["{} * {}".format(*work(step)) for step in steps]
        name = f"phase{number}"
        total = f"({' + '.join(costs)}) * blocks(m, TILE)" if costs else ""
        if number == 0 and banks:
            total = " + ".join([*[total] * bool(total), *(f"{bank}.cost(K)" for bank in banks)])
        lines.append(f"    Share {name}({total}, id, threads);")
        for i, j, term in terms:
            scale = scale_of(term, i, j)
            own = f"{term.rank}, a{i}_{j}, x, {scale}, u + {ranks.offsets[i, j]}{parts.seen(f'a{i}_{j}')}"
            lines.append(f"    low_rank<even({term.rank}), K, LDU>({name}, {unit}, m, {own});")
        first = banks if number == 0 else {}
        lines += [f"    shrink<K>({name}, {bank}, x);" for bank in first]
        lines += [f"    chain<K>({name}, {bank}, x, 0);" for bank in first]
        lines += [step_code(step, name) for step in steps]
        lines.append("#pragma omp barrier")
    lines += _later_modes(banks)
    if not ranks.width:  # a bank may have nothing to add
        lines = [f"    if ({' || '.join(f'{bank}.adds()' for bank in banks)}) {{", *lines, "    }"]
    return lines


def _later_modes(banks: Collection[str]) -> list[str]:
    """What is left of the chains of modes in banks: how long they are, a call's schedule says."""
    if not banks:
        return []
    return [
        f"    for (int64_t stage = 1; {' || '.join(f'stage < {bank}.stages' for bank in banks)}; ++stage) {{",
        f"      Share modes({' + '.join(f'{bank}.chained(stage)' for bank in banks)}, id, threads);",
        *(f"      chain<K>(modes, {bank}, x, stage);" for bank in banks),
        "#pragma omp barrier",
        "    }",
    ]
