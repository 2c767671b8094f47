"""Weight-only quantization in groups, as standard ONNX: DequantizeLinear on int4 or int8 in front of a MatMul.

ONNX Runtime fuses the two into MatMulNBits, TensorRT compiles them. A group is ``size`` inputs of one output; it has
one scale, and (asymmetric) a zero point. A scale is not just the largest magnitude over the largest integer: from
several such starts, rounding and the scale that fits the rounded values best (least squares) take turns, and the start
with the smallest squared error wins. No calibration data is needed; with some, see exporters/weights/gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...models.precision import BITS

STARTS = (1.0, 0.92, 0.84, 0.76)  # of the range that is used, relative to the largest magnitude
ROUNDS = 2
Candidate = tuple[Tensor, Tensor, Tensor]  # integers [groups, size, n]; scales and zero points [groups, 1, n]
CHUNK = 1 << 22  # values that are worked on at a time


@dataclass(frozen=True)
class Quantized:
    """A matrix [in, out] in groups along its inputs."""

    values: np.ndarray  # int8 [in, out] (asymmetric: uint8), in the range of the integer type
    scales: np.ndarray  # float32 [in / size, out]
    zeros: np.ndarray | None  # uint8 [in / size, out], where asymmetric


def quantize(
    matrix: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float32,
    signed: bool = False,
) -> Quantized:
    """matrix [in, out], in a multiple of ``size``.

    ``scale_dtype``: what scales will be stored in, so that rounding them is part of the fit. ``signed``: scales may be
    negative, which makes better use of four bits, and which TensorRT does not take.
    """
    inner, outer = matrix.shape
    values = np.empty((inner, outer), np.int8 if symmetric else np.uint8)
    scales = np.empty((inner // size, outer), np.float32)
    zeros = None if symmetric else np.empty((inner // size, outer), np.uint8)
    step = max(1, CHUNK // inner)
    for at in range(0, outer, step):
        part = slice(at, min(at + step, outer))
        groups = matrix[:, part].float().reshape(inner // size, size, -1)
        if symmetric:
            found, scale, _ = fit_symmetric(groups, bits, scale_dtype, signed and bits < 8)
        else:
            found, scale, zero = fit_asymmetric(groups, bits, scale_dtype)
            assert zeros is not None
            zeros[:, part] = zero.squeeze(1).numpy().astype(np.uint8)
        values[:, part] = found.reshape(inner, -1).numpy().astype(values.dtype)
        scales[:, part] = scale.squeeze(1).numpy()
    return Quantized(values, scales, zeros)


def dequantize(q: Quantized) -> np.ndarray:
    """What the graph computes: float32 [in, out]."""
    groups, outer = q.scales.shape
    values = q.values.reshape(groups, -1, outer).astype(np.float32)
    if q.zeros is not None:
        values = values - q.zeros[:, None]
    return (values * q.scales[:, None]).reshape(-1, outer)


def fit_symmetric(
    groups: Tensor, bits: int, scale_dtype: torch.dtype, signed: bool, importance: Tensor | None = None
) -> Candidate:
    """groups [groups, size, n] -> integers of that shape, scales and zero points (which are 0) [groups, 1, n].

    There is one more negative integer than positive ones: a scale's sign puts the value of largest magnitude there.
    ``importance`` [groups, size, 1]: what the squared error of a value counts; None: all the same.
    """
    low, high = limits(bits, True)
    if signed:
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / low  # with its sign
    else:
        largest = groups.abs().amax(1, keepdim=True) / high
    start = torch.where(largest == 0, torch.ones_like(largest), largest)

    def fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        scale = _stored(scale, scale_dtype)
        return (groups / scale).round_().clamp_(low, high), scale

    def candidates() -> Iterator[Candidate]:
        for factor in STARTS if bits < 8 else STARTS[:1]:
            q, scale = fit(start * factor)
            for _ in range(ROUNDS if bits < 8 else 0):
                weighted = q if importance is None else q * importance
                power = (weighted * q).sum(1, keepdim=True)
                q, scale = fit(
                    torch.where(power > 0, (weighted * groups).sum(1, keepdim=True) / power, scale)
                )
            yield q, scale, torch.zeros_like(scale)

    return _closest(groups, candidates(), importance)


def fit_asymmetric(
    groups: Tensor, bits: int, scale_dtype: torch.dtype, importance: Tensor | None = None
) -> Candidate:
    """As fit_symmetric, over 0 ... 2**bits - 1, with zero points in that range."""
    _, high = limits(bits, False)
    least = groups.amin(1, keepdim=True).clamp(max=0)
    most = groups.amax(1, keepdim=True).clamp(min=0)

    def candidates() -> Iterator[Candidate]:
        for factor in STARTS if bits < 8 else STARTS[:1]:
            scale = _stored(
                ((most - least) * factor / high).clamp(min=torch.finfo(scale_dtype).tiny), scale_dtype
            )
            zero = (-least * factor / scale).round_().clamp_(0, high)
            yield ((groups / scale).round_() + zero).clamp_(0, high), scale, zero

    return _closest(groups, candidates(), importance)


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest integer."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def _closest(groups: Tensor, candidates: Iterator[Candidate], importance: Tensor | None) -> Candidate:
    """Of each group the candidate with the smallest squared error, the first of equal ones."""
    best = next(candidates)
    smallest = _error(groups, best, importance)
    for found in candidates:
        error = _error(groups, found, importance)
        better = error < smallest
        q, scale, zero = (torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        best = (q, scale, zero)
        smallest = torch.minimum(error, smallest)
    return best


def _error(groups: Tensor, found: Candidate, importance: Tensor | None) -> Tensor:
    q, scale, zero = found
    squares = ((q - zero) * scale - groups).square_()
    return (squares if importance is None else squares * importance).sum(1, keepdim=True)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be read, none of them 0."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded == 0, torch.full_like(rounded, torch.finfo(dtype).tiny), rounded)


class Lazy:
    """The initializers of one quantized matrix: computed when the first one is written, forgotten after the last."""

    def __init__(self, name: str, stored: str, read: Callable[[], Quantized]):
        self.name = name
        self.stored = stored
        self._read = read
        self._found: Quantized | None = None
        self._open: set[str] = set()

    def value(self, kind: str, dtype: ir.DataType, *sizes: int) -> ir.Value:
        """An initializer of that shape with the part ``kind`` of the matrix: "values", "scales" or "zeros"."""
        name = f"{self.name}.{self.stored if kind == 'values' else kind}"
        shape = ir.Shape(sizes)

        def read() -> ir.TensorProtocol:
            if self._found is None:
                self._found = self._read()
                self._open = {"values", "scales"} | ({"zeros"} if self._found.zeros is not None else set())
            array = np.ascontiguousarray(getattr(self._found, kind)).reshape(sizes)
            self._open.discard(kind)
            self._found = self._found if self._open else None
            return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)

        tensor = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)


def integer_type(stored: str, symmetric: bool) -> ir.DataType:
    """The ONNX type of "int8" or "int4" values."""
    return ir.DataType[("" if symmetric else "U") + f"INT{BITS[stored]}"]
