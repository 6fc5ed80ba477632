"""KernelSpec: what it prints is what it parses, and nonsense is refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from gawscompile.ir.spec import GivenSpec, KernelSpec, LowRankSpec, ProjectionSpec, SpecError


def random_spec(random: random.Random) -> KernelSpec:
    def lowrank() -> LowRankSpec:
        if random.random() < 0.5:
            return LowRankSpec(random.randint(1, 300), random.choice(["f32", "bf16", "f16"]), random.uniform(-9, 9))
        return LowRankSpec(random.randint(1, 300), "f32", None, random.choice(["f32", "f64"]))

    def projection() -> ProjectionSpec:
        terms = tuple(lowrank() for _ in range(random.randint(0, 3)))
        given = tuple(GivenSpec(random.randint(1, 300), "f32", "bf16") for _ in range(random.randint(0, 2)))
        bias, residual = (random.choice([None, "f32", "bf16"]) for _ in range(2))
        weight = None if residual and (terms or given) and random.random() < 0.3 else "bf16"
        turned = weight is not None and random.random() < 0.3
        return ProjectionSpec(random.randint(1, 9999), weight, "f32", bias, residual, terms, turned, given=given)

    return KernelSpec(random.randint(1, 9999), "bf16", tuple(projection() for _ in range(random.randint(1, 4))))


def test_a_printed_spec_parses_back_to_itself():
    generator = random.Random(0)
    specs = [random_spec(generator) for _ in range(300)]
    for spec in specs:
        assert KernelSpec.parse(str(spec)) == spec
        assert "\n" not in str(spec)
    assert len({str(spec) for spec in specs}) == len(set(specs))


def test_every_field_shows_in_the_text():
    base = ProjectionSpec(8, "f32", "f32", None, None, (LowRankSpec(2, "f32", 1.5),))
    variants = [
        KernelSpec(16, "f32", (base,)),
        KernelSpec(17, "f32", (base,)),
        KernelSpec(16, "bf16", (base,)),
        KernelSpec(16, "f32", (base, base)),
        KernelSpec(16, "f32", (base, base), swiglu=True),
    ]
    changes: list[dict] = [{"n": 9}, {"dtype": "bf16"}, {"out": "bf16"}, {"bias": "f32"}, {"residual": "f32"}]
    terms = [LowRankSpec(3, "f32", 1.5), LowRankSpec(2, "bf16", 1.5), LowRankSpec(2, "f32", 1.25)]
    terms += [LowRankSpec(2, "f32", None, scale_dtype) for scale_dtype in ("f32", "f64")]
    fields = (4, "f32", "f32"), (5, "f32", "f32"), (4, "bf16", "f32"), (4, "f32", "bf16")
    changes += [{"given": (GivenSpec(*given),)} for given in fields]
    changes += [{"lowrank": ()}, *({"lowrank": (term,)} for term in terms)]
    variants += [KernelSpec(16, "f32", (dataclasses.replace(base, **change),)) for change in changes]
    assert all(str(a) != str(b) for a, b in itertools.combinations(variants, 2))


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
        ("k=4 x=f32; n=1 out=f32 lora(r=2 f32 s=1.0)", "without a weight there is a residual"),
        ("k=4 x=f32; n=1 out=f32 residual=f32", "a term to add to it"),
        ("k=4 x=f32; n=1 out=f32 residual=f32 rowscale=f32 lora(r=2 f32 s=1.0)", "no scale of both"),
        ("k=4 x=f32; n=1 w=f32 out=f32 twist=f32", "not a projection spec"),
        ("k=4 x=f32; n=1 w=f32 out=f32 lora(r=2 f32 s=tensor.i8)", "a scale is a number"),
        ("k=4 x=f32; n=1 w=f32 out=f32 */ system()", "not a projection spec"),
    ],
)
def test_nonsense_is_refused(text, says):
    with pytest.raises(SpecError, match=says):
        KernelSpec.parse(text)
