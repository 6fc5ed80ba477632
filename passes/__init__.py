"""The compiler, top to bottom. Reading `PIPELINE` is reading what happens to a graph.

Each pass is a module with one function, ``run(graph, context)``, that edits the graph in place, records what it
matched and what it rejected, and may count on what the passes before it establish. Before it looks for a match at a
node it asks ``context.looks_at``, before it applies one ``context.allows``, so that fuel can end between any two and
what raises is known by name and can be left out. To add one: a file here, a test in ``tests/passes/``, a line below.
"""

if __name__ == "passes":
    raise ImportError("import gawscompile.passes, not passes: the folder is a part of the gawscompile package")

from gawscompile.passes import (
    canonicalize,
    choose_plan,
    fuse_attention,
    fuse_epilogues,
    fuse_kronecker,
    fuse_zflora,
    gather_summands,
    group_siblings,
    hoist_weights,
    join_banks,
    join_collectives,
    join_gradients,
    lower,
    merge_blocks,
    recompute_inputs,
    recover_operators,
    sink_scales,
    split_streams,
    turn_products,
    unfold_convolutions,
)

PIPELINE = (
    split_streams,
    canonicalize,
    join_collectives,
    unfold_convolutions,
    merge_blocks,
    sink_scales,
    gather_summands,
    turn_products,
    join_gradients,
    recover_operators,
    join_banks,
    hoist_weights,
    group_siblings,
    fuse_zflora,
    fuse_kronecker,
    fuse_epilogues,
    choose_plan,
    lower,
    fuse_attention,
    recompute_inputs,
)

INFERENCE = (split_streams, join_collectives, unfold_convolutions, join_banks, hoist_weights, fuse_attention)
"""Passes that leave graphs alone which need gradients. Values of `hoist_weights` would be new in every step; the others
know no backward."""

__all__ = ["INFERENCE", "PIPELINE"]
