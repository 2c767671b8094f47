"""The pruning predictor as an ONNX graph: PixelPrune's two-dimensional prediction on raw uint8 pixels.

Algorithm: PixelPrune (OPPO-Mente-Lab), method pred_2d, metric max, compared with the raw neighbour. With A = left,
B = above, C = above-left of a block X: X is predicted from B if C matches A and C does not match B, otherwise from A;
the first row from the left, the first column from above. X is dropped if it matches its prediction; (0, 0) is kept.
Two blocks match if no byte differs by more than the threshold. C against A is the match "above" of the block A, and C
against B the match "left" of the block B, so two maps of distances are all that is computed from pixels.

Compaction is CumSum + ScatterElements: NonZero would need a data-dependent shape, which TensorRT refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .dialects import Dialect
from .graphs import clean
from .tape import Ops

Distance = Callable[[ir.Value, ir.Value], ir.Value]
IR_VERSION = 10


def prune_graph(block: int, dialect: Dialect) -> ir.Model:
    """The predictor for tokens of ``block`` x ``block`` pixels.

    Inputs: image uint8 [H, W, 3], H and W multiples of block; threshold int32 [1], 0 ... 255.
    Outputs: order int32 [N], the kept token indices in raster order and then the dropped ones; count int32 [1], how
    many are kept. N = (H / block) * (W / block).
    """
    op = Ops()
    image = ir.val("image", ir.DataType.UINT8, ["H", "W", 3])
    threshold = ir.val("threshold", ir.DataType.INT32, [1])
    pixels: ir.Value = image
    if dialect.cast_first:
        pixels, distance = op("Cast", image, to=ir.DataType.FLOAT), _float_distance(op)
    else:
        distance = _uint8_distance(op)
    left, above = _distances(op, pixels, block, distance)
    limit = op("Cast", threshold, to=ir.DataType.FLOAT if dialect.cast_first else ir.DataType.UINT8)
    keep = _predict(op, op("LessOrEqual", left, limit), op("LessOrEqual", above, limit))
    order, count = _compact(op, keep)
    for value, name, shape in ((order, "order", ["N"]), (count, "count", [1])):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.INT32), ir.Shape(shape)
    graph = ir.Graph(
        [image, threshold], [order, count], nodes=op.nodes, name="prune", opset_imports={"": dialect.opset}
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ppexport")
    for step in dialect.passes:
        step(model)
    clean(model)
    return model


def _uint8_distance(op: Ops) -> Distance:
    """|a - b| on bytes, where subtraction wraps around. Twice as fast as a Where over both differences."""
    return lambda a, b: op("Sub", op("Max", a, b), op("Min", a, b))


def _float_distance(op: Ops) -> Distance:
    return lambda a, b: op("Abs", op("Sub", a, b))


def _size(op: Ops, x: ir.Value, axis: int) -> ir.Value:
    """The length of an axis, int64 [1]."""
    return op("Shape", x, start=axis, end=axis + 1)


def _previous(op: Ops, length: ir.Value) -> ir.Value:
    """0, 0, 1, 2, ... length - 2: the index of the neighbour before each position, the first being its own."""
    steps = op("Range", op.const(-1), op("Sub", op("Squeeze", length), op.const(1)), op.const(1))
    return op("Max", steps, op.const(0))


def _distances(op: Ops, pixels: ir.Value, block: int, distance: Distance) -> tuple[ir.Value, ir.Value]:
    """Largest byte distance of each block to its left and upper neighbour, [rows, cols] each (0 where none is)."""
    segment = block * 3  # bytes of one pixel row of a block, contiguous in memory
    H = _size(op, pixels, 0)
    rows, cols = (op("Div", _size(op, pixels, axis), op.ints([block])) for axis in (0, 1))
    lines = op("Concat", H, cols, op.ints([segment]), axis=0)  # [H, cols, segment]
    grid = op("Concat", rows, op.ints([block]), cols, axis=0)  # [rows, block, cols]

    def largest(difference: ir.Value) -> ir.Value:
        per_line = op("ReduceMax", difference, op.ints([2]), keepdims=0)  # [H, cols]
        return op("ReduceMax", op("Reshape", per_line, grid), op.ints([1]), keepdims=0)

    by_line = op("Reshape", pixels, lines)
    left = distance(by_line, op("Gather", by_line, _previous(op, cols), axis=1))
    by_row = op("Reshape", pixels, op("Concat", rows, op.ints([-1]), axis=0))
    above = distance(by_row, op("Gather", by_row, _previous(op, rows), axis=0))
    return largest(left), largest(op("Reshape", above, lines))


def _predict(op: Ops, left: ir.Value, above: ir.Value) -> ir.Value:
    """Match maps bool [rows, cols] -> keep map bool [N], in raster order."""
    rows, cols = _size(op, left, 0), _size(op, left, 1)
    row, col = (op("Range", op.const(0), op("Squeeze", n), op.const(1)) for n in (rows, cols))
    inner_row = op("Unsqueeze", op("Greater", row, op.const(0)), op.ints([1]))
    first_col = op("Equal", col, op.const(0))
    c_matches_a = op("Gather", above, _previous(op, cols), axis=1)
    c_matches_b = op("Gather", left, _previous(op, rows), axis=0)
    edge = op("And", op("And", c_matches_a, op("Not", c_matches_b)), inner_row)
    from_above = op("Or", edge, first_col)
    drop = op("Or", op("And", from_above, above), op("And", op("Not", from_above), left))
    flat = op("Reshape", drop, op.ints([-1]))
    index = op("Range", op.const(0), op("Squeeze", op("Mul", rows, cols)), op.const(1))
    return op("Or", op("Not", flat), op("Equal", index, op.const(0)))


def _compact(op: Ops, keep: ir.Value) -> tuple[ir.Value, ir.Value]:
    """keep bool [N] -> order int32 [N] (kept indices, then the dropped ones, both rising), count int32 [1]."""
    kept = op("Cast", keep, to=ir.DataType.INT32)
    kept.type = ir.TensorType(ir.DataType.INT32)
    count = op("ReduceSum", kept, op.ints([0]), keepdims=1)
    upto = op("CumSum", kept, op.const(0))  # kept tokens up to and including each position
    upto.type = kept.type
    index64 = op("Range", op.const(0), op("Squeeze", op("Shape", keep)), op.const(1))
    index = op("Cast", index64, to=ir.DataType.INT32)
    one = op("Cast", op.const(1), to=ir.DataType.INT32)
    place = op("Where", keep, op("Sub", upto, one), op("Add", count, op("Sub", index, upto)))
    return op("ScatterElements", index, place, index, axis=0), count
