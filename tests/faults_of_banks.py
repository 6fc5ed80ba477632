"""Faults of what banks add in kernels that are generated in C++."""

from __future__ import annotations

from tests.fault import A_RACE, Fault
from tests.faults_of_kernels import ENTRIES, ENTRY

NO_MODES = "the zoo's bank has no modes"

BANKS = {
    "another row's adapters": Fault(
        "codegen/banks.cpp",
        "key[t] = row(t / each)->same",
        "key[t] = row(t % rows)->same",
        f"{ENTRIES}_gemv[bank-1]",
        unproven="the zoo's bank has one row",
    ),
    "the adapters of the tile before": Fault(
        "codegen/banks.cpp",
        "if (bank.key[t0 + t] != key) turn",
        "if (key < 0) turn",
        f"{ENTRIES}_accumulate[bank-1]",
        unproven="the zoo's bank has one row",
    ),
    "the only adapter of all rows lost": Fault(
        "codegen/banks.cpp",
        "rank = use->adapters ? use->rb : 0, room",
        "rank = 0, room",
        f"{ENTRIES}_gemv_of_one_adapter[bank-3-1]",
        unproven="the zoo's bank has two adapters in its row",
    ),
    "a mixture taken for its first adapter": Fault(
        "codegen/banks.cpp",
        "plain && row(0)->adapters <= 1;",
        "plain;",
        f"{ENTRIES}_gemv_of_one_adapter[bank-3-1]",
        unproven="the zoo's bank has an adapter of DoRA's",
    ),
    "an adapter with a bias taken for a plain one": Fault(
        "codegen/banks.cpp",
        "plain &= use->ra == use->rb;",
        "plain &= !use->mode();",
        f"{ENTRIES}_gemv_of_one_adapter[bank-3-1]",
        unproven="the zoo's bank has two adapters in its row",
    ),
    "gate's bank asked for up's too": Fault(
        "codegen/cpp.py",
        "' && '.join(conditions)",
        "conditions[0]",
        f"{ENTRIES}_gemv_of_one_adapter[bank_swiglu-3-1]",
        unproven="the zoo's bank is beside no SwiGLU",
    ),
    "a bank's bias lost": Fault(
        "codegen/banks.cpp",
        "k == use.ra ? use.weight : 0;",
        "0;",
        f"{ENTRIES}_gemv[bank-1]",
    ),
    "DoRA's scale added as if it were a bias": Fault(
        "codegen/banks.cpp",
        "k == use.ra ? use.weight : 0;",
        "use.weight;",
        f"{ENTRIES}_gemv[bank-1]",
    ),
    "DoRA's scale of the first token for its tile": Fault(
        "codegen/banks.cpp",
        "if (t == 0 || bank.key[t0 + t] != bank.key[t0 + t - 1]) bank",
        "if (t == 0) bank",
        f"{ENTRIES}_gemv[bank-1]",
        unproven="the zoo's bank has one row",
    ),
    "DoRA scales what other adapters add": Fault(
        "codegen/cpp_parts.py",
        'terms.append(f"unless',
        'terms.insert(0, f"unless',
        f"{ENTRIES}_accumulate[bank_beside_lora-1]",
        unproven="the zoo's bank is beside no other adapter",
    ),
    "a mode that reads x in place of what the one before it made": Fault(
        "codegen/banks.cpp",
        "if (stage) token(line + at - mode.inputs()",
        "if (stage > 1) token(line + at - mode.inputs()",
        f"{ENTRIES}_gemv[bank-1]",
        unproven=NO_MODES,
    ),
    "a chain scaled at each of its modes": Fault(
        "codegen/banks.cpp",
        "scale = last ? use.scale : 1;",
        "scale = use.scale;",
        f"{ENTRIES}_accumulate[bank-1]",
        unproven=NO_MODES,
    ),
    "a stretch of a wide mode left out": Fault(
        "codegen/banks.cpp",
        "a = own % each * stretch;",
        "a = 0;",
        f"{ENTRIES}_gemv[bank_wide_modes-1]",
        unproven=NO_MODES,
        by="slow",
    ),
    "a chain of a bank that waits for nobody": Fault(
        ENTRY,
        """        *(f"      chain<K>(modes, {bank}, x, stage);" for bank in banks),
        "#pragma omp barrier",
""",
        """        *(f"      chain<K>(modes, {bank}, x, stage);" for bank in banks),
""",
        f"{ENTRIES}_everyone_waits_between_a_stage_and_what_reads_it",
        unproven=A_RACE,
    ),
}
