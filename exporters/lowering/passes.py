"""Changes to a whole graph that one dialect needs, after its nodes have been written."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from .onnx_writer import Ops

ENTRIES = "entries"
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


def float_cumsum(model: ir.Model) -> None:
    """CumSum of integers -> of float32, exact up to 2**24: TensorRT 10.3 adds up floating point only."""
    for node in list(model.graph):
        before = node.outputs[0]
        if node.op_type != "CumSum" or before.dtype not in INTEGERS:
            continue
        op, (x, axis) = Ops(), node.inputs
        after = op("Cast", op("CumSum", op("Cast", x, to=ir.DataType.FLOAT), axis), to=before.dtype)
        after.name = before.name
        after.type = before.type
        after.shape = before.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, [before], [after])


def in_float32(model: ir.Model) -> None:
    """A tower traced in 16 bits -> in float32: the same graph with other types, and without casts between them.

    Raises ValueError for a constant in 16 bits: it was rounded, and would not be what it is in a trace in float32.
    """
    float32 = ir.DataType.FLOAT
    graph = model.graph
    nodes = list(graph)
    outputs = [value for node in nodes for value in node.outputs]
    for value in [*graph.inputs, *graph.initializers.values(), *outputs]:
        if value.dtype in NARROW:
            value.type = ir.TensorType(float32)  # a new one: copies of the graph share it
    for node in nodes:
        tensor = node.attributes.get("value") if node.op_type == "Constant" else None
        if tensor is not None and tensor.as_tensor().dtype in NARROW:
            raise ValueError(
                f"found a constant in 16 bits ({node.outputs[0].name}), expected float32: have the tower cast its "
                "product, not the constant"
            )
        if node.op_type != "Cast":
            continue
        if node.attributes["to"].as_int() in NARROW:
            node.attributes["to"] = ir.AttrInt64("to", float32)
        source = node.inputs[0]
        if source is not None and source.dtype == node.attributes["to"].as_int() == float32:
            node.op_type = "Identity"
            node.attributes.clear()
    IdentityEliminationPass()(model)


def float_outputs(model: ir.Model) -> None:
    """Outputs in bfloat16 -> in float32."""
    outputs = model.graph.outputs
    for i, before in enumerate(outputs):
        if before.dtype != ir.DataType.BFLOAT16:
            continue
        op = Ops()
        outputs[i] = op("Cast", before, to=ir.DataType.FLOAT)
        outputs[i].name, before.name = before.name, f"{before.name}.narrow"
        outputs[i].type = ir.TensorType(ir.DataType.FLOAT)
        outputs[i].shape = before.shape
        model.graph.extend(op.nodes)


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


def one_reshape(model: ir.Model) -> None:
    """Of two reshapes in a row the second alone, and none where it gives back the first one's input.

    A 0 in the second's shape copies a size; the first has to leave that one as it was.
    """
    for node in list(model.graph):
        first = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] else None
        if first is None or first.op_type != "Reshape":
            continue
        source = first.inputs[0]
        between = first.outputs[0]
        shape = node.inputs[1]
        assert source is not None
        copied = [i for i, n in enumerate(_constant(shape)) if n == 0]
        left = _constant(first.inputs[1])
        if all((i < len(left) and left[i] == 0) or _same(source.shape, between.shape, i) for i in copied):
            node.replace_input_with(0, source)
            out = node.outputs[0]
            if source.shape is not None and source.shape == out.shape and not out.is_graph_output():
                ir.convenience.replace_all_uses_with(out, source)


def skip_norm(op: Ops, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value | None:
    """The norm of a sum, calculated together with the sum: ``x`` is one, of two values of its own shape, else None.

    Other readers of the sum get it from the new node.
    """
    add = x.producer()
    if add is None or add.op_type != "Add" or x.shape is None or x.dtype is None:
        return None
    if any(part is None or part.shape != x.shape or part.dtype != x.dtype for part in add.inputs):
        return None
    found = op.multi(
        "SkipSimplifiedLayerNormalization", 4, *add.inputs, weight, domain="com.microsoft", epsilon=epsilon
    )
    found[3].type = x.type
    found[3].shape = x.shape
    for statistic in found[1:3]:  # mean and inverse deviation of each row, which nobody reads
        statistic.type = ir.TensorType(ir.DataType.FLOAT)
        statistic.shape = ir.Shape([*x.shape[:-1], 1])
    ir.convenience.replace_all_uses_with(x, found[3])
    return found[0]


def _constant(value: ir.Value | None) -> list[int]:
    """Of a shape that is fixed; one that is calculated holds the sizes themselves."""
    fixed = ir.convenience.get_const_tensor(value) if value is not None else None
    return [] if fixed is None else [int(n) for n in fixed.numpy()]


def _same(a: ir.Shape | None, b: ir.Shape | None, i: int) -> bool:
    return a is not None and b is not None and i < min(len(a), len(b)) and a[i] == b[i]


def entries_input(model: ir.Model) -> None:
    """``entries`` int32 [E], 0 ... E - 1, as an input: how much of the caches a run looks at.

    Else each token would be compared with all M entries, most of which hold nothing.
    """
    graph = model.graph
    made = next((value for node in graph for value in node.outputs if value.name == ENTRIES), None)
    if made is None:
        return  # not a decoder
    made.name = f"all_{ENTRIES}"
    given = ir.Value(name=ENTRIES, shape=ir.Shape(["E"]), type=made.type)
    ir.convenience.replace_all_uses_with(made, given)
    graph.inputs.append(given)


def cache_rows(model: ir.Model) -> None:
    """Caches by position, and the new rows of all of them as one output.

    A cache is an input x that comes back as new_x and has the axis M. Inputs [B, kv_heads, M, Dh] -> [M, B, kv_heads,
    Dh], so that the first entries of a longer cache are a cache, and M can follow the length of the sequence. Outputs
    [S, B, kv_heads, Dh] each -> rows [caches, S, B, kv_heads, Dh]: one copy by the runtime appends all of them.
    """
    graph = model.graph
    op = Ops()
    shape = ir.Shape([])
    given_back = {value.name for value in graph.outputs}
    caches = []
    for i, old in enumerate(graph.inputs):
        if f"new_{old.name}" not in given_back or old.shape is None or not any(n == "M" for n in old.shape):
            continue
        caches.append(f"new_{old.name}")
        B, heads, M, width = old.shape
        shape = ir.Shape(["S", B, heads, width])
        new = ir.Value(name=old.name, shape=ir.Shape([M, B, heads, width]), type=old.type)
        first = op("Transpose", new, perm=[1, 2, 0, 3])
        first.type = old.type
        first.shape = old.shape
        ir.convenience.replace_all_uses_with(old, first)
        graph.inputs[i] = new
    if not op.nodes:
        return  # not a decoder
    graph.insert_before(graph[0], op.nodes)
    op = Ops()
    rows = [value for value in graph.outputs if value.name in caches]
    for value in rows:
        value.shape = shape
    stacked = op("Concat", *[op("Unsqueeze", v, op.ints([0])) for v in rows], axis=0)
    stacked.name = "rows"
    stacked.type = rows[0].type
    stacked.shape = ir.Shape([len(rows), *shape])
    graph.extend(op.nodes)
    graph.outputs[:] = [*[v for v in graph.outputs if v not in rows], stacked]
