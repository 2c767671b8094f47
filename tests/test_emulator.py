"""The emulator cannot drift from the APIs it stands for: everything in it exists in the real modules."""

from __future__ import annotations

import emulator
import pytest

OWN = {"Cuda", "Tensor"}  # not classes of TensorRT
INNER = {
    "cuda",
    "caches",
    "engine",
    "inputs",
    "outputs",
    "profiles",
    "session",
    "shapes",
    "types",
    "run",
    "kernels",
    "compiled",
    "cache",
    "scratch",
    "strategy",
}


def test_tensorrt() -> None:
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has libraries for x86-64 only")
    checked = 0
    for name, value in vars(emulator).items():
        if not isinstance(value, type) or value.__module__ != "emulator" or name in OWN:
            continue
        for attribute in vars(value):
            if not attribute.startswith("_") and attribute not in INNER:
                assert hasattr(getattr(real, name), attribute), f"{name}.{attribute}"
                checked += 1
    assert checked > 30
    for attribute in ("name", "shape", "get_dimension_name"):
        assert hasattr(real.ITensor, attribute)
    for attribute in ("num_io_tensors", "get_aliased_input_tensor"):
        assert hasattr(real.ICudaEngine, attribute)


def test_cuda() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    checked = 0
    for name, value in vars(emulator.Cuda).items():
        if not name.startswith("cuda"):
            continue
        assert hasattr(real, name), name
        for member in getattr(value, "__members__", ()):
            assert hasattr(getattr(real, name), member), f"{name}.{member}"
        checked += 1
    assert checked > 20
