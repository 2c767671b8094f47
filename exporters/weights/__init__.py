"""Weights of a checkpoint on their way into a graph: attached one by one, as floats or as integers."""
