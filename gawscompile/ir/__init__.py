"""What a graph means between the passes: operators and their sums, specs of kernels, recipes, records of a compile."""
