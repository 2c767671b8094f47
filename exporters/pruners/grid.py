"""An image as rows x cols tokens in a graph, and what of it the pruning methods look at."""

from __future__ import annotations

import onnx_ir as ir

from ..lowering.onnx_writer import Ops
from .metrics import Metric


class Grid:
    """The image as rows x cols tokens, and what of it the methods look at."""

    def __init__(self, op: Ops, pixels: ir.Value, block: int):
        self.pixels = pixels
        self.block = block
        self.segment = block * 3
        self.height = _size(op, pixels, 0)
        self.rows, self.cols = (
            op("Div", _size(op, pixels, axis), op.ints([block])) for axis in (0, 1)
        )  # int64 [1]
        self.row_count, self.col_count = (op("Squeeze", n) for n in (self.rows, self.cols))  # scalars
        self.total = op("Mul", self.row_count, self.col_count)
        lines = op("Concat", self.height, self.cols, op.ints([self.segment]), axis=0)
        self.by_line = op(
            "Reshape", pixels, lines
        )  # [H, cols, segment], contiguous bytes of one pixel row of a token
        self.by_row = op("Reshape", pixels, op("Concat", self.rows, op.ints([-1]), axis=0))
        self.lines = lines
        self.shape = op("Concat", self.rows, op.ints([block]), self.cols, axis=0)

    def distances(self, op: Ops, distance: Metric) -> tuple[ir.Value, ir.Value]:
        """Of each token to its left and upper neighbour, [rows, cols] each (0 where none is)."""
        before = op("Gather", self.by_line, previous(op, self.col_count), axis=1)
        left = distance.difference(op, self.by_line, before)
        above = distance.difference(
            op, self.by_row, op("Gather", self.by_row, previous(op, self.row_count), axis=0)
        )
        above = op("Reshape", above, self.lines)
        return distance.of_lines(op, left, self.shape), distance.of_lines(op, above, self.shape)

    def wrap(self, op: Ops, distance: Metric) -> ir.Value:
        """The distance of the first token of each row to the last one of the row before, [rows, 1]."""
        shape = op("Concat", self.rows, op.ints([self.block, self.segment]), axis=0)
        first, last = (
            op("Reshape", op("Gather", self.by_line, column, axis=1), shape)
            for column in (op.const(0), op("Sub", self.col_count, op.const(1)))
        )
        last = op("Gather", last, previous(op, self.row_count), axis=0)
        flat = op("Concat", self.rows, op.ints([-1]), axis=0)
        found = distance.of_tokens(op, op("Reshape", distance.difference(op, first, last), flat))
        return op("Unsqueeze", found, op.ints([1]))

    def tokens(self, op: Ops) -> ir.Value:
        """All pixels, token by token: [N, block * segment]."""
        shape = op("Concat", self.rows, op.ints([self.block]), self.cols, op.ints([self.segment]), axis=0)
        blocks = op("Transpose", op("Reshape", self.pixels, shape), perm=[0, 2, 1, 3])
        return op("Reshape", blocks, op.ints([-1, self.block * self.segment]))

    def places(self, op: Ops) -> tuple[ir.Value, ir.Value]:
        """Row numbers [rows, 1] and column numbers [1, cols]."""
        row, col = (op("Range", op.const(0), n, op.const(1)) for n in (self.row_count, self.col_count))
        return op("Unsqueeze", row, op.ints([1])), op("Unsqueeze", col, op.ints([0]))


def _size(op: Ops, x: ir.Value, axis: int) -> ir.Value:
    """The length of an axis, int64 [1]."""
    return op("Shape", x, start=axis, end=axis + 1)


def previous(op: Ops, length: ir.Value) -> ir.Value:
    """0, 0, 1, 2, ... length - 2: the index of the neighbour before each position, the first being its own."""
    steps = op("Range", op.const(-1), op("Sub", length, op.const(1)), op.const(1))
    return op("Max", steps, op.const(0))


def odd(op: Ops, number: ir.Value) -> ir.Value:
    """Is an integer that is not negative odd?"""
    half = op("Div", number, op.const(2))
    return op("Greater", number, op("Mul", half, op.const(2)))
