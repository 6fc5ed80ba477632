"""Faults of the kernels that are generated in Triton."""

from __future__ import annotations

from tests.fault import ON_GPUS, Fault

BANKS, BANK_MODES = "codegen/triton_banks.py", "codegen/triton_bank_modes.py"
GEMV, TILE, TEXT = "codegen/triton_gemv.py", "codegen/triton_tile.py", "codegen/triton_text.py"

NUMBERS = "tests/codegen/test_triton_numbers.py::test_numbers"
ORDER = "tests/codegen/test_triton_aot.py::test_all_threads_wait_before_u_is_told_and_before_it_is_read"

TRITON = {
    "Triton: two loops of a kernel that share a name": Fault(
        GEMV,
        'v[f"a{j}_cols"]',
        'v[f"cols{j}"]',
        "tests/codegen/test_triton_loops.py::test_loops_share_no_names[plain-gaws]",
        unproven=ON_GPUS,
    ),
    "Triton: u told before it is written": Fault(
        GEMV,
        "'tl.atomic_add(flag, 1, sem=\"release\")'",
        "'tl.atomic_add(flag, 1, sem=\"relaxed\")'",
        "tests/codegen/test_triton_aot.py::test_a_single_launch_releases_and_acquires",
        unproven=ON_GPUS,
    ),
    "Triton: threads do not wait for the one that has acquired": Fault(
        GEMV,
        '            "tl.debug_barrier()  # no thread reads before the one that counts has acquired",\n',
        "",
        ORDER,
        unproven=ON_GPUS,
    ),
    "Triton: told before all threads have written": Fault(
        GEMV,
        '            "tl.debug_barrier()  # all threads have written, before the one that counts releases",\n',
        "",
        ORDER,
        unproven=ON_GPUS,
    ),
    "Triton: nobody waits for u": Fault(
        GEMV,
        "        return self._wait(max([0, *last]))\n",
        "        return []\n",
        "tests/codegen/test_triton_aot.py::test_weights_stream_before_the_wait_and_u_is_read_after_it",
        unproven=ON_GPUS,
    ),
    "Triton: a mode of one row's adapter computed for all rows of a tile": Fault(
        BANK_MODES,
        "v.both_ok.let(v.mine[:, None] & v.row_ok[None, :])",
        "v.both_ok.let(v.token_ok[:, None] & v.row_ok[None, :])",
        f"{NUMBERS}[bank_modes_odd-m6]",
        unproven=ON_GPUS,
    ),
    "Triton: only the first modes of a bank's chains are waited for": Fault(
        GEMV,
        " + [b.longest - 2 for _, b, _ in self.banks()]",
        "",
        "tests/codegen/test_triton_bank_modes.py::test_each_stage_of_a_bank_s_chains_waits_for_the_one_before",
        unproven=ON_GPUS,
    ),
    "Triton: a counter not cleared": Fault(
        GEMV,
        "for flag in range(self.stages + 1)),",
        "for flag in range(self.stages)),",
        f"{NUMBERS}[qkv-m1]",
        unproven=ON_GPUS,
    ),
    "Triton: rows scaled after the bias": Fault(
        GEMV,
        '[*v.out.load(v.rowscale + v.rows, ok, p.rowscale.dtype, sign="*="), *added]',
        '[*added, *v.out.load(v.rowscale + v.rows, ok, p.rowscale.dtype, sign="*=")]',
        f"{NUMBERS}[rowscale-m1]",
        unproven=ON_GPUS,
    ),
    "Triton: scale not in a tile's u": Fault(
        TILE, "scaled(term, v.scale, v.acc)", "v.acc", f"{NUMBERS}[bank_odd-m6]", unproven=ON_GPUS
    ),
    "Triton: one token too many": Fault(
        TILE, "v.tokens < v.left)", "v.tokens < v.left + 1)", f"{NUMBERS}[bank_odd-m6]", unproven=ON_GPUS
    ),
    "Triton: the last block unmasked": Fault(
        TEXT,
        "        return self.size % self.block != 0\n",
        "        return self.size < self.block\n",
        "tests/codegen/test_triton_text.py::test_what_makes_no_whole_blocks_is_masked",
        unproven=ON_GPUS,
    ),
    "Triton: fp32 as tf32": Fault(
        TEXT,
        '[\'input_precision="ieee"\'] * (dtype == "f32")',
        '[] * (dtype == "f32")',
        "tests/codegen/test_triton_aot.py::test_fp32_is_never_tf32",
        unproven=ON_GPUS,
    ),
    "Triton: sigmoid of up": Fault(
        "codegen/triton_kernels.py",
        'fn("tl.sigmoid", v.gate)',
        'fn("tl.sigmoid", v.up)',
        f"{NUMBERS}[swiglu-m1]",
        unproven=ON_GPUS,
    ),
    "Triton: a bank's entry for all of a row's": Fault(
        BANKS,
        "        v.from_b.let(factor(v.use, 1) + v.first * BLOCK),\n        *v.bank_bs",
        "        v.from_b.let(factor(0, 1) + v.first * BLOCK),\n        *v.bank_bs",
        f"{NUMBERS}[bank-m1]",
        unproven=ON_GPUS,
    ),
    "Triton: a bank's bias lost": Fault(
        BANKS,
        "v.found.let(fn(\"tl.where\", rank.equals(v.ranks), v.weight, nothing)",
        "v.found.let(fn(\"tl.where\", rank.equals(v.ranks), nothing, nothing)",
        f"{NUMBERS}[bank-m1]",
        unproven=ON_GPUS,
    ),
    "Triton: a tile's first row for all of its tokens": Fault(
        BANKS,
        "v.mine.let(v.keys.equals(v.key) & v.token_ok)",
        "v.mine.let(v.token_ok)",
        f"{NUMBERS}[bank-m6]",
        unproven=ON_GPUS,
    ),
    "Triton: DoRA's scale lost in a tile": Fault(
        BANKS,
        "v.mine[:, None], v.acc * v.dora[None, :], Code(\"0.0\")",
        "v.mine[:, None], v.dora[None, :], Code(\"0.0\")",
        f"{NUMBERS}[bank-m6]",
        unproven=ON_GPUS,
    ),
    "Triton: a bank's later modes read what the first ones read": Fault(
        BANK_MODES,
        "fn(\"tl.where\", goes_on, v.place + 1, 0)",
        "fn(\"tl.where\", goes_on, v.place, 0)",
        f"{NUMBERS}[bank_modes_odd-m2]",
        unproven=ON_GPUS,
    ),
    "Triton: a bank's chain scaled by the entry before": Fault(
        BANK_MODES,
        "axis=1) * field(v.use, 4, \"f32\"), \"+=\")",
        "axis=1) * field(0, 4, \"f32\"), \"+=\")",
        f"{NUMBERS}[bank_modes_odd-m2]",
        unproven=ON_GPUS,
    ),
    "Triton: a mode of a bank taken for a block of ranks": Fault(
        BANKS,
        "when(has_ranks(term, v.use)[0], body) if term.longest else body",
        "body",
        f"{NUMBERS}[bank_modes-m6]",
        unproven=ON_GPUS,
    ),
    "Triton: what a mode of a bank's chain takes, without its slice": Fault(
        BANK_MODES,
        "numbers // (v.apart * v.high) * (v.apart * v.wide) + numbers % v.apart",
        "numbers % v.apart",
        f"{NUMBERS}[bank_modes-m6]",
        unproven=ON_GPUS,
    ),
    "Triton: G's rows past their slice": Fault(
        "codegen/triton_modes.py",
        "owned = (v.row // p.rows).equals(slice_)",
        "owned = v.row // p.rows < slice_ + 1",
        f"{NUMBERS}[gaws_crossing-m17]",
        unproven=ON_GPUS,
    ),
    "counters that two streams share": Fault(
        "runtime/gpu.py",
        "(index, torch.cuda.current_stream(device).cuda_stream)",
        "(index, 0)",
        "tests/runtime/test_gpu.py",
        unproven=ON_GPUS,
    ),
    "counters given away twice in a graph": Fault(
        "runtime/gpu.py", "                block.taken += size\n", "", "tests/runtime/test_gpu.py", unproven=ON_GPUS
    ),
}
