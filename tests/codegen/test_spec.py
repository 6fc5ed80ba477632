"""KernelSpec: what it prints is what it parses, and nonsense is refused by name."""

from __future__ import annotations

import itertools
import random

import pytest

from gawscompile.ir.operators import Bias, Dense, Given, Kronecker, LowRank, Mode, Residual, RowScale
from gawscompile.ir.spec import KernelSpec
from gawscompile.ir.sums import Sum
from gawscompile.ir.types import SpecError, TensorType


def random_text(random: random.Random) -> str:
    """A spec's text with its words in order."""

    def lowrank() -> str:
        dtype, scale = random.choice(["f32", "bf16", "f16"]), repr(random.uniform(-9, 9))
        return f"lora(r={random.randint(1, 300)} {dtype} s={random.choice([scale, 'tensor.f32', 'tensor.f64'])})"

    def projection() -> str:
        terms = [lowrank() for _ in range(random.randint(0, 3))]
        terms += [f"given(r={random.randint(1, 300)} f32 z=bf16)" for _ in range(random.randint(0, 2))]
        base = random.choice(["w=bf16", "wt=bf16", *["opaque=f32"] * bool(terms)])
        words = [f"n={random.randint(1, 9999)}", base, "out=f32"]
        words += [f"{role}={random.choice(['f32', 'bf16'])}" for role in ("bias", "residual") if random.random() < 0.6]
        return " ".join([*words, *terms])

    return "; ".join([f"k={random.randint(1, 9999)} x=bf16", *(projection() for _ in range(random.randint(1, 4)))])


def test_a_printed_spec_parses_back_to_itself():
    generator = random.Random(0)
    texts = [random_text(generator) for _ in range(300)]
    specs = [KernelSpec.parse(text) for text in texts]
    assert [str(spec) for spec in specs] == texts
    assert [KernelSpec.of(TensorType(("m", s.k), s.x), s.projections, s.swiglu) for s in specs] == specs
    assert len(set(texts)) == len(set(specs))


def test_every_field_shows_in_the_text():
    def spec(terms: list, n: int = 8, k: int = 16, x: str = "f32", out: str = "f32", count: int = 1, **more):
        base = Dense(TensorType((n, k), more.pop("weight", "f32")), more.pop("transposed", False))
        return KernelSpec(k, x, (Sum.of((base, *terms), out),) * count, **more)

    def lora(rank: int = 2, dtype: str = "f32", scale: object = 1.5) -> LowRank:
        return LowRank(TensorType((rank, 16), dtype), TensorType((8, rank), dtype), scale)

    vector, activation = TensorType((8,), "f32"), TensorType(("m", 8), "f32")
    variants = [
        *(spec([lora()]), spec([lora()], x="bf16"), spec([lora()], count=2), spec([lora()], count=2, swiglu=True)),
        *(spec([lora()], weight="bf16"), spec([lora()], out="bf16"), spec([])),
        *(spec([], k=17), spec([], n=9), spec([], n=16, transposed=True), spec([], n=16)),
        *(spec([one(vector)]) for one in (Bias, RowScale)),
        *(spec([term]) for term in (Residual(activation), lora(3), lora(2, "bf16"), lora(scale=1.25))),
        *(spec([lora(scale=TensorType((), dtype))]) for dtype in ("f32", "f64")),
    ]
    for rank, dtype, z in ((4, "f32", "f32"), (5, "f32", "f32"), (4, "bf16", "f32"), (4, "f32", "bf16")):
        variants.append(spec([Given(TensorType((8, rank), dtype), TensorType(("m", rank), z))]))
    assert all(str(a) != str(b) for a, b in itertools.combinations(variants, 2))


def test_sums_that_are_none_are_refused():
    w, a, b = TensorType((8, 16), "f32"), TensorType((2, 16), "f32"), TensorType((8, 2), "f32")
    misfits = [
        (Dense(TensorType((8, 15), "f32")),),
        (Dense(w), LowRank(a, TensorType((9, 2), "f32"))),
        (Dense(w), LowRank(a, TensorType((8, 2), "bf16"))),
        (Dense(w), LowRank(TensorType((2, 17), "f32"), b)),
        (Dense(w), Bias(TensorType((9,), "f32"))),
        (Dense(w), Kronecker((Mode(2, TensorType((2, 4), "f32"), 1), Mode(2, TensorType((4, 3), "f32"), 1)))),
        (LowRank(a, b), Dense(w)),
        (Dense(w), Dense(w)),
        (Dense(w), Bias(TensorType((8,), "f32")), Bias(TensorType((8,), "f32"))),
        (LowRank(a, b),),
    ]
    for terms in misfits:
        with pytest.raises(SpecError):
            KernelSpec(16, "f32", (Sum(terms, "f32"),))
    assert KernelSpec(16, "f32", (Sum((Dense(w), LowRank(a, b)), "f32"),)).outputs == [(8, "f32")]


def test_operands_come_in_one_order_with_names_of_their_own():
    spec = KernelSpec.parse(
        "k=4 x=f32; n=6 w=f32 out=f32 bias=f32 residual=f32 lora(r=2 f32 s=tensor.f64); "
        "n=3 w=f32 out=f32"
    )
    operands = list(spec.operands())
    assert [o.name for o in operands] == ["w0", "bias0", "res0", "a0_0", "b0_0", "scale0_0", "w1"]
    assert [o.shape for o in operands] == [(6, 4), (6,), ("m", 6), (2, 4), (6, 2), (), (3, 4)]
    assert spec.formulas() == ["y0[6] = W0 x + bias0 + res0 + s0_0 B0_0[6x2] (A0_0 x)", "y1[3] = W1 x"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a kernel spec"),
        ("k=4 x=f32", "not a kernel spec"),
        ("k=4 x=f32 swiglu; n=1 w=f32 out=f32", "swiglu takes two projections of one width"),
        ("k=4 x=f32 swiglu; n=1 w=f32 out=f32; n=2 w=f32 out=f32", "swiglu takes two projections of one width"),
        ("k=4 x=f32 swiglu; n=1 w=f32 out=f32; n=1 w=f32 out=f32 residual=f32", "without residuals"),
        ("k=4 x=f99; n=1 w=f32 out=f32", "unknown dtype 'f99'; known: f32, bf16, f16"),
        ("k=4 x=f32; n=1 w=f32", "not a projection spec"),
        ("k=4 x=f32; n=1 out=f32 lora(r=2 f32 s=1.0)", "a sum has one base"),
        ("k=4 x=f32; n=1 opaque=f32 out=f32", "adapters are added"),
        ("k=4 x=f32; n=1 opaque=f32 out=f32 rowscale=f32 lora(r=2 f32 s=1.0)", "no row scale"),
        ("k=4 x=f32; n=1 w=f32 w=f32 out=f32", "one Dense at most"),
        ("k=4 x=f32; n=1 w=f32 out=f32 bank(f32) bank(f32)", "one Banked at most"),
        ("k=4 x=f32; n=1 opaque=f32 out=f32 bank(f32)", "a bank stands beside a base that the kernel multiplies"),
        ("k=4 x=f32; n=1 w=f32 out=f32 kron(1*2x3*1 f32 s=1.0)", "takes 3 features, not 4"),
        ("k=4 x=f32; n=1 w=f32 out=f32 twist=f32", "not a projection spec"),
        ("k=4 x=f32; n=1 w(f32) out=f32", "not a projection spec"),
        ("k=4 x=f32; n=1 w=f32 out=f32 lora=f32", "not a projection spec"),
        ("k=4 x=f32; n=4 w=f32 out=f32 kron(1*2ofdiag2*1 f32 s=1.0)", "not a projection spec"),
        ("k=4 x=f32; n=4 w=f32 out=f32 kron(2*1of2x2*1 f32 s=1.0)", "distinct blocks stand alone"),
        ("k=4 x=f32; n=1 w=f32 out=f32 lora(r=2 f32 s=tensor.i8)", "a scale is a number"),
        ("k=4 x=f32; n=1 w=f32 out=f32 */ system()", "not a projection spec"),
    ],
)
def test_nonsense_is_refused(text, says):
    with pytest.raises(SpecError, match=says):
        KernelSpec.parse(text)
