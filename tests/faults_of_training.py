"""Faults of what is made of graphs that need gradients."""

from __future__ import annotations

from tests.fault import FEW_TOKENS, NO_GRADIENTS, Fault

TRAINING: dict[str, Fault] = {
    "a gradient's scale lost": Fault(
        "passes/sink_scales.py",
        "(plain, scale), product",
        "(plain, 1.0), product",
        "tests/passes/test_sink_scales.py",
        unproven=NO_GRADIENTS,
    ),
    "a summand of a gradient lost": Fault(
        "passes/gather_summands.py",
        "for part in kinds[kind]:",
        "for part in kinds[kind][:1]:",
        "tests/passes/test_gather_summands.py",
        unproven=NO_GRADIENTS,
    ),
    "a turned product not turned back": Fault(
        "passes/turn_products.py",
        "context.contiguous(context.transpose(flat, node), node)",
        'context.insert(aten.view.default, (flat, list(shape(node))), node, node.meta["val"])',
        "tests/passes/test_turn_products.py",
        unproven=NO_GRADIENTS,
    ),
    "gradients in another order than their factors": Fault(
        "passes/join_gradients.py",
        "(parts, 1), last",
        "(parts[::-1], 1), last",
        "tests/passes/test_join_gradients.py",
        unproven=NO_GRADIENTS,
    ),
    "a gradient that is read early joined all the same": Fault(
        "passes/join_gradients.py",
        "return list(found) if ends else None",
        "return list(found)",
        "tests/passes/test_join_gradients.py",
        unproven=NO_GRADIENTS,
    ),
    "a second value of what is computed again saved": Fault(
        "passes/recompute_inputs.py",
        "if read not in again and not _there(context, read)",
        "if not _there(context, read)",
        "tests/passes/test_recompute_inputs.py",
        unproven=NO_GRADIENTS,
    ),
    "what the forward writes read again": Fault(
        "passes/recompute_inputs.py",
        "return not written and (",
        "return (",
        "tests/passes/test_recompute_inputs.py",
        unproven=NO_GRADIENTS,
    ),
    "what no gradient reads taken for saved": Fault(
        "passes/recompute_inputs.py",
        "(node in context.stored or bool(_readers(node)))",
        "True",
        "tests/passes/test_recompute_inputs.py",
        unproven=NO_GRADIENTS,
    ),
    "what a layer and a gradient both read not scaled": Fault(
        "passes/recover_operators.py",
        "scaled_before(context, u, p.scale.number)",
        "u",
        "tests/passes/test_gather_summands.py",
        unproven=NO_GRADIENTS,
    ),
    "a region's tags lost": Fault(
        "passes/context.py",
        '*("partitioner_tag", "recompute", "ac_graph_id", "seq_nr"),',
        '"partitioner_tag",',
        "tests/test_training.py::test_checkpoints_are_computed_again_and_nothing_else_is",
        unproven=NO_GRADIENTS,
    ),
    "an activation taken for a weight": Fault(
        "passes/canonicalize.py",
        "(not context.training or context.of_stored(node))",
        "True",
        "tests/test_training.py::test_inputs_are_no_weights",
        unproven=NO_GRADIENTS,
    ),
    "every stripe of a weight kept by columns is the first": Fault(
        "codegen/panels.cpp",
        "of.w + (from + k) * N + row + r",
        "of.w + (from + k) * N + r",
        "tests/codegen/test_cpp.py::test_gemm",
        unproven=FEW_TOKENS,
    ),
}
