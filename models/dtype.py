"""The types of numbers, by all the names that files and packages have for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dtype:
    """One type of numbers."""

    name: str  # as torch and numpy name it
    nbytes: int  # of a value
    onnx: int  # onnx.TensorProto.DataType
    precision: str | None = None  # as users name it
    safetensors: str | None = None

    @property
    def numpy(self) -> Any:
        """The type of host arrays; raises TypeError for bfloat16, which numpy has not."""
        import numpy as np

        return np.dtype(self.name)


DTYPES = (
    Dtype("uint8", 1, 2),
    Dtype("int32", 4, 6),
    Dtype("float16", 2, 10, "fp16", "F16"),
    Dtype("float32", 4, 1, "fp32", "F32"),
    Dtype("bfloat16", 2, 16, "bf16", "BF16"),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_PRECISION = {dtype.precision: dtype for dtype in DTYPES if dtype.precision is not None}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES if dtype.safetensors is not None}
