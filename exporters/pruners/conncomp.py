"""Keeps a share of every connected component of equal neighbours: a baseline, after ShowUI (Lin et al., CVPR 2025).

Neighbours (left, right, above, below) that match are of one component. Every token takes the smallest index among its
own and its matching neighbours' labels, then the label of its label, until nothing changes: as many steps as the
longest way inside of a component in the worst case, far fewer as a rule.

The first token of a component is kept, and of the others an even share, such that about ``target`` are kept in all:
those for which row * a + column * b + seed * c, modulo 1, lies under that share. With a and b from the plastic number
(Roberts 2018, "R2") that spreads evenly over rows, columns and areas alike.
"""

from __future__ import annotations

import onnx_ir as ir

from ..lowering.onnx_writer import Ops

# over MODULUS: a = 1 / p and b = 1 / p**2 for p**3 = p + 1, and the root of 2 - 1
MODULUS = 2**31 - 1
DOWN = 1621087444
ACROSS = 1223722706
TURN = 889516852


def kept(
    op: Ops, left: ir.Value, above: ir.Value, rows: ir.Value, cols: ir.Value, target: ir.Value, seed: ir.Value
) -> ir.Value:
    """Match maps bool [rows, cols], their sides int64 scalars, target and seed int32 [1] -> keep bool [N]."""
    total = op("Mul", rows, cols)
    index = op("Range", op.const(0), total, op.const(1))
    labels = _labels(op, left, above, rows, cols, index)
    first = op("Equal", labels, index)
    components = op("ReduceSum", op("Cast", first, to=ir.DataType.INT32), op.ints([0]), keepdims=1)
    components.type = ir.TensorType(ir.DataType.INT32)
    wanted = op("Max", op("Cast", op("Sub", target, components), to=ir.DataType.INT64), op.const(0))
    others = op("Sub", total, op("Cast", components, to=ir.DataType.INT64))
    row = op("Div", index, cols)
    col = op("Sub", index, op("Mul", row, cols))
    place = op("Add", op("Mul", row, op.const(DOWN)), op("Mul", col, op.const(ACROSS)))
    place = op("Add", place, op("Mul", op("Cast", seed, to=ir.DataType.INT64), op.const(TURN)))
    place = op("Sub", place, op("Mul", op("Div", place, op.const(MODULUS)), op.const(MODULUS)))
    chosen = op("Less", op("Mul", place, others), op("Mul", wanted, op.const(MODULUS)))
    return op("Or", first, chosen)


def _labels(
    op: Ops, left: ir.Value, above: ir.Value, rows: ir.Value, cols: ir.Value, index: ir.Value
) -> ir.Value:
    """The smallest index in each token's component, int64 [N]."""
    sides = {1: (left, cols), 0: (above, rows)}  # axis: (matches with the one before, length)
    last = {axis: op("Sub", length, op.const(1)) for axis, (_, length) in sides.items()}
    before = {}
    after = {}
    forward = {}
    for axis, (matches, length) in sides.items():
        place = op("Range", op.const(0), length, op.const(1))
        before[axis] = op("Max", op("Sub", place, op.const(1)), op.const(0))
        after[axis] = op("Min", op("Add", place, op.const(1)), last[axis])
        forward[axis] = op(
            "Gather", matches, after[axis], axis=axis
        )  # of the last one: its own match, then unused
    shape = op("Concat", op("Reshape", rows, op.ints([1])), op("Reshape", cols, op.ints([1])), axis=0)

    inner = Ops("spread_")
    step = ir.val("spread", ir.DataType.INT64, [])
    go = ir.val("spreads", ir.DataType.BOOL, [])
    state = ir.val("labels", ir.DataType.INT64, ["N"])
    grid = inner("Reshape", state, shape)
    least = grid
    for axis, (matches, _) in sides.items():
        least = inner(
            "Where", matches, inner("Min", least, inner("Gather", grid, before[axis], axis=axis)), least
        )
        least = inner(
            "Where", forward[axis], inner("Min", least, inner("Gather", grid, after[axis], axis=axis)), least
        )
    flat = inner("Reshape", least, inner.ints([-1]))
    settled = inner("Gather", flat, flat)
    settled.type = state.type
    settled.shape = state.shape
    moved = inner("Cast", inner("Less", settled, state), to=ir.DataType.INT32)
    most = inner("ReduceMax", moved, inner.ints([0]), keepdims=0)
    still = inner("Cast", most, to=ir.DataType.BOOL)
    still.type = go.type
    still.shape = go.shape
    body = ir.Graph([step, go, state], [still, settled], nodes=inner.nodes, name="spread")
    always = op("Cast", op.const(1), to=ir.DataType.BOOL)
    return op("Loop", op("Mul", rows, cols), always, index, body=body)
