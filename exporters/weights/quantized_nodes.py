"""How products and lookups read weights that are stored in integers: in groups, or with a scale per output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...models.config import Weight
from ...models.precision import BITS, ENGINES, Precision
from ..checkpoint import Checkpoint
from ..graphs import PRECISIONS, TORCH
from ..lowering.onnx_writer import Ops
from .gptq import Moments, quantize_calibrated
from .quantize import Lazy, Quantized, integer_type, quantize

Users = list[tuple[ir.Node, int]]  # of a value: a node and which of its inputs
MIDDLE = 128  # of uint8, what 0 becomes
LEAST = 1e-7  # a scale of inputs that are all 0; float16 knows it, too


@dataclass(frozen=True)
class Stored:
    """A weight of the checkpoint and how a graph keeps it."""

    weight: Weight
    kind: str  # a key of BITS
    precision: Precision
    computed: str  # what the graph calculates in
    dialect: str  # name of the graph's
    moments: Moments | None = None  # of the inputs of matrices in int4

    @property
    def signed(self) -> bool:
        """May scales of four bits be negative?"""
        return self.dialect not in ENGINES


def store_integers(
    model: ir.Model, checkpoint: Checkpoint, graph: str, name: str, stored: Stored, users: Users
) -> None:
    """DequantizeLinear in front of every reader, on new initializers: in groups, or with a scale per output."""
    weight = stored.weight
    outer, inner = weight.shape
    grouped = stored.precision.grouped(stored.kind)
    size = stored.precision.group_size if grouped else inner
    looked_up = users[0][0].op_type == "Gather"
    # a row of a table is read for its token alone: zero points would not pay
    symmetric = stored.precision.symmetric or looked_up

    def read() -> Quantized:
        matrix = _matrix(checkpoint, weight)
        dtype = TORCH[stored.computed]
        how = (matrix, BITS[stored.kind], size, symmetric, dtype, stored.signed)
        moments = stored.moments.of(graph, name) if stored.moments and stored.kind == "int4" else None
        found = quantize(*how) if moments is None else quantize_calibrated(*how, moments)
        return Quantized(found.values.T, found.scales.T, None) if looked_up else found

    lazy = Lazy(name, stored.kind, read)
    integers = integer_type(stored.kind, symmetric)
    # OpenVINO's tower reads the scales of the first one; it does not load where products share a Cast of them
    floats = ir.DataType.FLOAT if stored.dialect == "openvino" else PRECISIONS[stored.computed]
    rows = inner // size
    if looked_up:
        parts = [lazy.value("values", integers, outer, inner), lazy.value("scales", floats, outer, rows)]
    elif not grouped:
        parts = [lazy.value("values", integers, inner, outer), lazy.value("scales", floats, outer)]
    else:
        parts = [lazy.value("values", integers, inner, outer), lazy.value("scales", floats, rows, outer)]
        parts += [] if symmetric else [lazy.value("zeros", integers, rows, outer)]
    for part in parts:
        model.graph.register_initializer(part)
    for node, index in users:
        op = Ops()
        if looked_up:
            found = [op("Gather", part, node.inputs[1], axis=0) for part in parts]
            for part, row in zip(parts, found, strict=True):
                row.name = f"{part.name}.rows"
                row.type = part.type
            _replace(model, node, op, op("DequantizeLinear", *found, axis=-1, block_size=size))
            continue
        values, scales, *zeros = parts
        if floats != PRECISIONS[stored.computed]:
            scales = op("Cast", scales, to=PRECISIONS[stored.computed])
        if grouped:
            weights = op("DequantizeLinear", values, scales, *zeros, axis=0, block_size=size)
        else:
            weights = op("DequantizeLinear", values, scales, axis=1)
        weights.name = f"{name}.{node.name or 'use'}"
        weights.type = ir.TensorType(PRECISIONS[stored.computed])
        if node.op_type == "Gemm":  # x @ table.t()
            _replace(model, node, op, op("MatMul", node.inputs[0], weights))
        else:
            model.graph.insert_before(node, op.nodes)
            node.replace_input_with(index, weights)


def one_product(model: ir.Model) -> None:
    """Products of one value with several matrices that have a scale per output, as one product that is split again.

    TensorRT joins such products by itself, and would expand the matrices to 16 bits in each run to put them side by
    side.
    """
    for x in [value for node in model.graph for value in node.outputs]:
        readers = [node for node, index in x.uses() if node.op_type == "MatMul" and index == 0]
        products = {node: source for node in readers if (source := _scaled_per_output(node)) is not None}
        if len(products) > 1:
            _join_products(model, x, products)


def _join_products(model: ir.Model, x: ir.Value, products: dict[ir.Node, ir.Node]) -> None:
    """``products``: each MatMul of x, and the DequantizeLinear of its matrix."""
    name = "+".join(str(product.name) for product in products)
    op = Ops()
    values, scales = (
        _side_by_side([_tensor(source, i) for source in products.values()], f"{name}.{i}") for i in (0, 1)
    )
    for initializer in (values, scales):
        model.graph.register_initializer(initializer)
    weights = op("DequantizeLinear", values, scales, axis=1)
    weights.type = scales.type
    sizes = [_tensor(source, 1).size for source in products.values()]
    parts = op.multi("Split", len(products), op("MatMul", x, weights), op.ints(sizes), axis=-1)

    before = [product.outputs[0] for product in products]
    for old, new in zip(before, parts, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    first = next(node for node in model.graph if node in products)
    ir.convenience.replace_nodes_and_values(model.graph, first, list(products), op.nodes, before, parts)

    for source in products.values():
        if not source.outputs[0].uses():
            unread = [str(_tensor(source, i).name) for i in (0, 1)]
            model.graph.remove(source, safe=True)
            for initializer_name in unread:
                del model.graph.initializers[initializer_name]


def _scaled_per_output(product: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that computes a product's matrix from integers and a scale per output."""
    matrix = product.inputs[1]
    node = matrix.producer() if matrix is not None else None
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return None
    return node


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    """What an input of a node that is an initializer holds."""
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _side_by_side(tensors: list[ir.TensorProtocol], name: str) -> ir.Value:
    """An initializer of several, side by side along the last axis; each is read when it is written."""
    dtype = tensors[0].dtype
    outer = [int(n) for n in tensors[0].shape.numpy()[:-1]]
    shape = ir.Shape([*outer, sum(tensor.shape.numpy()[-1] for tensor in tensors)])

    def read() -> ir.TensorProtocol:
        return ir.Tensor(
            np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), dtype=dtype, name=name
        )

    lazy = ir.LazyTensor(read, dtype=dtype, shape=shape, name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)


def store_rows(
    model: ir.Model,
    checkpoint: Checkpoint,
    name: str,
    stored: Stored,
    users: Users,
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]],
) -> None:
    """Products of integers: the weights have one scale per output, the inputs are rounded token by token.

    ``rounded``: values that already are, with their scales; several products may read them. The inputs are uint8 around
    128, the weights int8: that is the pair that ONNX Runtime has the fastest kernels for (MatMulIntegerToFloat).
    Other dialects get QuantizeLinear and DequantizeLinear around MatMul, which OpenVINO makes a product of integers of:
    it wants one scale for all inputs of a product, so that of a token is divided by before and multiplied with behind.
    """
    outer, inner = stored.weight.shape
    lazy = Lazy(name, "int8", lambda: quantize(_matrix(checkpoint, stored.weight), 8, inner, True))
    values = lazy.value("values", ir.DataType.INT8, inner, outer)
    scales = lazy.value("scales", ir.DataType.FLOAT, outer)
    for part in (values, scales):
        model.graph.register_initializer(part)
    for node, _ in users:
        x = node.inputs[0]
        assert x is not None
        if x not in rounded:
            rounded[x] = round_rows(model, x)
        integers, scale = rounded[x]
        op = Ops()
        one = op.like(1.0, x)
        middle = op.uint8(MIDDLE)
        if stored.dialect == "ort":
            whole = op("MatMulIntegerToFloat", integers, values, one, scales, middle, domain="com.microsoft")
            whole.type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.opset_imports["com.microsoft"] = 1
        else:
            matrix = op("DequantizeLinear", values, op("Cast", scales, to=x.dtype), axis=1)
            whole = op("MatMul", op("DequantizeLinear", integers, one, middle), matrix)
        _replace(model, node, op, op("Mul", whole, scale))


def round_rows(model: ir.Model, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x [..., in] -> uint8 of that shape and the scales [..., 1], right behind the node that computes x."""
    op = Ops()
    high = op("ReduceMax", x, op.ints([-1]), keepdims=1)
    low = op("ReduceMin", x, op.ints([-1]), keepdims=1)
    largest = op("Max", high, op("Neg", low))  # without writing what Abs would
    scale = op("Max", op("Mul", largest, op.like(1 / 127, x)), op.like(LEAST, x))
    integers = op("QuantizeLinear", op("Div", x, scale), op.like(1.0, x), op.uint8(MIDDLE))
    for what, value in (("scale", scale), ("integers", integers)):
        value.name = f"{x.name}.{what}"
    integers.type = ir.TensorType(ir.DataType.UINT8)
    scale.type = x.type
    producer = x.producer()
    assert producer is not None  # towers do not multiply their inputs
    model.graph.insert_after(producer, op.nodes)
    return integers, scale


def _matrix(checkpoint: Checkpoint, weight: Weight) -> Tensor:
    """A weight of the checkpoint as [in, out]."""
    found = checkpoint.read(weight)
    return found if weight.layout == "transpose" else found.t()


def _replace(model: ir.Model, node: ir.Node, op: Ops, after: ir.Value) -> None:
    """``op``'s nodes in place of ``node``; ``after`` takes the part of its output."""
    before = node.outputs[0]
    after.name = before.name
    after.type = before.type
    after.shape = before.shape
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, [before], [after])
