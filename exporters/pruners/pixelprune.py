"""The pruning predictor as an ONNX graph: PixelPrune's prediction of tokens from their neighbours, on raw uint8 pixels.

Algorithm: PixelPrune (OPPO-Mente-Lab). A token is a block of the image. With A = left, B = above, C = above-left of a
token X, ``pred_2d`` predicts X from B if C matches A and C does not match B, otherwise from A; the first row from the
left, the first column from above. ``raster`` and ``serpentine`` predict a token from the one before it in that scan.
X is dropped if it matches its prediction; the first token is kept. Not of PixelPrune are ``unique`` (unique.py),
``conncomp`` (conncomp.py) and the prediction from the frame before (temporal.py).

Tokens match if their distance is at most the threshold, an integer in the unit of the metric (metrics.py). Compared
are the tokens themselves (sliding), or what a decoder would rebuild of them (anchored). Where every match between
neighbours is exact both are the same, and distances between neighbours are all that is computed from pixels; otherwise
anchored.py goes along the chains of predictions.

Compaction is CumSum + ScatterElements: NonZero would need a data-dependent shape, which TensorRT refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...models.pruners.pixelprune import PRUNE_GRAPHS, graph_name
from ..graphs import clean
from ..lowering.dialects import Dialect
from ..lowering.onnx_writer import Ops
from . import anchored, conncomp, unique
from .grid import Grid, odd, previous
from .metrics import Metric

if TYPE_CHECKING:
    from . import Sizes

IR_VERSION = 10
PREDICTED = ("threshold", "anchored")  # inputs beside the image, where tokens are predicted
INPUTS = {"unique": (), "conncomp": ("threshold", "target", "seed")}
Branch = Callable[[Ops], Sequence[ir.Value]]


def graphs(sizes: Sizes, dialect: Dialect) -> dict[str, ir.Model]:
    """Of every method and metric; see exporters/pruners/__init__.py."""
    return {graph_name(*pair): prune_graph(sizes.block, dialect, *pair) for pair in PRUNE_GRAPHS}


def prune_graph(block: int, dialect: Dialect, method: str = "pred_2d", metric: str = "max") -> ir.Model:
    """The predictor for tokens of ``block`` x ``block`` pixels.

    Inputs: image uint8 [H, W, 3], H and W multiples of block; threshold int32 [1], at least 0 (not for "unique");
    where tokens are predicted, anchored int32 [1], 0 or 1; for "conncomp", target int32 [1], about how many to keep,
    and seed int32 [1], 0 ... 2**31 - 2. Outputs: order int32 [N], the kept token indices in raster order and then the
    dropped ones; count int32 [1], how many are kept; where tokens are predicted, distance int32 [N], how far each one
    lies from the neighbour that predicts it. N = (H / block) * (W / block).
    """
    assert (method, metric) in PRUNE_GRAPHS
    op = Ops()
    image, grid = image_input(op, dialect, block)
    settings = [ir.val(name, ir.DataType.INT32, [1]) for name in INPUTS.get(method, PREDICTED)]
    measure = Metric(metric, block, dialect)
    tables: list[ir.Value] = []
    extra: list[ir.Value] = []
    if method == "unique":
        keep, table = unique.kept(op, grid.tokens(op), block, dialect)
        tables.append(table)
    elif method == "conncomp":
        threshold, target, seed = settings
        limit = measure.limit(op, threshold)
        left, above = (op("LessOrEqual", d, limit) for d in grid.distances(op, measure))
        keep = conncomp.kept(op, left, above, grid.row_count, grid.col_count, target, seed)
    else:
        keep, found = _predicted(op, grid, measure, method, *settings)
        extra.append(output(found, "distance", "N"))
    index = op("Range", op.const(0), grid.total, op.const(1))
    order, count = compact(op, op("Or", keep, op("Equal", index, op.const(0))), index)
    outputs = [output(order, "order", "N"), output(count, "count", 1), *extra]
    return finish(op, dialect, [image, *settings], outputs, tables)


def image_input(op: Ops, dialect: Dialect, block: int, name: str = "image") -> tuple[ir.Value, Grid]:
    """The graph input ``name`` uint8 [H, W, 3] and its grid of tokens."""
    image = ir.val(name, ir.DataType.UINT8, ["H", "W", 3])
    return image, Grid(op, op("Cast", image, to=ir.DataType.FLOAT) if dialect.cast_first else image, block)


def output(value: ir.Value, name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.INT32) -> ir.Value:
    """The value as an output of its graph."""
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    return value


def finish(
    op: Ops,
    dialect: Dialect,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    tables: Sequence[ir.Value] = (),
) -> ir.Model:
    """The graph of what ``op`` recorded, with ``tables`` as its initializers."""
    opsets = {"": dialect.opset}
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, initializers=tables, name="prune", opset_imports=opsets)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="ppexport")
    for step in dialect.passes:
        step(model)
    clean(model)
    return model


def _predicted(
    op: Ops, grid: Grid, distance: Metric, method: str, threshold: ir.Value, wants_anchors: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Which tokens do not match their prediction, bool [N], and how far they lie from it as it is, int32 [N]."""
    limit = distance.limit(op, threshold)
    used: tuple[ir.Value, ...]
    if method == "pred_2d":
        used = left, above = grid.distances(op, distance)
        source = from_above(op, grid, *(op("LessOrEqual", d, limit) for d in used))
        found = op("Where", source, above, left)
    else:
        found = _before(op, grid, distance, method)
        used = (found,)
    found = op("Reshape", found, op.ints([-1]))
    drop = op("LessOrEqual", found, limit)
    found = op("Cast", found, to=ir.DataType.INT32)
    drifts = op("And", op("Cast", wants_anchors, to=ir.DataType.BOOL), inexact(op, used, limit, distance))
    if distance.as_float:  # TensorRT takes no Loop inside of an If, but one that ends before its first step
        once = op("Cast", op("Squeeze", drifts), to=ir.DataType.INT64)
        kept = _kept_anchors(op, grid, distance, limit, method, once)
        return op("Or", op("And", drifts, kept), op("Not", op("Or", drifts, drop))), found
    one = op.const(1)
    then = lambda inner: [_kept_anchors(inner, grid, distance, limit, method, one)]  # noqa: E731
    return either(op, drifts, then, lambda inner: [inner("Not", drop)], [ir.DataType.BOOL])[0], found


def from_above(op: Ops, grid: Grid, left: ir.Value, above: ir.Value) -> ir.Value:
    """Match maps bool [rows, cols] -> which tokens pred_2d predicts from above, bool [rows, cols].

    C against A is the match "above" of the token A, and C against B the match "left" of the token B.
    """
    row, col = grid.places(op)
    c_matches_a = op("Gather", above, previous(op, grid.col_count), axis=1)
    c_matches_b = op("Gather", left, previous(op, grid.row_count), axis=0)
    edge = op("And", op("And", c_matches_a, op("Not", c_matches_b)), op("Greater", row, op.const(0)))
    return op("Or", edge, op("Equal", col, op.const(0)))


def _before(op: Ops, grid: Grid, distance: Metric, method: str) -> ir.Value:
    """The distance of each token to the one before it in a scan, [rows, cols]."""
    row, col = grid.places(op)
    left, above = grid.distances(op, distance)
    first = op("Equal", col, op.const(0))
    if method == "raster":
        return op("Where", op("And", first, op("Greater", row, op.const(0))), grid.wrap(op, distance), left)
    last = op("Equal", col, op("Sub", grid.col_count, op.const(1)))
    following = op("Add", op("Range", op.const(0), grid.col_count, op.const(1)), op.const(1))
    following = op("Min", following, op("Sub", grid.col_count, op.const(1)))
    forth = op("Where", first, above, left)
    back = op("Where", last, above, op("Gather", left, following, axis=1))
    return op("Where", odd(op, row), back, forth)


def _scan_order(op: Ops, grid: Grid, method: str) -> ir.Value:
    """Positions in the order of a scan, int64 [N]."""
    index = op("Range", op.const(0), grid.total, op.const(1))
    if method == "raster":
        return index
    row = op("Div", index, grid.col_count)
    col = op("Sub", index, op("Mul", row, grid.col_count))
    back = op("Sub", op("Sub", grid.col_count, op.const(1)), col)
    return op("Add", op("Mul", row, grid.col_count), op("Where", odd(op, row), back, col))


def inexact(op: Ops, used: tuple[ir.Value, ...], limit: ir.Value, distance: Metric) -> ir.Value:
    """Is there a match that is not exact? bool [1]."""
    found = []
    for d in used:
        close = op(
            "And", op("Greater", d, op("Cast", op.const(0), to=distance.dtype)), op("LessOrEqual", d, limit)
        )
        flat = op("Reshape", op("Cast", close, to=ir.DataType.INT32), op.ints([-1]))
        found.append(op("ReduceMax", flat, op.ints([0]), keepdims=1))
    most = found[0] if len(found) == 1 else op("Max", *found)
    return op("Greater", most, op("Cast", op.const(0), to=ir.DataType.INT32))


def _kept_anchors(
    op: Ops, grid: Grid, distance: Metric, limit: ir.Value, method: str, times: ir.Value
) -> ir.Value:
    """Which tokens are their own anchor, bool [N]."""
    tokens = grid.tokens(op)
    if method == "pred_2d":
        anchors = anchored.wavefront(op, tokens, grid.row_count, grid.col_count, distance, limit, times)
    else:
        anchors = anchored.scan(op, tokens, _scan_order(op, grid, method), distance, limit, times)
    return op("Equal", anchors, op("Range", op.const(0), grid.total, op.const(1)))


def either(
    op: Ops, condition: ir.Value, then: Branch, otherwise: Branch, types: Sequence[ir.DataType]
) -> Sequence[ir.Value]:
    """The values [N] of one branch or of the other; only the chosen one is computed."""
    graphs = []
    for name, branch in (("then", then), ("else", otherwise)):
        inner = Ops(f"{name}_")
        values = branch(inner)
        for value, dtype in zip(values, types, strict=True):
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape(["N"])
        graphs.append(ir.Graph([], values, nodes=inner.nodes, name=name))
    return op.multi("If", len(types), op("Squeeze", condition), then_branch=graphs[0], else_branch=graphs[1])


def compact(op: Ops, keep: ir.Value, index64: ir.Value) -> tuple[ir.Value, ir.Value]:
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
