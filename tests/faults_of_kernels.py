"""Faults of the kernels that are generated in C++."""

from __future__ import annotations

from tests.fault import A_RACE, FEW_TOKENS, Fault

ENTRY, PARTS, MODES = "codegen/cpp_entry.py", "codegen/cpp_parts.py", "codegen/cpp_modes.py"

PACKED = "tests/codegen/test_packed.py::test"
STEPS = "the zoo has no packed weight with groups of 64 columns for an x of bf16"
ENTRIES = "tests/codegen/test_cpp.py::test"
SWIGLU = "tests/runtime/test_ops.py::test_swiglu_leaves_one_output"
ROUNDING = f"{ENTRIES}_numbers_are_rounded_to_the_nearest"

KERNELS = {
    # --- C++: panels --------------------------------------------------------------------------------------------
    "a stripe's second half ended as its first": Fault(
        "codegen/panels.cpp", "halves(Int<2>{}, second)", "halves(Int<2>{}, first)", f"{ENTRIES}_gemm[plain-1]",
        unproven=FEW_TOKENS,
        needs="avx512",
    ),
    "the first part of k lost": Fault(
        "codegen/panels.cpp", "from == 0, K", "true, K", f"{ENTRIES}_gemm[deep-1]", unproven=FEW_TOKENS
    ),
    "x of the tokens before": Fault(
        "codegen/panels.cpp",
        "x + (lo + t) * K",
        "x + t * K",
        f"{ENTRIES}_gemm[deep-7]",
        unproven=FEW_TOKENS,
    ),
    "a stripe that nobody takes": Fault(
        "codegen/panels.cpp", "total * (of + 1) / threads;", "total * (of + 1) / threads - (of > 0);",
        f"{ENTRIES}_gemm[qkv-2]", unproven=FEW_TOKENS,
    ),
    "ΔW of the first columns in every panel": Fault(
        "codegen/panels.cpp", "a + j * K + from;", "a + j * K;", f"{ENTRIES}_gemm[deep-1]", unproven=FEW_TOKENS
    ),
    "ΔW in the panel, and B u too": Fault(
        "codegen/panels.cpp",
        "if (!folded) term(sums, t);",
        "term(sums, t);",
        f"{ENTRIES}_gemm[ranks_17_and_64-1]",
        unproven=FEW_TOKENS,
    ),
    "a mixture in the panel, and B u too": Fault(
        "codegen/banks.cpp",
        "none(folded || !bank.room)",
        "none(!bank.room)",
        f"{ENTRIES}_gemm_of_one_mixture[bank]",
        unproven=FEW_TOKENS,
    ),
    "x widened by others read too early": Fault(
        "codegen/cpp.py",
        "if ranks.width else [barrier]",
        "",
        f"{ENTRIES}_gemm_without_active_adapters_waits_for_x",
        unproven=FEW_TOKENS,
    ),
    "tokens after the first in fp32 are not multiplied": Fault(
        "codegen/cpp.py",
        '        "    queue.clear(id);",\n',
        "",
        f"{ENTRIES}_gemm_of_wide_rows",
        unproven=FEW_TOKENS,
    ),
    "the first row's mixture for all rows": Fault(
        "codegen/banks.cpp",
        "plain &= row(r)->same == 0;",
        "",
        f"{ENTRIES}_gemm_of_one_mixture[bank]",
        unproven=FEW_TOKENS,
    ),
    # --- C++: weights kept as codes -----------------------------------------------------------------------------
    "a zero's sign": Fault(
        "codegen/packed.cpp",
        "scale(s), shift(-z * s) {}",
        "scale(s), shift(z * s) {}",
        f"{PACKED}_kernels_against_fp64[int8-f32-gemv]",
    ),
    "a row's half of a byte is the other row's": Fault(
        "codegen/packed.cpp",
        "const int shift = upper ? 4 : 0;",
        "const int shift = upper ? 0 : 4;",
        f"{PACKED}_kernels_against_fp64[uint4_halves-f32-gemv]",
    ),
    "the scales of the group before": Fault(
        "codegen/packed_dots.cpp",
        "groups[r] = w.group(row + r, g);",
        "groups[r] = w.group(row + r, g ? g - 1 : 0);",
        f"{PACKED}_kernels_against_fp64[given-gemv]",
    ),
    "a scale that waits for its row's sum is forgotten": Fault(
        "codegen/packed_dots.cpp",
        "acc[r][t] = acc[r][t] * F(w.scales.at(row + r, 0));",
        "acc[r][t] = acc[r][t];",
        f"{PACKED}_kernels_against_fp64[int8-f32-gemv]",
    ),
    "a scale that waits is forgotten where the library multiplies": Fault(
        "codegen/packed_dots.cpp",
        "v = {v.lo * s, v.hi * s};",
        "v = {v.lo, v.hi};",
        f"{PACKED}_kernels_against_fp64[int8-f32-gemm]",
        library=True,
    ),
    "scales of scales in larger blocks": Fault(
        "codegen/packed.cpp",
        "levels[codes[i]] * outer[i / 256]",
        "levels[codes[i]] * outer[i / 512]",
        f"{PACKED}_the_second_level_of_scales_has_more_than_one_block",
        unproven="the zoo has no scales that are coded",
    ),
    "negative codes of 8 bits as bf16's dot products take them": Fault(
        "codegen/packed.cpp",
        "word(0x0080), word(0xc300)",
        "word(0x0000), word(0xc300)",
        f"{PACKED}_kernels_against_fp64[int8-bf16-steps-gemv]",
        unproven=STEPS,
        by="slow",
        needs="avx512_bf16",
    ),
    "a zero's sign beside a group's sum": Fault(
        "codegen/packed_dots.cpp",
        "g, count), F(-1.f), shift)",
        "g, count), F(1.f), shift)",
        f"{PACKED}_kernels_against_fp64[uint8-bf16-steps-gemv]",
        unproven=STEPS,
        by="slow",
        needs="avx512_bf16",
    ),
    "a vector of scales over the end of a block of scales": Fault(
        "codegen/packed.cpp",
        "wide[j] = outer[(i + j) / 256];",
        "wide[j] = outer[i / 256];",
        f"{PACKED}_kernels_against_fp64[groups-gemv]",
        unproven="the zoo has no scales that are coded",
        needs="avx2 alone",
    ),
    "the lower rows of halves written as upper ones": Fault(
        "codegen/projections.cpp",
        "line += part * m * ldz - row;",
        "line -= row;",
        f"{PACKED}_kernels_against_fp64[uint4_halves-f32-gemv]",
    ),
    "a gate let through by itself": Fault(
        "codegen/cpp.py",
        "z[0] + row, z[1] + row, ldz",
        "z[0] + row, z[0] + row, ldz",
        f"{PACKED}_kernels_against_fp64[swiglu-blocks-gemv]",
        unproven="the zoo's gate is kept by rows",
    ),
    "a zero's sign beside the sums of halves": Fault(
        "codegen/packed.cpp",
        "(s * w.zeros.at(row + r, g, V) * F(-1.f / V)).store",
        "(s * w.zeros.at(row + r, g, V) * F(1.f / V)).store",
        f"{PACKED}_kernels_against_fp64[groups-f16-gemv]",
        unproven="the zoo has no halves for an x of 16 bits",
    ),
    "halves of a word in each other's place": Fault(
        "codegen/packed_orders.cpp",
        "numbers[i] = x[4 * i + byte];",
        "numbers[i] = x[4 * i + 3 - byte];",
        f"{PACKED}_kernels_against_fp64[groups-f16-gemv]",
        unproven="the zoo has no halves for an x of 16 bits",
    ),
    "odd columns for even ones where levels are looked up by bytes": Fault(
        "codegen/packed_orders.cpp",
        "vector / 2 * 8 + within) + i / 32;",
        "vector / 2 * 8 + within) + 1 - i / 32;",
        f"{PACKED}_kernels_against_fp64[groups-f16-gemv]",
        unproven="the zoo has no pairs",
        needs="avx2 alone",
    ),
    "a group's scale for all that follow": Fault(
        "codegen/packed_dots.cpp",
        "F(lines.scale[first + r][g]), a);",
        "F(lines.scale[first + r][0]), a);",
        f"{PACKED}_kernels_against_fp64[groups-f16-gemv]",
        unproven="the zoo has no pairs",
        needs="avx2 alone",
    ),
    "odd columns for even ones among whole numbers": Fault(
        "codegen/packed_orders.cpp",
        "i / 16 % 2 * 8 + i % 8) + i / 32]",
        "i / 16 % 2 * 8 + i % 8) + 1 - i / 32]",
        f"{PACKED}_kernels_against_fp64[groups-gemv]",
        unproven="the zoo has no pairs",
        needs="avx2 alone",
    ),
    "odd bytes for even ones among whole numbers": Fault(
        "codegen/packed_orders.cpp",
        "_mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8)",
        "_mm256_packs_epi32(lo, hi)",
        f"{PACKED}_kernels_against_fp64[groups-gemv]",
        unproven="the zoo has no groups of 64 columns for an x in bf16",
        needs="avx2 alone",
    ),
    "the lower bytes of whole numbers have no sign": Fault(
        "codegen/packed_orders.cpp",
        "_mm256_add_epi32(wholes, _mm256_set1_epi32(128))",
        "wholes",
        f"{PACKED}_kernels_against_fp64[groups-gemv]",
        unproven="the zoo has no groups of 64 columns for an x in bf16",
        needs="avx2 alone",
    ),
    "weights with orders of their own share an x of whole numbers": Fault(
        "codegen/packed_tiles.cpp",
        "W::GROUP, I>(found, 1)",
        "W::GROUP>(found, 1)",
        f"{PACKED}_kernels_against_fp64[ordered-groups-gemv]",
        unproven="the zoo has no tiles",
        needs="avx2 alone",
    ),
    "a lone token's rows of tiles in another order": Fault(
        "codegen/packed_tiles.cpp",
        "_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));",
        "first, second);",
        "tests/codegen/test_packed.py::test_an_x_of_16_bits_loses_little_beside_a_large_number",
        unproven="the zoo has no tiles",
        needs="avx2 alone",
    ),
    "what whole numbers leave of a lone token's small ones is lost": Fault(
        "codegen/packed_tiles.cpp",
        "        if (x.finer[step] == 0) continue;\n",
        "        continue;\n",
        "tests/codegen/test_packed.py::test_an_x_of_16_bits_loses_little_beside_a_large_number",
        unproven="the zoo has no tiles",
        needs="avx2 alone",
    ),
    "what whole numbers leave of small ones is lost to halves": Fault(
        "codegen/packed_rows.cpp",
        "if (x.any) [[unlikely]]",
        "if (false)",
        "tests/codegen/test_packed.py::test_an_x_of_16_bits_loses_little_beside_a_large_number",
        unproven="the zoo has no groups of 64 columns for an x in bf16",
        needs="avx2 alone",
    ),
    "what whole numbers leave of small ones is lost": Fault(
        "codegen/packed_dots.cpp",
        "        any = true;\n",
        "",
        "tests/codegen/test_packed.py::test_an_x_of_16_bits_loses_little_beside_a_large_number",
        unproven="the zoo has no pairs",
        needs="avx2 alone",
    ),
    "codes that are looked up are one less than they stand for": Fault(
        "codegen/packed_tiles.cpp",
        "_mm512_set1_epi32(8)))); }",
        "_mm512_set1_epi32(9)))); }",
        f"{PACKED}_kernels_against_fp64[int4_tiles64-f32-gemv]",
        unproven="the zoo has no tiles",
        needs="avx512",
    ),
    "rows of tiles lie in another order where columns are paired": Fault(
        "codegen/packed_tiles.cpp",
        "_mm512_shuffle_f32x4(lo, hi, 0xee) : _mm512_shuffle_f32x4(lo, hi, 0x44)",
        "hi : lo",
        f"{PACKED}_kernels_against_fp64[int4_tiles64-bf16-steps-gemv]",
        unproven="the zoo has no tiles",
        needs="avx512_bf16",
    ),
    "codes of tiles are eight more than they stand for": Fault(
        "codegen/packed_tiles.cpp",
        "        if (!FULL) added[c] = fmadd(F(-8.f), s[c], added[c]);\n",
        "",
        f"{PACKED}_kernels_against_fp64[ordered-gemv]",
        unproven="the zoo has no tiles",
    ),
    "a weight with an order reads x as it comes": Fault(
        "codegen/packed_tiles.cpp",
        "const int64_t from = feature<K>(order[k]);",
        "const int64_t from = k;",
        f"{PACKED}_kernels_against_fp64[ordered-gemv]",
        unproven="the zoo has no tiles",
    ),
    "the last of two features that are one": Fault(
        "codegen/packed_tiles.cpp",
        "T(float(out[row * W::K + to]) + number);",
        "T(number);",
        f"{PACKED}_kernels_against_fp64[ordered-gemm]",
        unproven="the zoo has no tiles",
        library=True,
    ),
    "a block's scales of the rows 16 further up": Fault(
        "codegen/packed_rows.cpp",
        "const F s = scale(row + 16 * half, g);\n        for (int t = 0; t < T; ++t) {",
        "const F s = scale(row, g);\n        for (int t = 0; t < T; ++t) {",
        f"{PACKED}_kernels_against_fp64[table4_blocks-f32-gemv]",
        unproven="the zoo has no weight in blocks",
        needs="avx512",
    ),
    # --- C++: templates -----------------------------------------------------------------------------------------
    "tail of a dot product dropped": Fault(
        "codegen/prelude.cpp",
        "  if constexpr (WHOLE < N) step(WHOLE, N - WHOLE);\n",
        "",
        f"{ENTRIES}_gemv[odd_everything-1]",
    ),
    "a lone token's second line is the first again": Fault(
        "codegen/prelude.cpp",
        "line(place, k + place * EACH);",
        "line(place, k);",
        f"{ENTRIES}_gemv[plain-1] {ENTRIES}_gemv[deep-1]",
        unproven="the zoo has no lone token",
    ),
    "last row off by one": Fault(
        "codegen/prelude.cpp",
        "for (int64_t r = row; r < n; ++r) f(Int<1>{}, r);",
        "for (int64_t r = row; r < n - 1; ++r) f(Int<1>{}, r);",
        f"{ENTRIES}_gemv[odd_everything-1]",
    ),
    "two of four tokens left out": Fault(
        "codegen/prelude.cpp",
        "for (; t + 4 <= hi; t += 4) f(Int<4>{}, t);",
        "for (; t + 4 <= hi; t += 4) f(Int<2>{}, t);",
        f"{ENTRIES}_accumulate[qkv-1]",
        library=True,
        needs="avx512",
    ),
    "a thread leaves out the first block of its share": Fault(
        "codegen/prelude.cpp",
        "lo <= base ? 0 : at(lo)",
        "lo <= base ? 0 : at(lo) + 1",
        f"{ENTRIES}_gemv[qkv-2]",
    ),
    "a Conv1D weight's tail of rows left out": Fault(
        "codegen/prelude.cpp",
        "      run(Int<1>{});\n",
        "",
        f"{ENTRIES}_gemv[conv1d-1]",
    ),
    "silu's sign": Fault(
        "codegen/swiglu.cpp",
        "v / (F(1) + exp(v.neg()))",
        "v / (F(1) + exp(v))",
        SWIGLU,
    ),
    "cut off where it is to be rounded": Fault(
        "codegen/vectors.cpp",
        "_mm512_set1_epi32(0x7fff)",
        "_mm512_set1_epi32(0)",
        ROUNDING,
        needs="avx512",
        unproven="half an ulp is within what rounding allows",
    ),
    "ties of a lone number not to even": Fault(
        "codegen/vectors.cpp",
        "wide + 0x7fff + (wide >> 16 & 1)",
        "wide + 0x8000",
        ROUNDING,
        unproven="half an ulp is within what rounding allows",
    ),
    "a NaN becomes infinite": Fault(
        "codegen/vectors.cpp",
        "nan = _mm512_set1_epi32(0xffff)",
        "nan = _mm512_set1_epi32(0x7f80)",
        ROUNDING,
        needs="avx512",
        unproven="a proof's numbers are finite",
    ),
    "G's rows in another order": Fault(
        "codegen/modes.cpp",
        "dot<I>(acc, g + row * I, from + s0 * I, I);",
        "dot<I>(acc, g + (O - R - row) * I, from + s0 * I, I);",
        f"{ENTRIES}_gemv[gaws-1]",
    ),
    "slices turned the wrong way": Fault(
        "codegen/modes.cpp",
        "float(x[t * ldx + (b * I + i) * A + a])",
        "float(x[t * ldx + (b * A + a) * I + i])",
        f"{ENTRIES}_gemv[gawsd-1]",
    ),
    "scale not in the kernel": Fault(
        "codegen/projections.cpp", "scale * sum(acc[r][t])", "sum(acc[r][t])", f"{ENTRIES}_gemv[qkv-1]"
    ),
    "residual lost by the last rows": Fault(
        "codegen/projections.cpp",
        "v += load_as(v, p + t * ld + row, count...);",
        "if (sizeof v > 4 || !ld) v += load_as(v, p + t * ld + row, count...);",
        f"{ENTRIES}_gemv[odd_everything-1]",
    ),
    "the end of silu(gate) * up left out": Fault(
        "codegen/swiglu.cpp", "    if (c < count) {", "    if (c > count) {", SWIGLU
    ),
    "half of B u missing where the library multiplies": Fault(
        "codegen/projections.cpp",
        "fmadd(b.hi, ut, acc[t].hi)",
        "acc[t].hi",
        f"{ENTRIES}_accumulate[qkv-1]",
        library=True,
    ),
    # --- C++: what is printed -----------------------------------------------------------------------------------
    "u read from the first term": Fault(
        PARTS,
        'f"u + {self._ranks.offsets[i, j]}")',
        '"u")',
        f"{ENTRIES}_gemv[two_adapters-1]",
    ),
    "rows scaled after the bias": Fault(
        PARTS,
        "*self._scale(i), *self._epilogue(i)]",
        "*self._epilogue(i), *self._scale(i)]",
        f"{ENTRIES}_gemv[rowscale-1]",
    ),
    "nobody waits for u": Fault(
        ENTRY,
        '        lines.append("#pragma omp barrier")\n',
        "",
        f"{ENTRIES}_everyone_waits_between_a_stage_and_what_reads_it",
        unproven=A_RACE,
    ),
    "rows scaled after the bias where the library multiplies": Fault(
        PARTS,
        "_all([*scale, *lines])",
        "_all([*lines, *scale])",
        f"{ENTRIES}_accumulate[rowscale-1]",
        library=True,
    ),
    "two terms in one place of u": Fault(
        MODES, "-(-count // self.PAD) * self.PAD", "count // self.PAD * self.PAD", f"{ENTRIES}_gemv[two_adapters-1]"
    ),
}
