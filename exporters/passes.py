"""Changes to a whole graph that one dialect needs, after its nodes have been written."""

from __future__ import annotations

import onnx_ir as ir

from .tape import Ops

INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def float_cumsum(model: ir.Model) -> None:
    """CumSum of integers -> of float32, exact up to 2**24: TensorRT 10.3 adds up floating point only."""
    for node in list(model.graph):
        before = node.outputs[0]
        if node.op_type != "CumSum" or before.dtype not in INTEGERS:
            continue
        op, (x, axis) = Ops(), node.inputs
        after = op("Cast", op("CumSum", op("Cast", x, to=ir.DataType.FLOAT), axis), to=before.dtype)
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, [before], [after])


def shapes_after_cast(model: ir.Model) -> None:
    """A uint8 input is read by its Cast alone; sizes are taken from what that gives: Shape does not take uint8."""
    graph = model.graph
    for value in graph.inputs:
        users = [user for user, _ in value.uses()]
        casts = [user for user in users if user.op_type == "Cast"]
        if value.dtype != ir.DataType.UINT8 or len(casts) != 1:
            continue
        graph.remove(casts[0])
        graph.insert_before(graph[0], casts[0])
        for user in users:
            if user.op_type == "Shape":
                user.replace_input_with(0, casts[0].outputs[0])


def cache_rows(model: ir.Model) -> None:
    """Caches by position, and the new rows of all of them as one output.

    Inputs key_i, value_i: [B, kv_heads, M, Dh] -> [M, B, kv_heads, Dh], so that the first entries of a longer cache are
    a cache, and M can follow the length of the sequence. Outputs new_key_i, new_value_i [S, B, kv_heads, Dh] -> rows
    [2 * layers, S, B, kv_heads, Dh]: one copy by the runtime appends all of them.
    """
    graph, op = model.graph, Ops()
    shape = ir.Shape([])
    for i, old in enumerate(graph.inputs):
        if not (old.name or "").startswith(("key_", "value_")):
            continue
        assert old.shape is not None
        B, heads, M, width = old.shape
        shape = ir.Shape(["S", B, heads, width])
        new = ir.Value(name=old.name, shape=ir.Shape([M, B, heads, width]), type=old.type)
        first = op("Transpose", new, perm=[1, 2, 0, 3])
        first.type, first.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, first)
        graph.inputs[i] = new
    if not op.nodes:
        return  # not a decoder
    graph.insert_before(graph[0], op.nodes)
    op = Ops()
    rows = [v for v in graph.outputs if (v.name or "").startswith("new_")]
    for value in rows:
        value.shape = shape
    stacked = op("Concat", *[op("Unsqueeze", v, op.ints([0])) for v in rows], axis=0)
    stacked.name, stacked.type, stacked.shape = "rows", rows[0].type, ir.Shape([len(rows), *shape])
    graph.extend(op.nodes)
    graph.outputs[:] = [*[v for v in graph.outputs if v not in rows], stacked]
