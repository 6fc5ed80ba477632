"""Groups at the sizes of real models, for tests of the Triton emitter."""

from __future__ import annotations

from gawscompile.ir.spec import KernelSpec

QKV = KernelSpec.parse(
    "; ".join(["k=576 x=bf16", *(f"n={n} w=bf16 out=bf16 lora(r=16 bf16 s=2.0)" for n in (576, 192, 192))])
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


def llama(*terms: str) -> KernelSpec:
    """q, k and v of LLaMA-3.2-3B."""
    rows = (f"n={n} w=bf16 out=bf16 {term}" for n, term in zip((3072, 1024, 1024), terms, strict=True))
    return KernelSpec.parse("; ".join(["k=3072 x=bf16", *rows]))


GAWS = llama("kron(8*384x384*1 bf16 s=1.0)", *["kron(8*128x384*1 bf16 s=1.0)"] * 2)
GAWSD = llama("kron(1*24x24*128 bf16 s=1.0)", *["kron(1*8x24*128 bf16 s=1.0)"] * 2)
GAWS_DIAG = llama("kron(8*diag384*1 8*384x384*1 f32 s=1.0)", *["kron(1*diag24*128 1*8x24*128 f32 s=2.0)"] * 2)
LOKR = llama("kron(1*48x48*64 48*64x64*1 bf16 s=0.5)", *["kron(1*32x48*64 32*32x64*1 bf16 s=0.5)"] * 2)
LOKR_LOW = llama(
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
BANK = llama(*["bank(bf16 x16)"] * 3)
BANK_MODES = llama(*["bank(bf16 x16 modes=2)"] * 3)
BACKWARD = KernelSpec.parse("k=3072 x=bf16; n=8192 wt=bf16 out=bf16 residual=bf16 given(r=16 f32 z=f32)")
BACKWARD_NARROW = KernelSpec.parse("k=8192 x=bf16; n=16 wt=f32 out=f32")
"""dx = Wᵀ dy + Aᵀ v, added to the gradients of x that are there already, and v = Bᵀ dy."""
GIVEN = llama(*["given(r=32 bf16 z=bf16)"] * 3)
DORA = llama(*["rowscale=f32 lora(r=16 bf16 s=2.0)"] * 3)
NF4, INT8 = (
    KernelSpec.parse(str(llama(*["lora(r=16 bf16 s=2.0)"] * 3)).replace("w=bf16", base))
    for base in ("packed(nf4 g=64 s=u8)", "packed(int8 g=3072 s=bf16)")
)  # as bitsandbytes keeps QLoRA's bases, and torchao its own
GIVEN_SWIGLU = KernelSpec.parse(
    "k=3072 x=bf16 swiglu; " + "; ".join(["n=8192 w=bf16 out=bf16 given(r=32 bf16 z=bf16)"] * 2)
)
SWIGLU = KernelSpec.parse(
    "k=3072 x=bf16 swiglu; " + "; ".join(["n=8192 w=bf16 out=bf16 lora(r=16 bf16 s=2.0)"] * 2)
)  # gate and up of LLaMA-3.2-3B
