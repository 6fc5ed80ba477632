"""What is known of a graph, without changing it: one question, one file."""
