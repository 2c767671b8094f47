"""Anchored selection: every token is compared with what a decoder would rebuild of its prediction.

That is always an original token, the anchor, so the state is an index per position, never pixels. pred_2d needs the
anchors of the left, upper and upper-left neighbour: the anti-diagonals are a wavefront of rows + cols - 1 steps, each
done at once for all its positions (of which there are at most min(rows, cols); the places of a step that lie outside of
the grid write to entries behind it). The scans go token by token.
"""

from __future__ import annotations

import onnx_ir as ir

from ..lowering.onnx_writer import Ops
from .metrics import Metric


def wavefront(
    op: Ops,
    tokens: ir.Value,
    rows: ir.Value,
    cols: ir.Value,
    metric: Metric,
    limit: ir.Value,
    times: ir.Value,
    settled: tuple[ir.Value, ir.Value] | None = None,
) -> ir.Value:
    """pred_2d over tokens [N or more, bytes]; rows, cols int64 scalars -> anchors int64 [N]: the row each one ends at.

    ``times``: int64 scalar, 1 to do so, 0 to take no step. ``settled``: bool [N], which positions are not predicted,
    and int64 [N], the rows of ``tokens`` that stand for them.
    """
    one = op.const(1)
    zero = op.const(0)
    length = op("Min", rows, cols)
    total = op("Mul", rows, cols)
    wide = op("LessOrEqual", rows, cols)  # a step goes along the shorter side
    start = op("Range", zero, op("Add", total, length), one)
    if settled is not None:
        places = op("Range", zero, total, one)
        first = op("Where", settled[0], settled[1], places)
        start = op("Concat", first, op("Range", total, op("Add", total, length), one), axis=0)
    steps = op("Sub", op("Add", rows, cols), op.const(2))

    inner = Ops("step_")
    i, go, anchors = _loop_inputs()
    along = inner("Range", zero, length, one)
    across = inner("Sub", inner("Add", i, one), along)
    valid = inner(
        "And", inner("GreaterOrEqual", across, zero), inner("Less", across, inner("Max", rows, cols))
    )
    row = inner("Where", wide, along, across)
    col = inner("Where", wide, across, along)
    inside = inner("Add", inner("Mul", row, cols), col)
    position = inner("Where", valid, inside, inner("Add", total, along))
    first_row = inner("Equal", row, zero)
    first_col = inner("Equal", col, zero)
    left = inner("Sub", inside, one)
    above = inner("Sub", inside, cols)

    def anchor(where: ir.Value) -> ir.Value:
        """The anchors of neighbours; of any token where there is none, which is then not used."""
        return inner("Gather", anchors, inner("Max", inner("Where", valid, where, zero), zero))

    a = anchor(inner("Where", first_col, above, left))
    b = anchor(above)
    c = anchor(inner("Sub", above, one))
    corner = inner("And", inner("Not", first_row), inner("Not", first_col))
    matches = lambda x, y: _matches(inner, tokens, x, y, metric, limit)  # noqa: E731
    use_b = inner("And", inner("And", matches(c, a), inner("Not", matches(c, b))), corner)
    predicted = inner("Where", use_b, b, a)
    here = inner("Where", valid, inside, zero)
    found = inner("Where", matches(here, predicted), predicted, position)
    if settled is not None:
        found = inner("Where", inner("Gather", settled[0], here), inner("Gather", anchors, here), found)
    # places outside of the grid keep pointing to themselves
    updates = inner("Where", valid, found, position)
    after = inner("ScatterElements", anchors, position, updates, axis=0)
    last = _loop(op, op("Mul", steps, times), start, inner, (i, go, anchors), after)
    return op("Slice", last, op.ints([0]), op("Reshape", total, op.ints([1])), op.ints([0]))


def scan(
    op: Ops, tokens: ir.Value, order: ir.Value, metric: Metric, limit: ir.Value, times: ir.Value
) -> ir.Value:
    """Tokens [N, bytes] in scan order (positions int64 [N]) -> anchors int64 [N]; ``times`` as for wavefront."""
    one = op.const(1)
    total = op("Squeeze", op("Shape", order))
    start = op("Range", op.const(0), total, one)
    inner = Ops("step_")
    i, go, anchors = _loop_inputs()
    here = inner("Gather", order, inner("Reshape", inner("Add", i, one), inner.ints([1])))
    before = inner("Gather", order, inner("Reshape", i, inner.ints([1])))
    anchor = inner("Gather", anchors, before)
    settled = inner("Where", _matches(inner, tokens, here, anchor, metric, limit), anchor, here)
    after = inner("ScatterElements", anchors, here, settled, axis=0)
    return _loop(op, op("Mul", op("Sub", total, one), times), start, inner, (i, go, anchors), after)


def _matches(
    op: Ops, tokens: ir.Value, x: ir.Value, y: ir.Value, metric: Metric, limit: ir.Value
) -> ir.Value:
    """Do the tokens at positions x match those at y? int64 [n] each -> bool [n]."""
    difference = metric.difference(op, op("Gather", tokens, x, axis=0), op("Gather", tokens, y, axis=0))
    return op("LessOrEqual", metric.of_tokens(op, difference), limit)


def _loop_inputs() -> tuple[ir.Value, ir.Value, ir.Value]:
    return (
        ir.val("step", ir.DataType.INT64, []),
        ir.val("go", ir.DataType.BOOL, []),
        ir.val("anchors", ir.DataType.INT64, ["A"]),
    )


def _loop(
    op: Ops,
    steps: ir.Value,
    start: ir.Value,
    inner: Ops,
    inputs: tuple[ir.Value, ir.Value, ir.Value],
    after: ir.Value,
) -> ir.Value:
    """Loop ``steps`` times over the nodes of ``inner``, from the state ``start``; returns the last state."""
    still = inner("Identity", inputs[1])
    still.type = inputs[1].type
    still.shape = inputs[1].shape
    after.type = inputs[2].type
    after.shape = inputs[2].shape
    body = ir.Graph(list(inputs), [still, after], nodes=inner.nodes, name="step")
    always = op("Cast", op.const(1), to=ir.DataType.BOOL)  # TensorRT wants a condition
    return op("Loop", steps, always, start, body=body)
