"""What the Triton emitter is tried with in the interpreter: printed specs by name, each with a number of tokens."""

from __future__ import annotations


def _lora(rank: int | None, dtype: str = "f32", scale: str = "2.0") -> str:
    return f" lora(r={rank} {dtype} s={scale})" if rank else ""


# Kronecker terms and weights kept as [k, n]: slices that blocks divide and that they do not, chains of up to four.
KRONECKER = {
    "transposed": f"k=70 x=f32; n=90 wt=f32 out=f32 bias=f32 residual=f32{_lora(5)}; n=24 w=f32 out=f32",
    "transposed_odd": f"k=101 x=bf16; n=37 wt=bf16 out=bf16 bias=bf16{_lora(3, 'f32')}; n=7 wt=bf16 out=bf16",
    "backward": "k=70 x=bf16; n=48 wt=bf16 out=bf16 residual=bf16 given(r=4 f32 z=f32)",
    "backward_narrow": "k=96 x=bf16; n=16 wt=f32 out=f32",
    "transposed_even": "k=256 x=f16; n=96 wt=f16 out=f16; n=64 wt=bf16 out=f32",
    "gaws": "k=64 x=f32; n=128 w=f32 out=f32 kron(4*32x16*1 f32 s=1.0); n=64 w=f32 out=f32 kron(4*16x16*1 f32 s=1.0)",
    "gaws_crossing": "k=64 x=f32; n=48 w=f32 out=f32 kron(4*12x16*1 f32 s=1.0)",
    "gaws_odd": "k=30 x=f32; n=21 w=f32 out=f32 bias=f32 residual=f32 kron(3*7x10*1 f32 s=2.5)",
    "gaws_diag": "k=96 x=bf16; n=40 w=bf16 out=bf16 kron(8*diag12*1 8*5x12*1 f32 s=1.0)",
    "gaws_bf16_diag": "k=128 x=bf16; n=64 w=bf16 out=bf16 kron(4*diag32*1 4*16x32*1 bf16 s=1.0)",
    "gaws_f16": "k=80 x=f16; n=48 w=f16 out=f16 kron(5*diag16*1 1*diag80*1 1*48x80*1 f16 s=0.5)",
    "gaws_rows": "k=40 x=f32; n=37 w=f32 out=f32 kron(1*37x40*1 f32 s=1.0)",
    "gaws_tiny": "k=66 x=f32; n=33 w=f32 out=f32 kron(33*1x2*1 f32 s=1.0)",
    "gaws_one_column": "k=4 x=f32; n=64 w=f32 out=f32 kron(4*16x1*1 f32 s=1.0)",
    "gaws_same": "; ".join(["k=64 x=bf16"] + ["n=64 w=bf16 out=bf16 kron(2*32x32*1 bf16 s=1.0)"] * 3),
    "blocks": "k=64 x=f32; n=128 w=f32 out=f32 kron(1*4of32x16*1 f32 s=2.0); n=20 w=f32 out=f32",
    "blocks_crossing": "k=60 x=bf16; n=66 w=bf16 out=bf16 kron(1*6of11x10*1 f32 s=tensor.f32)",
    "blocks_chain": "k=64 x=f32; n=48 w=f32 out=f32 kron(1*8x64*1 1*4of12x2*1 f32 s=2.0)"
    " kron(1*16of2x4*1 1*48x32*1 f32 s=0.5)",
    "gawsd": "k=96 x=f32; n=72 w=f32 out=f32 kron(1*6x8*12 f32 s=1.0); n=48 w=f32 out=f32 kron(1*4x8*12 f32 s=-2.0)",
    "gawsd_even": "k=128 x=bf16; n=96 w=bf16 out=bf16 kron(1*3x4*32 bf16 s=1.0); n=32 w=bf16 out=bf16",
    "gawsd_diag": "k=300 x=bf16; n=200 w=bf16 out=bf16 bias=bf16 kron(1*diag3*100 1*2x3*100 bf16 s=tensor.f32)",
    "gawsd_both": "k=12 x=f32; n=12 w=f32 out=f32 kron(1*1x1*12 f32 s=1.0) kron(2*2x2*3 f32 s=1.0)",
    "lokr": "k=60 x=f32; n=66 w=f32 out=f32 kron(1*6x5*12 6*11x12*1 f32 s=2.0)",
    "lokr_even": "k=128 x=bf16; n=96 w=bf16 out=bf16 kron(1*6x4*32 6*16x32*1 bf16 s=0.5); "
    + "; ".join(["n=64 w=bf16 out=bf16 kron(1*4x4*32 4*16x32*1 bf16 s=0.5)"] * 2),
    "lokr_low": f"k=60 x=f32; n=66 w=f32 out=f32{_lora(3)} kron(1*6x5*12 6*4x12*1 6*11x4*1 f32 s=2.0)",
    "lokr_between": "k=240 x=bf16; n=66 w=bf16 out=bf16 kron(5*2x48*1 1*6x5*2 6*11x2*1 bf16 s=2.0)",
    "lokr_left": "k=40 x=f16; n=24 w=f16 out=f16 kron(1*2x5*8 1*3x2*8 3*8x8*1 f16 s=tensor.f64)"
    " kron(4*6x10*1 f32 s=1.0)",
    "lokr_blocks_first": "k=40 x=f32; n=24 w=f32 out=f32 kron(5*3x8*1 5*6x3*1 1*4x5*6 f32 s=-1.5)",
    "lokr_four": "k=80 x=f32; n=24 w=f32 out=f32"
    " kron(1*diag5*16 1*2x5*16 1*diag32*1 1*4x2*16 4*3x16*1 4*diag3*1 4*6x3*1 f32 s=0.5)",
    "everything": f"k=64 x=bf16; n=48 wt=bf16 out=f32 bias=f16 residual=bf16{_lora(4, 'f32')}{_lora(3, 'bf16')}"
    " kron(4*12x16*1 f32 s=tensor.f64) kron(1*3x4*16 bf16 s=1.0) kron(1*3x4*16 3*16x16*1 bf16 s=tensor.f32);"
    f" n=64 w=bf16 out=bf16 kron(1*4x4*16 4*16x16*1 bf16 s=1.0); n=8 w=f32 out=f32{_lora(4)}",
}

# A gate and its partner: alike and not, with weights that no block divides, by every kind of term.
SWIGLU = {
    "swiglu": "k=64 x=bf16 swiglu; " + "; ".join([f"n=96 w=bf16 out=bf16{_lora(8, 'bf16')}"] * 2),
    "swiglu_plain": "k=64 x=f32 swiglu; n=48 w=f32 out=f32; n=48 w=f32 out=f32",
    "swiglu_odd": f"k=37 x=f16 swiglu; n=45 w=f16 out=f16 bias=f32{_lora(3)}; n=45 w=bf16 out=f16{_lora(17)}",
    "swiglu_half": f"k=50 x=f32 swiglu; n=21 wt=f32 out=f32; n=21 w=f32 out=f32 bias=f32{_lora(4, scale='tensor.f64')}",
    "swiglu_transposed": f"k=50 x=f32 swiglu; n=37 wt=f32 out=f32{_lora(3)}; n=37 wt=f32 out=f32 bias=f32",
    "swiglu_gaws": "k=60 x=bf16 swiglu; n=66 w=bf16 out=bf16 kron(3*22x20*1 f32 s=1.0);"
    " n=66 w=bf16 out=bf16 kron(1*11x10*6 f32 s=1.0)",
    "swiglu_lokr": "k=60 x=f32 swiglu; n=66 w=f32 out=f32 kron(1*6x5*12 6*4x12*1 6*11x4*1 f32 s=2.0);"
    f" n=66 w=f32 out=f32{_lora(2)} kron(1*6x5*12 6*11x12*1 f32 s=0.1)",
}


# What another activation brings: alone, beside u, in several dtypes, and for gate and up.
GIVEN = {
    "given": "k=64 x=bf16; " + "; ".join(f"n={n} w=bf16 out=bf16 given(r=16 bf16 z=bf16)" for n in (48, 16, 16)),
    "given_odd": "k=37 x=f32; n=21 w=f32 out=f32 bias=f32 residual=f32 given(r=3 f32 z=bf16) given(r=17 f16 z=f32)",
    "given_beside": f"k=64 x=bf16; n=24 wt=bf16 out=bf16{_lora(5)} given(r=70 f32 z=bf16) kron(4*6x16*1 f32 s=1.0)",
    "given_swiglu": "k=64 x=f32 swiglu; n=40 w=f32 out=f32 given(r=8 f32 z=f32);"
    " n=40 w=f32 out=f32 given(r=8 f32 z=f32)",
}


# A bank's adapters, by a schedule: alone, beside others, for gate and up.
BANKS = {
    "bank": "k=64 x=bf16; " + "; ".join(f"n={n} w=bf16 out=bf16 bank(bf16 x3)" for n in (48, 16, 16)),
    "bank_odd": f"k=37 x=f32; n=21 w=f32 out=f32 bias=f32 residual=f32{_lora(3)} bank(f32 x2);"
    " n=24 w=f32 out=f32 bank(f32 x8)",
    "bank_beside": f"k=64 x=bf16; n=24 wt=bf16 out=bf16{_lora(16)} kron(4*6x16*1 f32 s=1.0) bank(f32 x4)",
    "bank_modes": "k=64 x=bf16; " + "; ".join(f"n={n} w=bf16 out=bf16 bank(bf16 x4 modes=1)" for n in (48, 32)),
    "bank_modes_odd": f"k=36 x=f32; n=30 w=f32 out=f32 bias=f32 residual=f32{_lora(3)} bank(f32 x9 modes=4)",
    "bank_modes_swiglu": "k=48 x=bf16 swiglu; " + "; ".join(["n=36 w=bf16 out=bf16 bank(f32 x7 modes=3)"] * 2),
    "bank_swiglu": "k=64 x=f16 swiglu; n=40 w=f16 out=f16 bank(f16 x2); n=40 w=f16 out=f16 bank(f16 x2)",
}


# Rows scaled after all that is linear in x, and before bias and residual.
ROWSCALE = {
    "rowscale": f"k=64 x=bf16; n=48 w=bf16 out=bf16 bias=bf16 residual=bf16 rowscale=f32{_lora(8)};"
    f" n=21 w=bf16 out=bf16 rowscale=bf16{_lora(8)}; n=16 w=bf16 out=bf16",
    "rowscale_kron": "k=64 x=f32; n=48 wt=f32 out=f32 bias=f32 rowscale=f32 given(r=3 f32 z=f32)"
    " kron(4*12x16*1 f32 s=1.0)",
    "rowscale_swiglu": f"k=60 x=f32 swiglu; n=40 w=f32 out=f32 rowscale=f32{_lora(4)};"
    f" n=40 w=f32 out=f32 bias=f32 rowscale=f32{_lora(4)}",
}


# Weights kept as codes: every coding, its scales plain or coded, of rows and of groups, with zeros and without; beside
# adapters, scaled rows and siblings; with numbers of rows and of pieces of 32 columns that no block divides.
PACKED = {
    "packed_int8": "k=128 x=bf16; n=40 packed(int8 g=128 s=f32 f=0.5) out=bf16 lora(r=8 bf16 s=2.0);"
    " n=21 packed(int8 g=32 s=bf16 z=i8) out=bf16 bias=bf16; n=16 w=bf16 out=bf16",
    "packed_int8_odd": "k=96 x=f32; n=37 packed(int8 g=96) out=f32 bias=f32 residual=f32;"
    " n=37 packed(int8 g=96 s=f32) out=f32 rowscale=f32 lora(r=3 f32 s=2.0); n=9 packed(int8 g=32 s=u8) out=f32",
    "packed_uint8": "k=128 x=f32; n=40 packed(uint8 g=64 s=f32 z=f32) out=f32 lora(r=4 f32 s=2.0);"
    " n=21 packed(uint8 g=128 s=f32 z=u8) out=f32 rowscale=f32 lora(r=3 f32 s=2.0)",
    "packed_uint8_coded": "k=160 x=bf16; n=40 packed(uint8 g=160 s=u8 z=f32) out=bf16 lora(r=4 bf16 s=2.0);"
    " n=40 packed(uint8 g=32 s=u8 z=bf16) out=bf16",
    "packed_nf4": "k=128 x=bf16; n=48 packed(nf4 g=64 s=f32) out=bf16 bias=bf16 lora(r=8 bf16 s=2.0);"
    " n=21 packed(nf4 g=128 s=bf16) out=bf16 rowscale=f32 lora(r=3 bf16 s=2.0); n=16 packed(nf4 g=32) out=bf16",
    "packed_nf4_coded": "k=128 x=f32; n=72 packed(nf4 g=32 s=u8) out=f32 lora(r=4 f32 s=2.0);"
    " n=21 packed(nf4 g=64 s=u8 z=f32) out=f32 rowscale=f32 lora(r=3 f32 s=2.0)",
    "packed_nf4_long": "k=1056 x=f16; n=24 packed(nf4 g=96 s=f16) out=f16 lora(r=4 f16 s=2.0)",
    "packed_nf4_small": "k=32 x=f32; n=5 packed(nf4 g=32 s=u8) out=f32",
    "packed_nf4_bank": "k=64 x=bf16; n=24 packed(nf4 g=64 s=u8) out=bf16 bank(bf16 x2)",
    "packed_nf4_gaws": "k=64 x=f32; n=48 packed(nf4 g=32 s=f32) out=f32 kron(4*12x16*1 f32 s=1.0)",
    "packed_fp4": "k=96 x=f32; n=37 packed(fp4 g=32 s=f32) out=f32 bias=f32 lora(r=3 f32 s=2.0);"
    " n=40 packed(fp4 g=96 s=f32 z=f32) out=f32 rowscale=f32 lora(r=3 f32 s=2.0)",
    "packed_fp4_coded": "k=64 x=bf16; n=40 packed(fp4 g=64 s=u8) out=bf16 lora(r=4 bf16 s=2.0);"
    " n=16 packed(fp4 g=32 s=u8) out=bf16 residual=bf16",
    "packed_swiglu": "k=128 x=bf16 swiglu; "
    + "; ".join(["n=48 packed(nf4 g=64 s=u8) out=bf16 lora(r=8 bf16 s=2.0)"] * 2),
    "packed_swiglu_half": "k=64 x=f32 swiglu; n=21 packed(int8 g=64 s=f32) out=f32; n=21 packed(fp4 g=32 s=f32) out=f32"
    " lora(r=4 f32 s=2.0)",
}


def _cases() -> dict[str, tuple[str, int]]:
    """Name → (printed spec, number of tokens); `plans_for` says by which plans each is run."""
    cases = {}
    for m in (1, 2, 5):
        for rank in (None, 1, 3, 8, 16, 17):
            cases[f"rank_{rank}-m{m}"] = (f"k=96 x=f32; n=40 w=f32 out=f32{_lora(rank)}", m)
    qkv = "; ".join(f"n={n} w=bf16 out=bf16{_lora(16, 'bf16')}" for n in (48, 16, 16))
    specs = {
        "qkv": f"k=64 x=bf16; {qkv}",
        "only_q_and_v": f"k=64 x=f32; n=48 w=f32 out=f32{_lora(4)}; n=16 w=f32 out=f32; n=16 w=f32 out=f32{_lora(4)}",
        "unequal_ranks": f"k=64 x=f32; n=9 w=f32 out=f32{_lora(3)}; n=40 w=f32 out=f32{_lora(8)}",
        "five_kinds_of_work": "k=64 x=f32; "
        + "; ".join(
            f"n={n} w=f32 out=f32{_lora(r, scale=f'{r}.0')}" for n, r in ((8, 1), (20, 2), (7, 3), (16, 5), (33, 8))
        ),
        "two_adapters": f"k=64 x=bf16; n=24 w=bf16 out=bf16{_lora(3, 'f32')}{_lora(17, 'bf16', '-0.5')}",
        "bias": f"k=64 x=f32; n=40 w=f32 out=f32 bias=f32{_lora(4)}",
        "residual": f"k=64 x=f32; n=40 w=f32 out=f32 residual=f32{_lora(4)}",
        "bias_and_residual_odd": f"k=33 x=bf16; n=35 w=bf16 out=bf16 bias=f32 residual=bf16{_lora(3, 'f32')}",
        "bias_without_adapter": "k=64 x=f32; n=40 w=f32 out=f32 bias=f32 residual=f32",
        "tensor_scale": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', 'tensor.f32')}",
        "tensor_scale_f64": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', 'tensor.f64')}",
        "tensor_scales": "; ".join(["k=64 x=f32"] + [f"n=12 w=f32 out=f32{_lora(4, 'f32', 'tensor.f32')}"] * 2),
        "scale_one": f"k=64 x=f32; n=40 w=f32 out=f32{_lora(4, 'f32', '1.0')}",
        "odd_n_and_k": f"k=101 x=f32; n=37 w=f32 out=f32{_lora(16)}",
        "odd_siblings": "; ".join(["k=37 x=bf16"] + [f"n={n} w=bf16 out=bf16{_lora(17, 'bf16')}" for n in (577, 3)]),
        "ones": f"k=1 x=f32; n=1 w=f32 out=f32{_lora(1)}",
        "bf16_with_f32_adapters": f"k=96 x=bf16; n=40 w=bf16 out=bf16{_lora(16, 'f32')}",
        "bf16_to_f32": f"k=96 x=bf16; n=40 w=bf16 out=f32{_lora(16, 'bf16')}",
        "f16": f"k=96 x=f16; n=40 w=f16 out=f16{_lora(16, 'f16')}",
        "f16_odd": f"k=50 x=f16; n=19 w=f16 out=f16 bias=f16{_lora(3, 'f16', 'tensor.f32')}",
        "f32_over_bf16": f"k=96 x=f32; n=40 w=bf16 out=f32{_lora(16, 'bf16')}",
        "rank_64": f"k=64 x=f32; n=24 w=f32 out=f32{_lora(64)}",
        "rank_150": f"k=64 x=f32; n=24 w=f32 out=f32{_lora(150)}",
        "rank_256": f"k=64 x=bf16; n=24 w=bf16 out=bf16{_lora(256, 'bf16')}",
        "long_k": f"k=5120 x=f32; n=8 w=f32 out=f32{_lora(2)}",
        "many_rows": f"k=64 x=bf16; n=8192 w=bf16 out=bf16{_lora(8, 'bf16')}; n=64 w=bf16 out=bf16{_lora(8, 'bf16')}",
    }
    cases |= {f"{name}-m{m}": (text, m) for name, text in specs.items() for m in (1, 5)}
    cases |= {f"{name}-m{m}": (text, m) for name, text in KRONECKER.items() for m in (1, 3, 17)}
    cases |= {f"{name}-m{m}": (text, m) for name, text in (SWIGLU | GIVEN | ROWSCALE).items() for m in (1, 5)}
    cases |= {f"{name}-m{m}": (text, m) for name, text in PACKED.items() for m in (1, 2, 6)}
    cases |= {f"{name}-m{m}": (text, m) for name, text in BANKS.items() for m in (1, 2, 6, 70)}
    # A second token in flight, and a second block of tokens.
    cases |= {f"{name}-m{m}": (specs[name], m) for name in ("qkv", "bias_and_residual_odd") for m in (2, 70)}
    cases |= {f"swiglu-m{m}": (SWIGLU["swiglu"], m) for m in (2, 70)}
    cases |= {f"{name}-m{m}": (KRONECKER[name], m) for name in ("gaws_odd", "gawsd", "lokr_low") for m in (2, 70)}
    return cases


CASES = _cases()

CORE = frozenset(
    [
        "qkv",
        "swiglu",
        "gaws",
        "gawsd",
        "bank",
        "bank_odd",
        "packed_int8",
        "packed_nf4",
        "packed_swiglu",
        "blocks",
        "lokr",
        "rowscale",
        "residual",
        "bias",
        "given",
        "two_adapters",
        "everything",
        "transposed",
        "f16",
        "long_k",
        "odd_n_and_k",
        "bf16_with_f32_adapters",
    ]
)
"""Names of those that the fast suite tries with one token; each of the others has parts that one of these has."""
