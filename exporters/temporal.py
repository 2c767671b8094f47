"""Prediction from the frame before: drops tokens of a frame that are what they were, after spatial prediction.

A token is compared with the same place of a reference image: the frame before (sliding), or what the token was when it
last differed (anchored), which is the output ``fresh`` for the next frame. So what is shown for a dropped token is at
most tau away from it, and at most 2 tau where the token it was repeated from had itself been predicted in space.
"""

from __future__ import annotations

import onnx_ir as ir

from .dialects import Dialect
from .metrics import Metric
from .prune import compact, finish, image_input, output
from .tape import Ops


def temporal_graph(block: int, dialect: Dialect, metric: str = "max") -> ir.Model:
    """Takes tokens that match their predecessors out of a selection.

    Inputs: image and reference, uint8 [H, W, 3]; threshold int32 [1]; spatial_order int32 [N] and spatial_count
    int32 [1], what a graph of prune.py chose in the image. Outputs: order int32 [N] and count int32 [1] (maybe 0) as
    those; fresh uint8 [H, W, 3], the reference with the tokens of the image in it that do not match.
    """
    op = Ops()
    image, grid = image_input(op, dialect, block)
    reference, before = image_input(op, dialect, block, "reference")
    threshold, count = (ir.val(name, ir.DataType.INT32, [1]) for name in ("threshold", "spatial_count"))
    order = ir.val("spatial_order", ir.DataType.INT32, ["N"])
    measure = Metric(metric, block, dialect.cast_first)
    difference = measure.difference(op, grid.by_line, before.by_line)
    match = op("LessOrEqual", measure.of_lines(op, difference, grid.shape), measure.limit(op, threshold))
    index = op("Range", op.const(0), grid.total, op.const(1))
    rank = op("Cast", op("Less", op("Cast", index, to=ir.DataType.INT32), count), to=ir.DataType.INT32)
    spatial = op("ScatterElements", op("Sub", rank, rank), order, rank, axis=0)
    keep = op("And", op("Cast", spatial, to=ir.DataType.BOOL), op("Not", op("Reshape", match, op.ints([-1]))))
    order_after, count_after = compact(op, keep, index)
    mask = op("Unsqueeze", match, op.ints([1, 3]))
    tokens = op("Concat", grid.shape, op.ints([grid.segment]), axis=0)
    fresh = op("Where", mask, op("Reshape", before.pixels, tokens), op("Reshape", grid.pixels, tokens))
    fresh = op("Cast", op("Reshape", fresh, op("Shape", image)), to=ir.DataType.UINT8)
    inputs = [image, reference, threshold, order, count]
    outputs = [output(order_after, "order", "N"), output(count_after, "count", 1)]
    outputs.append(output(fresh, "fresh", "H", "W", 3, dtype=ir.DataType.UINT8))
    return finish(op, dialect, inputs, outputs)
