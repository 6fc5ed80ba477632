"""Differential fuzzing: random programs, our compiler beside eager torch and fp64. ``python -m tests.fuzz --help``.

Three levels, each a module here with ``run(seed, coverage)`` for one case (`tests.fuzz.coverage` has the types):

1. `passes`: graphs of random programs, rewritten by the pipeline, run by a reference executor: no kernel is built.
2. `kernels`: random kernel specs, the generated code against fp64.
3. `runs`: whole ``torch.compile`` runs, with edits of the model between calls.
"""
