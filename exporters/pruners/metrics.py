"""How far two tokens lie apart, in exact integers: metrics max, mae and rmse on bytes.

max is the largest difference of two bytes, mae the sum of the differences, rmse the sum of their squares; thresholds
are integers in the same unit (runtime/prune.py), so neither a mean nor a root is ever taken. float32 holds every sum
of one pixel row of a block exactly (at most 96 * 255**2 < 2**24), int32 that of all rows (3072 * 255**2 < 2**31).
"""

from __future__ import annotations

import onnx_ir as ir

from ..lowering.dialects import Dialect
from ..lowering.onnx_writer import Ops


class Metric:
    """Distances under one metric. ``op`` writes the nodes; values of the outer graph may be used in a subgraph's."""

    def __init__(self, name: str, block: int, dialect: Dialect):
        self.name = name
        self.block = block
        self.as_float = dialect.cast_first
        self.byte_max = dialect.byte_max
        small = ir.DataType.FLOAT if self.as_float else ir.DataType.UINT8
        self.dtype = small if name == "max" else ir.DataType.INT32  # of distances

    def limit(self, op: Ops, threshold: ir.Value) -> ir.Value:
        """The threshold int32 [1] in the type of the distances."""
        return op("Cast", threshold, to=self.dtype)

    def difference(self, op: Ops, a: ir.Value, b: ir.Value) -> ir.Value:
        """Per byte; a and b are uint8, where subtraction wraps around, or float32 with the same values.

        Without Max and Min on bytes: a - b, times 255 where a < b, which is -1 modulo 256.
        """
        if self.as_float:
            difference = op("Abs", op("Sub", a, b))
        elif self.byte_max:
            difference = op("Sub", op("Max", a, b), op("Min", a, b))
        else:
            smaller = op("Cast", op("Less", a, b), to=ir.DataType.UINT8)
            sign = op("Sub", op.uint8(1), op("Mul", smaller, op.uint8(2)))
            difference = op("Mul", op("Sub", a, b), sign)
        if self.name == "max":
            return difference
        wide = difference if self.as_float else op("Cast", difference, to=ir.DataType.FLOAT)
        return wide if self.name == "mae" else op("Mul", wide, wide)

    def of_lines(self, op: Ops, difference: ir.Value, grid: ir.Value) -> ir.Value:
        """Differences [rows * block, cols, segment] -> distances [rows, cols]; grid: int64 [rows, block, cols]."""
        return self._sum_lines(op, op("Reshape", self._line(op, difference), grid))

    def of_tokens(self, op: Ops, difference: ir.Value) -> ir.Value:
        """Differences [n, block * segment] -> distances [n]."""
        lines = op("Reshape", difference, op.ints([0, self.block, -1]))
        return self._sum_lines(op, self._line(op, lines))

    def _line(self, op: Ops, difference: ir.Value) -> ir.Value:
        """Over the last axis of three."""
        if self.name == "max":
            return op("ReduceMax", difference, op.ints([2]), keepdims=0)
        return op("Cast", op("ReduceSum", difference, op.ints([2]), keepdims=0), to=ir.DataType.INT32)

    def _sum_lines(self, op: Ops, lines: ir.Value) -> ir.Value:
        return op("ReduceMax" if self.name == "max" else "ReduceSum", lines, op.ints([1]), keepdims=0)
