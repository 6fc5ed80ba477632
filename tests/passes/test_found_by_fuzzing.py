"""What `tests.fuzz` found, shrunk: each program once had a wrong answer, a pass that raised, or a guard too many."""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.config import CPUS, Config
from tests.fuzz.passes import check
from tests.fuzz.programs import Input, Program, Step


def program(inputs: dict[str, tuple[tuple[str, ...], torch.dtype]], steps: str, *outputs: str, **sizes: int) -> Program:
    """`inputs`: name → (shape, dtype); `steps`: ``name = text`` in lines."""
    made = tuple(
        Input(name, shape, dtype, "weight" if name.startswith("p") else "normal")
        for name, (shape, dtype) in inputs.items()
    )
    parted = (line.strip().partition(" = ") for line in steps.strip().splitlines())
    return Program(sizes, made, tuple(Step(name, text) for name, _, text in parted), outputs)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

FOUND: dict[str, tuple[Program, Config]] = {
    "as many tokens as there are, and no features": (
        program(
            {"x0": (("d0", "1", "d1", "16"), F32), "p1": (("16", "d2"), F32), "p2": (("d2",), F32)},
            """v0 = x0.reshape(-1, 16)
            v1 = torch.addmm(p2, v0, p1, beta=0.5)""",
            "v1",
            d0=2,
            d1=3,
            d2=0,
        ),
        Config(seed=1, symbolic=("d0", "d1")),
    ),
    "heads of one row, folded, are no batch of one": (
        program(
            {"x0": (("1", "2", "1", "4"), BF16), "p1": (("1", "1", "1", "4"), BF16), "x2": (("2", "4", "1"), BF16)},
            """v0 = p1[:, :, None].expand(1, 1, 2, 8, 4).reshape(1, 2, 8, 4).reshape(2, 8, 4)
            v1 = torch.bmm(torch.bmm(x0.reshape(2, 1, 4), v0.mT), v0)""",
            "v1",
            d0=1,
        ),
        Config(seed=1),
    ),
    # beta = 0 reads nothing of c, alpha = 0 nothing of the product: NaN there is no NaN of the sum
    "addmm that takes its product zero times": (
        program(
            {"x0": (("d0", "d1"), F32), "p1": (("d1", "d1"), F32), "p2": (("d1",), F32)},
            "v0 = torch.addmm(p2, x0, p1, alpha=0)",
            "v0",
            d0=2,
            d1=8,
        ),
        Config(seed=7, way="nan"),
    ),
    "addmm that takes its bias zero times": (
        program(
            {"p0": (("d1",), F32), "x1": (("d0", "d1"), F32), "p2": (("d1", "d1"), F32)},
            "v0 = torch.addmm(p0, x1, p2, beta=0)",
            "v0",
            d0=2,
            d1=8,
        ),
        Config(seed=0, way="nan"),
    ),
    # a sum's layout is that of its first operand, and addmm's that of a product
    "addmm on a bias that lies by columns": (
        program(
            {"x0": (("d1", "d2"), F16), "p1": (("d2", "d1"), F16), "p3": (("d2", "d1"), F16)},
            """
            v0 = x0.mT
            v2 = (p1 @ v0.T).T
            v3 = v2.addmm(v0, p3.t(), alpha=-1, beta=0.5).unflatten(0, v0.shape[:-1])
            """,
            "v3",
            d1=1,
            d2=2,
        ),
        Config(seed=10955),
    ),
    # a proof draws what two views are of, not each of them
    "a product and its view, both returned": (
        program(
            {"x0": (("d0", "d1", "d2"), BF16), "p3": (("d2", "d2"), BF16), "p4": (("d2",), BF16)},
            """
            v1 = x0.flatten(0, -2)
            v2 = torch.addmm(p4, v1, p3)
            v3 = v2.unflatten(0, x0.shape[:-1])
            """,
            "v2",
            "v3",
            d0=1,
            d1=2,
            d2=1,
        ),
        Config(seed=13811, proven=True),
    ),
    "an adapter of rank zero behind a vector, on a GPU": (
        program(
            {
                "x0": (("d3",), F32),
                "p1": (("d3", "d3"), F32),
                "p2": (("d3",), F32),
                "p3": (("d4", "d3"), F32),
                "p4": (("d3", "d4"), F32),
            },
            """
            v0 = F.linear(x0, p1)
            v3 = F.linear(F.linear(x0 * p2, p3), p4)
            v4 = v0.add(v3)
            """,
            "v4",
            d3=2,
            d4=0,
        ),
        Config(seed=12644, device="cuda"),
    ),
    # of no tokens even two dtypes have a product
    "two dtypes and no tokens": (
        program(
            {"x0": (("d4", "d0", "d1", "d3"), F32), "p6": (("d0", "d3"), F32), "p8": (("d1",), torch.float64)},
            """
            v7 = (p8 * 2) * p6
            v8 = torch.einsum('...k,rk->...r', x0, v7)
            """,
            "v8",
            d0=1,
            d1=1,
            d3=2,
            d4=0,
        ),
        Config(seed=18676),
    ),
    # nothing has any number of rows
    "rows of nothing": (
        program(
            {"x0": (("d0",), F32), "p1": (("d1", "d0"), F32)},
            """
            v0 = x0.unflatten(-1, (2, -1))
            v1 = F.linear(v0, p1)
            """,
            "v1",
            d0=0,
            d1=1,
        ),
        Config(seed=9278),
    ),
    # on columns, the activation is what a product of factors is multiplied by: its size is a symbol
    "a chain of factors on columns of any number": (
        program(
            {
                "x0": (("d0", "d1"), BF16),
                "p1": (("d3", "d1"), BF16),
                "p2": (("d2", "d1"), F16),
                "p3": (("d3", "d2"), F16),
            },
            """
            v0 = F.linear(x0, p1)
            v1 = ((p3 @ p2) @ x0.to(torch.float16).T).T
            v2 = v1 / -0.25
            v3 = v0 + v2.to(v0.dtype)
            """,
            "v3",
            "v2",
            d0=3,
            d1=12,
            d2=1,
            d3=24,
        ),
        Config(symbolic=("d0",)),
    ),
    "VeRA on a GPU": (
        program(
            {
                "x0": (("d0", "d1"), F32),
                "p1": (("d2", "d1"), F32),
                "p2": (("d3", "d1"), F32),
                "p3": (("d2", "d3"), F32),
                "p4": (("d3",), F32),
                "p5": (("d2",), F32),
            },
            """
            v0 = F.linear(x0, p1)
            v1 = p5 * F.linear(p4 * F.linear(x0, p2), p3)
            v2 = v0 + v1
            """,
            "v2",
            d0=3,
            d1=8,
            d2=12,
            d3=2,
        ),
        Config(device="cuda"),
    ),
    # where fuel runs out, two nodes with one value are still two
    "an activation that is its own residual, and no fuel for a plan": (
        program(
            {"x0": (("d0", "d0"), F32), "p1": (("d0", "d0"), F32)},
            "v0 = torch.addmm(x0, x0, p1, beta=2)",
            "v0",
            d0=8,
        ),
        Config(fuel=5),
    ),
    # nodes of no module, or all of one
    "one linear has a kernel, and no fuel for the other": (
        program(
            {
                "x0": (("d0",), torch.float64),
                "p1": (("d0", "d0"), BF16),
                "p2": (("d0", "d0"), torch.float64),
                "p3": (("d0", "d0"), torch.float64),
            },
            """
            v0 = x0.to(torch.bfloat16)
            v1 = F.linear(v0, p1)
            v2 = v0.to(torch.float64) @ (p3 @ p2).T
            v3 = torch.sub(v1, v2, alpha=0.5)
            """,
            "v3",
            d0=2,
        ),
        Config(plans=CPUS[0].name, fuel=8, one_module=True),
    ),
    "a linear in fp64, and passes that do not run": (
        program(
            {"x0": (("d0",), F16), "p1": (("d1", "d0"), torch.float64)},
            """
            v0 = x0.to(torch.float64)
            v1 = F.linear(v0, p1)
            """,
            "v1",
            d0=1,
            d1=2,
        ),
        Config(disable=("group_siblings", "hoist_weights")),
    ),
    "a Kronecker product with a factor of rank zero": (
        program(
            {"x0": (("d1",), F32), "p1": (("6", "2"), F32), "p2": (("4", "d0"), F32), "p3": (("d0", "6"), F32)},
            """
            v0 = torch.kron(p1, p2 @ p3)
            v1 = F.linear(x0, v0)
            """,
            "v1",
            d0=0,
            d1=12,
        ),
        Config(),
    ),
    # the proof of a rewrite draws what stands alone, and computes what is made of that
    "a weight that is one linear's, and its factors another's": (
        program(
            {
                "x0": (("d0", "d1"), F16),
                "p1": (("d1", "d1"), F16),
                "p2": (("8", "2"), F16),
                "p3": (("1", "d0"), F16),
                "p4": (("d0", "4"), F16),
            },
            """
            v0 = F.linear(x0, p1)
            v1 = torch.kron(p2, p3 @ p4)
            v2 = F.linear(x0, v1)
            v3 = v0 + v2
            """,
            "v2",
            "v3",
            d0=1,
            d1=8,
        ),
        Config(device="cuda", proven=True),
    ),
    # … and knows the sizes that it does not compute
    "a sum over any number of tokens, proven": (
        program(
            {
                "x0": (("d0", "d1", "d2"), F16),
                "p1": (("d3", "d2"), F16),
                "p2": (("d2", "d3"), F16),
                "p3": (("d4", "d3"), F16),
                "p4": (("d2", "d4"), F16),
            },
            """
            v0 = F.linear(x0, p1)
            v1 = F.linear(v0, p2)
            v2 = torch.matmul(v0.flatten(0, -2), p3.t())
            v3 = v1.flatten(0, -2).addmm_(v2, p4.t(), alpha=0.5).unflatten(0, v0.shape[:-1])
            v4 = v3.add_(1)
            """,
            "v1",
            d0=2,
            d1=2,
            d2=12,
            d3=24,
            d4=2,
        ),
        Config(seed=1350, symbolic=("d1",), shared=True, proven=True),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_it_is_right_now(name):
    outcome = check(*FOUND[name])
    assert not outcome.failed, str(outcome)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("addmm that takes its product zero times", "SCALE"), ("two dtypes and no tokens", "MIXED_DTYPES")],
)
def test_what_is_left_says_why(name, reason):
    record = check(*FOUND[name]).record
    assert [(entry.status, entry.reason) for entry in record.linears] == [("rejected", reason)]
