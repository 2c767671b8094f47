"""Gives the initializers of a graph their values: constants now, weights lazily, read when the graph is saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ...models.config import Preprocessing, Weight
from ...models.errors import CheckpointError
from ...models.precision import BITS, BYTES, ENGINES, PARTS, Precision
from ..checkpoint import Checkpoint, all_finite
from ..decoders import DECODERS
from ..graphs import PRECISIONS, compute_precision
from ..lowering.dialects import Dialect
from ..towers import TOWERS
from .gptq import Moments
from .quantized_nodes import Stored, Users, one_product, store_integers, store_rows


def attach(
    model: ir.Model,
    checkpoint: Checkpoint,
    graph: str,
    pre: Preprocessing,
    dialect: Dialect,
    precision: Precision,
    moments: Moments | None = None,
) -> None:
    """Give every initializer its value, stored as ``precision`` says; int4 is fitted to ``moments`` of its inputs.

    Raises CheckpointError naming an initializer that neither the weight table nor the constants know.
    """
    table: dict[str, Weight] = checkpoint.family.weights(checkpoint.config)[graph]
    c = checkpoint.config
    fixed = TOWERS[c.tower].constants(c, pre) if graph == "vision" else DECODERS[c.decoder].constants(c)
    computed = compute_precision(precision.base, dialect)
    if precision.quantized:
        model.graph.opset_imports[""] = max(
            model.graph.opset_imports[""], 21
        )  # the first with groups (block_size)
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in fixed:
            value.const_value = ir.tensor(fixed[name], name=name)
        elif name in table:
            for part, users in _users(value, graph, name).items():
                if precision.of(part) in BITS and _fits(table[name], part, users, precision):
                    what = Stored(table[name], precision.of(part), precision, computed, dialect.name, moments)
                    own = (
                        f"{name}.{part}" if table[name].layout == "same" else name
                    )  # a table may be stored twice
                    if what.kind == "w8a8":
                        store_rows(model, checkpoint, own, what, users, rounded)
                    else:
                        store_integers(model, checkpoint, graph, own, what, users)
            if value.uses():
                parts = list(_users(value, graph, name))
                stored = precision.of(parts[0]) if precision.of(parts[0]) not in BITS else precision.base
                _store(model, checkpoint, value, table[name], stored, computed)
            else:
                del model.graph.initializers[name]
        elif value.const_value is None or value.const_value.size > 64:
            raise CheckpointError(f"the {graph} graph has an initializer '{name}' that no weight table names")
    if precision.per_output and dialect.name in ENGINES:
        one_product(model)


def part_of(graph: str, name: str, user: str = "") -> str:
    """Which of PARTS an initializer belongs to; ``user``: the op type that reads it (a table may serve two)."""
    if graph == "vision":
        return "vision"
    if name == "head" or (name == "token_table" and user == "Gemm"):
        return "head"
    return "embedding" if name == "token_table" else "language"


def weight_bytes(checkpoint: Checkpoint, precision: Precision) -> int:
    """Bytes of all stored weights, about."""
    total = 0
    for graph, table in checkpoint.family.weights(checkpoint.config).items():
        for name, weight in table.items():
            count = math.prod(weight.shape)
            for part in _parts(checkpoint, graph, name):
                if precision.of(part) in BITS and _divides(weight, part, precision):
                    total += precision.bytes_of(part, count)
                elif part != "head" or name == "head":  # a tied head is the table itself
                    total += count * BYTES.get(precision.of(part), BYTES[precision.base])
    return total


def not_in_groups(checkpoint: Checkpoint, precision: Precision) -> list[str]:
    """Matrices that are to be stored in groups, and whose inputs groups do not divide."""
    return [
        f"{graph}.{name}"
        for graph, table in checkpoint.family.weights(checkpoint.config).items()
        for name, weight in table.items()
        for part in _parts(checkpoint, graph, name)
        if _matrix(name, weight) and precision.of(part) in BITS and not _divides(weight, part, precision)
    ]


def _parts(checkpoint: Checkpoint, graph: str, name: str) -> list[str]:
    """Which of PARTS a weight of the checkpoint belongs to: a token table that is the head, too, to both."""
    both = name == "token_table" and checkpoint.config.text.tied_head
    return ["embedding", "head"] if both else [part_of(graph, name)]


def _matrix(name: str, weight: Weight) -> bool:
    """Is it multiplied with, or a table of tokens?"""
    return weight.integers and len(weight.shape) == 2 and weight.layout != "patch" and name != "positions"


def _divides(weight: Weight, part: str, precision: Precision) -> bool:
    """Can a matrix be stored in integers?"""
    if not weight.integers or len(weight.shape) != 2 or weight.layout == "patch":
        return False
    return not precision.grouped(precision.of(part)) or weight.shape[1] % precision.group_size == 0


def _users(value: ir.Value, graph: str, name: str) -> dict[str, Users]:
    """The readers of an initializer, by the part they belong to."""
    found: dict[str, Users] = {}
    for node, index in value.uses():
        found.setdefault(part_of(graph, name, node.op_type), []).append((node, index))
    return {part: found[part] for part in PARTS if part in found}


def _fits(weight: Weight, part: str, users: Users, precision: Precision) -> bool:
    """Can a weight be stored in integers? A matrix that is multiplied with, or the table of tokens."""
    allowed = {"head": {("Gemm", 1)}, "embedding": {("Gather", 0)}}.get(part, {("MatMul", 1), ("Cast", 0)})
    return _divides(weight, part, precision) and {(node.op_type, index) for node, index in users} <= allowed


def _store(
    model: ir.Model, checkpoint: Checkpoint, value: ir.Value, weight: Weight, stored: str, computed: str
) -> None:
    """One value after the other, in ``stored``, cast to what the graph computes in after it is read."""
    shape = [int(n) for n in value.shape]  # type: ignore[union-attr, arg-type]
    # vectors cost nothing; the patch kernel is a sum of two frames, which 16 bits would round (OpenVINO's tower does)
    dtype = PRECISIONS[stored if len(shape) > 1 and weight.layout != "patch" else computed]
    if value.dtype == ir.DataType.FLOAT and len(shape) == 1:  # whatever the graph calculates in
        dtype = ir.DataType.FLOAT
    name = value.name
    value.const_value = ir.LazyTensor(
        _reader(checkpoint, weight, dtype), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    if dtype not in (PRECISIONS[computed], value.dtype):
        cast_after_load(model, value, dtype, PRECISIONS[computed])


def cast_after_load(model: ir.Model, weight: ir.Value, stored: ir.DataType, computed: ir.DataType) -> None:
    """Pass: ``weight`` is stored as ``stored``; a Cast gives its readers ``computed``, as before."""
    users = list(weight.uses())
    weight.type = ir.TensorType(stored)
    node = ir.Node("", "Cast", [weight], {"to": ir.AttrInt64("to", int(computed))}, num_outputs=1)
    cast = node.outputs[0]
    cast.name = f"{weight.name}.{computed.name.lower()}"
    cast.type = ir.TensorType(computed)
    cast.shape = weight.shape
    model.graph.insert_before(model.graph[0], node)
    for user, index in users:
        user.replace_input_with(index, cast)


def _reader(checkpoint: Checkpoint, weight: Weight, dtype: ir.DataType) -> Callable[[], ir.TensorProtocol]:
    torch_dtype = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}.get(
        dtype, torch.bfloat16
    )

    def read() -> ir.TensorProtocol:
        tensor: Tensor = checkpoint.read(weight).to(torch_dtype)
        if torch_dtype != torch.float32 and not all_finite(tensor):
            name, wider = ("float16", "bf16") if torch_dtype == torch.float16 else ("bfloat16", "fp32")
            raise CheckpointError(
                f"weight '{weight.source}' does not fit {name}; build with --precision {wider}"
            )
        if torch_dtype == torch.bfloat16:
            return ir.Tensor(tensor.view(torch.uint16).numpy().view(dtype.numpy()), dtype=dtype)
        return ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=dtype)

    return read
