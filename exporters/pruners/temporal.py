"""Prediction of a frame from the one before and from itself, in one: what a token was, or what its neighbour is.

A token is dropped if it matches what was shown at its place for the frame before; if not, pred_2d decides.
Anchored, both compare with what is shown for a token when it is dropped: what was shown there before, or what is shown
for the neighbour that it repeats. That is always an original token of this or an earlier frame, so its error never
exceeds tau, however long the recording. The state is again an index per position, into the tokens of the image and of
what was shown before. Sliding, tokens are compared with the frame before and the neighbours as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...models.pruners.pixelprune import PRUNE_METRICS, graph_name
from ..lowering.dialects import Dialect
from ..lowering.onnx_writer import Ops
from . import anchored
from .grid import Grid
from .metrics import Metric
from .pixelprune import compact, either, finish, from_above, image_input, inexact, output

if TYPE_CHECKING:
    from . import Sizes


def graphs(sizes: Sizes, dialect: Dialect) -> dict[str, ir.Model]:
    """Of every metric; see exporters/pruners/__init__.py."""
    return {
        graph_name("temporal", metric): temporal_graph(sizes.block, dialect, metric)
        for metric in PRUNE_METRICS
    }


def temporal_graph(block: int, dialect: Dialect, metric: str = "max") -> ir.Model:
    """pred_2d with another prediction from the frame before.

    Inputs: image uint8 [H, W, 3]; reference uint8 [H, W, 3], ``shown`` of the frame before; first int32 [1], 1 if
    there is none (the reference is not looked at), else 0; threshold and anchored as for ``prune_graph``. Outputs:
    order int32 [N] and count int32 [1] (maybe 0) as there; shown uint8 [H, W, 3], what stands for each token (sliding:
    the image).
    """
    op = Ops()
    image, grid = image_input(op, dialect, block)
    reference, before = image_input(op, dialect, block, "reference")
    settings = [ir.val(name, ir.DataType.INT32, [1]) for name in ("first", "threshold", "anchored")]
    first, threshold, wants_anchors = settings
    measure = Metric(metric, block, dialect)
    limit = measure.limit(op, threshold)
    moved = measure.of_lines(op, measure.difference(op, grid.by_line, before.by_line), grid.shape)
    left, above = grid.distances(op, measure)
    left_match, above_match, still = (op("LessOrEqual", d, limit) for d in (left, above, moved))
    still = op("And", still, op("Not", op("Cast", first, to=ir.DataType.BOOL)))
    repeats = op(
        "LessOrEqual", op("Where", from_above(op, grid, left_match, above_match), above, left), limit
    )
    index = op("Range", op.const(0), grid.total, op.const(1))
    repeats, still = (op("Reshape", x, op.ints([-1])) for x in (repeats, still))
    repeats = op("And", repeats, op("Greater", index, op.const(0)))
    drifts = op(
        "And",
        op("Cast", wants_anchors, to=ir.DataType.BOOL),
        inexact(op, (left, above, moved), limit, measure),
    )
    tokens = op("Concat", grid.tokens(op), before.tokens(op), axis=0)
    settled = (still, op("Add", index, grid.total))

    def rows(inner: Ops, times: ir.Value) -> ir.Value:
        """Which of ``tokens`` is shown at each place."""
        sides = grid.row_count, grid.col_count
        return anchored.wavefront(inner, tokens, *sides, measure, limit, times, settled)

    if measure.as_float:
        found = rows(op, op("Cast", op("Squeeze", drifts), to=ir.DataType.INT64))
        own = op("Equal", found, index)
        keep = op("Or", op("And", drifts, own), op("Not", op("Or", drifts, op("Or", still, repeats))))
        shown = op("Where", drifts, found, index)
    else:
        walk = lambda inner: _own(inner, rows(inner, op.const(1)), index)  # noqa: E731

        def at_once(inner: Ops) -> list[ir.Value]:
            return [inner("Not", inner("Or", still, repeats)), inner("Add", index, inner.const(0))]

        keep, shown = either(op, drifts, walk, at_once, [ir.DataType.BOOL, ir.DataType.INT64])
    order, count = compact(op, keep, index)
    picture = op(
        "Cast", _image_of(op, grid, op("Gather", tokens, shown, axis=0), image), to=ir.DataType.UINT8
    )
    outputs = [output(order, "order", "N"), output(count, "count", 1)]
    outputs.append(output(picture, "shown", "H", "W", 3, dtype=ir.DataType.UINT8))
    return finish(op, dialect, [image, reference, *settings], outputs)


def _own(op: Ops, found: ir.Value, index: ir.Value) -> Sequence[ir.Value]:
    """Which tokens stand for themselves, and what stands for each."""
    return [op("Equal", found, index), found]


def _image_of(op: Ops, grid: Grid, tokens: ir.Value, image: ir.Value) -> ir.Value:
    """Tokens [N, block * segment] -> [H, W, 3]."""
    shape = op("Concat", grid.rows, grid.cols, op.ints([grid.block, grid.segment]), axis=0)
    lines = op("Transpose", op("Reshape", tokens, shape), perm=[0, 2, 1, 3])
    return op("Reshape", lines, op("Shape", image))
