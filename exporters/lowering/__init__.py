"""From a traced torch module to ONNX in one dialect."""
