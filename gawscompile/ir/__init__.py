"""The operator algebra: what an adapted projection means, independent of how it was written or will run."""

from gawscompile.ir.operators import (
    Bias,
    Dense,
    Given,
    Kept,
    Kronecker,
    LowRank,
    Mode,
    Operator,
    RowScale,
    describe,
    linear,
    operator_group,
    operator_sum,
)

__all__ = [
    "Bias",
    "Dense",
    "Given",
    "Kept",
    "Kronecker",
    "LowRank",
    "Mode",
    "Operator",
    "RowScale",
    "describe",
    "linear",
    "operator_group",
    "operator_sum",
]
