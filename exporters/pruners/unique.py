"""Keeps the first of all equal tokens of an image, wherever they lie: a selection without prediction, exact.

Tokens are hashed (sums of bytes times fixed small weights, exact in float32 and in TF32), sorted by hash, and compared
byte by byte with the one before them in that order. So a dropped token always equals a kept one; different tokens with
one hash are kept. Equal hashes keep their order (TopK does so), hence the first of a group is its first in the
image.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..lowering.dialects import Dialect
from ..lowering.onnx_writer import Ops
from .metrics import Metric

SUMS = 8  # with fewer, tokens that differ in two bytes of equal weights collide now and then
LARGEST = 21  # weight: 3072 bytes of 255 times 21 stay under 2**24


def weights(size: int) -> np.ndarray:
    """int8 [size, SUMS], always the same ones."""
    return np.random.default_rng(20).integers(-LARGEST, LARGEST + 1, (size, SUMS)).astype(np.int8)


def kept(op: Ops, tokens: ir.Value, block: int, dialect: Dialect) -> tuple[ir.Value, ir.Value]:
    """tokens [N, 3 * block**2], uint8 or the same values as float32 -> keep bool [N] and the initializer of weights."""
    as_float = dialect.cast_first
    values = weights(3 * block**2)
    table = ir.val("hash_weights", const_value=ir.tensor(values.astype(np.float32) if as_float else values))
    table.const_value.name = "hash_weights"  # type: ignore[union-attr]
    sums = op("MatMul", tokens, table) if as_float else op("MatMulInteger", tokens, table)
    sums = op("Cast", sums, to=ir.DataType.INT64)
    keys = None
    for i, factor in enumerate(np.random.default_rng(21).integers(1 << 40, 1 << 62, SUMS) | 1):
        part = op("Mul", op("Gather", sums, op.const(i), axis=1), op.const(int(factor)))  # int64 wraps around
        keys = part if keys is None else op("Add", keys, part)  # ReduceSum would go through floating point
    assert keys is not None
    count = op("Shape", keys)
    found, place = op.multi("TopK", 2, keys, count, axis=0, largest=0, sorted=1)
    before = op(
        "Max",
        op("Range", op.const(-1), op("Sub", op("Squeeze", count), op.const(1)), op.const(1)),
        op.const(0),
    )
    same_key = op("Equal", found, op("Gather", found, before))
    row = op("Gather", tokens, place, axis=0)
    previous = op("Gather", tokens, op("Gather", place, before), axis=0)
    distance = Metric("max", block, dialect)
    apart = distance.difference(op, row, previous)
    zero = op("Cast", op.const(0), to=distance.dtype)
    same = op("And", same_key, op("Equal", op("ReduceMax", apart, op.ints([1]), keepdims=0), zero))
    first = op(
        "Not",
        op(
            "And",
            same,
            op("Greater", op("Range", op.const(0), op("Squeeze", count), op.const(1)), op.const(0)),
        ),
    )
    as_int = op("Cast", first, to=ir.DataType.INT32)
    keep = op("ScatterElements", op("Sub", as_int, as_int), place, as_int, axis=0)
    return op("Cast", keep, to=ir.DataType.BOOL), table
