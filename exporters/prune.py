"""The pruning predictor as an ONNX graph: PixelPrune's prediction of tokens from their neighbours, on raw uint8 pixels.

Algorithm: PixelPrune (OPPO-Mente-Lab). A token is a block of the image. With A = left, B = above, C = above-left of a
token X, ``pred_2d`` predicts X from B if C matches A and C does not match B, otherwise from A; the first row from the
left, the first column from above. ``raster`` and ``serpentine`` predict a token from the one before it in that scan.
X is dropped if it matches its prediction; the first token is kept. ``unique`` (not of PixelPrune) is in unique.py.

Tokens match if their distance is at most the threshold, an integer in the unit of the metric (metrics.py). Compared
are the tokens themselves (sliding), or what a decoder would rebuild of them (anchored). Where every match between
neighbours is exact both are the same, and distances between neighbours are all that is computed from pixels; otherwise
anchored.py goes along the chains of predictions.

Compaction is CumSum + ScatterElements: NonZero would need a data-dependent shape, which TensorRT refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ..models.config import PRUNE_GRAPHS
from . import anchored, unique
from .dialects import Dialect
from .graphs import clean
from .metrics import Metric
from .tape import Ops

IR_VERSION = 10
Branch = Callable[[Ops], ir.Value]


def prune_graph(block: int, dialect: Dialect, method: str = "pred_2d", metric: str = "max") -> ir.Model:
    """The predictor for tokens of ``block`` x ``block`` pixels.

    Inputs: image uint8 [H, W, 3], H and W multiples of block; threshold int32 [1], at least 0; anchored int32 [1], 0 or
    1 (both not for method "unique"). Outputs: order int32 [N], the kept token indices in raster order and then the
    dropped ones; count int32 [1], how many are kept. N = (H / block) * (W / block).
    """
    assert (method, metric) in PRUNE_GRAPHS
    op = Ops()
    image = ir.val("image", ir.DataType.UINT8, ["H", "W", 3])
    pixels = op("Cast", image, to=ir.DataType.FLOAT) if dialect.cast_first else image
    grid = Grid(op, pixels, block)
    settings, constants = [], []
    if method == "unique":
        keep, table = unique.kept(op, grid.tokens(op), block, dialect.cast_first)
        constants.append(table)
    else:
        settings = [ir.val(name, ir.DataType.INT32, [1]) for name in ("threshold", "anchored")]
        keep = _predicted(op, grid, Metric(metric, block, dialect.cast_first), method, *settings)
    index = op("Range", op.const(0), grid.total, op.const(1))
    order, count = _compact(op, op("Or", keep, op("Equal", index, op.const(0))), index)
    for value, name, shape in ((order, "order", ["N"]), (count, "count", [1])):
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.INT32), ir.Shape(shape)
    graph = ir.Graph(
        [image, *settings],
        [order, count],
        nodes=op.nodes,
        initializers=constants,
        name="prune",
        opset_imports={"": dialect.opset},
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ppexport")
    for step in dialect.passes:
        step(model)
    clean(model)
    return model


def _predicted(
    op: Ops, grid: Grid, distance: Metric, method: str, threshold: ir.Value, wants_anchors: ir.Value
) -> ir.Value:
    """Which tokens do not match their prediction, bool [N]."""
    limit = distance.limit(op, threshold)
    used: tuple[ir.Value, ...]
    if method == "pred_2d":
        used = grid.distances(op, distance)
        drop = _pred_2d(op, grid, *(op("LessOrEqual", d, limit) for d in used))
    else:
        used = (_before(op, grid, distance, method),)
        drop = op("LessOrEqual", used[0], limit)
    drop = op("Reshape", drop, op.ints([-1]))
    drifts = op("Greater", wants_anchors, op("Cast", op.const(0), to=ir.DataType.INT32))
    drifts = op("And", drifts, _inexact(op, used, limit, distance))
    if distance.as_float:  # TensorRT takes no Loop inside of an If, but one that ends before its first step
        once = op("Cast", op("Squeeze", drifts), to=ir.DataType.INT64)
        kept = _kept_anchors(op, grid, distance, limit, method, once)
        return op("Or", op("And", drifts, kept), op("Not", op("Or", drifts, drop)))
    one = op.const(1)
    then = lambda inner: _kept_anchors(inner, grid, distance, limit, method, one)  # noqa: E731
    return _if(op, drifts, then, lambda inner: inner("Not", drop))


class Grid:
    """The image as rows x cols tokens, and what of it the methods look at."""

    def __init__(self, op: Ops, pixels: ir.Value, block: int):
        self.pixels, self.block, self.segment = pixels, block, block * 3
        self.height = _size(op, pixels, 0)
        self.rows, self.cols = (op("Div", _size(op, pixels, axis), op.ints([block])) for axis in (0, 1))  # int64 [1]
        self.row_count, self.col_count = (op("Squeeze", n) for n in (self.rows, self.cols))  # scalars
        self.total = op("Mul", self.row_count, self.col_count)
        lines = op("Concat", self.height, self.cols, op.ints([self.segment]), axis=0)
        self.by_line = op("Reshape", pixels, lines)  # [H, cols, segment], contiguous bytes of one pixel row of a token
        self.by_row = op("Reshape", pixels, op("Concat", self.rows, op.ints([-1]), axis=0))
        self.lines = lines
        self.shape = op("Concat", self.rows, op.ints([block]), self.cols, axis=0)

    def distances(self, op: Ops, distance: Metric) -> tuple[ir.Value, ir.Value]:
        """Of each token to its left and upper neighbour, [rows, cols] each (0 where none is)."""
        before = op("Gather", self.by_line, _previous(op, self.col_count), axis=1)
        left = distance.difference(op, self.by_line, before)
        above = distance.difference(op, self.by_row, op("Gather", self.by_row, _previous(op, self.row_count), axis=0))
        above = op("Reshape", above, self.lines)
        return distance.of_lines(op, left, self.shape), distance.of_lines(op, above, self.shape)

    def wrap(self, op: Ops, distance: Metric) -> ir.Value:
        """The distance of the first token of each row to the last one of the row before, [rows, 1]."""
        shape = op("Concat", self.rows, op.ints([self.block, self.segment]), axis=0)
        first, last = (
            op("Reshape", op("Gather", self.by_line, column, axis=1), shape)
            for column in (op.const(0), op("Sub", self.col_count, op.const(1)))
        )
        last = op("Gather", last, _previous(op, self.row_count), axis=0)
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


def _previous(op: Ops, length: ir.Value) -> ir.Value:
    """0, 0, 1, 2, ... length - 2: the index of the neighbour before each position, the first being its own."""
    steps = op("Range", op.const(-1), op("Sub", length, op.const(1)), op.const(1))
    return op("Max", steps, op.const(0))


def _odd(op: Ops, number: ir.Value) -> ir.Value:
    half = op("Div", number, op.const(2))
    return op("Greater", number, op("Mul", half, op.const(2)))


def _pred_2d(op: Ops, grid: Grid, left: ir.Value, above: ir.Value) -> ir.Value:
    """Match maps bool [rows, cols] -> which tokens match their prediction, bool [rows, cols].

    C against A is the match "above" of the token A, and C against B the match "left" of the token B.
    """
    row, col = grid.places(op)
    c_matches_a = op("Gather", above, _previous(op, grid.col_count), axis=1)
    c_matches_b = op("Gather", left, _previous(op, grid.row_count), axis=0)
    edge = op("And", op("And", c_matches_a, op("Not", c_matches_b)), op("Greater", row, op.const(0)))
    from_above = op("Or", edge, op("Equal", col, op.const(0)))
    return op("Or", op("And", from_above, above), op("And", op("Not", from_above), left))


def _before(op: Ops, grid: Grid, distance: Metric, method: str) -> ir.Value:
    """The distance of each token to the one before it in a scan, [rows, cols]."""
    row, col = grid.places(op)
    left, above = grid.distances(op, distance)
    first = op("Equal", col, op.const(0))
    if method == "raster":
        return op("Where", first, grid.wrap(op, distance), left)
    last = op("Equal", col, op("Sub", grid.col_count, op.const(1)))
    following = op("Add", op("Range", op.const(0), grid.col_count, op.const(1)), op.const(1))
    following = op("Min", following, op("Sub", grid.col_count, op.const(1)))
    forth = op("Where", first, above, left)
    back = op("Where", last, above, op("Gather", left, following, axis=1))
    return op("Where", _odd(op, row), back, forth)


def _scan_order(op: Ops, grid: Grid, method: str) -> ir.Value:
    """Positions in the order of a scan, int64 [N]."""
    index = op("Range", op.const(0), grid.total, op.const(1))
    if method == "raster":
        return index
    row = op("Div", index, grid.col_count)
    col = op("Sub", index, op("Mul", row, grid.col_count))
    back = op("Sub", op("Sub", grid.col_count, op.const(1)), col)
    return op("Add", op("Mul", row, grid.col_count), op("Where", _odd(op, row), back, col))


def _inexact(op: Ops, used: tuple[ir.Value, ...], limit: ir.Value, distance: Metric) -> ir.Value:
    """Is there a match that is not exact? bool [1]."""
    found = []
    for d in used:
        close = op("And", op("Greater", d, op("Cast", op.const(0), to=distance.dtype)), op("LessOrEqual", d, limit))
        flat = op("Reshape", op("Cast", close, to=ir.DataType.INT32), op.ints([-1]))
        found.append(op("ReduceMax", flat, op.ints([0]), keepdims=1))
    most = found[0] if len(found) == 1 else op("Max", *found)
    return op("Greater", most, op("Cast", op.const(0), to=ir.DataType.INT32))


def _kept_anchors(op: Ops, grid: Grid, distance: Metric, limit: ir.Value, method: str, times: ir.Value) -> ir.Value:
    """Which tokens are their own anchor, bool [N]."""
    tokens = grid.tokens(op)
    if method == "pred_2d":
        anchors = anchored.wavefront(op, tokens, grid.row_count, grid.col_count, distance, limit, times)
    else:
        anchors = anchored.scan(op, tokens, _scan_order(op, grid, method), distance, limit, times)
    return op("Equal", anchors, op("Range", op.const(0), grid.total, op.const(1)))


def _if(op: Ops, condition: ir.Value, then: Branch, otherwise: Branch) -> ir.Value:
    """One bool [N] or the other; only the chosen branch is computed."""
    graphs = []
    for name, branch in (("then", then), ("else", otherwise)):
        inner = Ops(f"{name}_")
        value = branch(inner)
        value.type, value.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape(["N"])
        graphs.append(ir.Graph([], [value], nodes=inner.nodes, name=name))
    return op("If", op("Squeeze", condition), then_branch=graphs[0], else_branch=graphs[1])


def _compact(op: Ops, keep: ir.Value, index64: ir.Value) -> tuple[ir.Value, ir.Value]:
    """keep bool [N] -> order int32 [N] (kept indices, then the dropped ones, both rising), count int32 [1]."""
    kept = op("Cast", keep, to=ir.DataType.INT32)
    kept.type = ir.TensorType(ir.DataType.INT32)
    count = op("ReduceSum", kept, op.ints([0]), keepdims=1)
    upto = op("CumSum", kept, op.const(0))  # kept tokens up to and including each position
    upto.type = kept.type
    index = op("Cast", index64, to=ir.DataType.INT32)
    one = op("Cast", op.const(1), to=ir.DataType.INT32)
    place = op("Where", keep, op("Sub", upto, one), op("Add", count, op("Sub", index, upto)))
    return op("ScatterElements", index, place, index, axis=0), count
