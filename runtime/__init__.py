"""Runs a bundle: image -> prune -> vision -> language -> text. No torch, no transformers, no onnx."""
