"""Pruning as ONNX graphs, one file per pruner, named like its settings in models/pruners."""
