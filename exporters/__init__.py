"""torch -> ONNX: the only package that imports torch, onnx_ir and safetensors."""
