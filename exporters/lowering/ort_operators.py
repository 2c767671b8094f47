"""Operations of ops.py in operators of ONNX Runtime, most of the domain com.microsoft: for ``ort`` and ``cuda``.

Shapes of inputs and outputs are those that ops.py gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from .heads import attribute, join_heads, sizes, split_heads
from .onnx_writer import Ops
from .passes import ENTRIES, skip_norm


def attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Attention over all keys, or those that a mask names, by MultiHeadAttention."""
    heads, width = sizes(node)
    inputs: list[Any] = [join_heads(op, x, heads, width) for x in node.inputs[:3]]
    if len(node.inputs) > 3:  # no bias; which keys are real
        inputs += [None, op("Cast", node.inputs[3], to=ir.DataType.INT32)]
    out = op(
        "MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=heads, scale=attribute(node, "scale")
    )
    return [split_heads(op, out, heads, width)]


def quick_gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """GELU as CLIP has it, x * sigmoid(1.702 x), by QuickGelu."""
    return [op("QuickGelu", node.inputs[0], domain="com.microsoft", alpha=1.702)]


def cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """By GroupQueryAttention, over as many entries as the longest sequence has."""
    last = _last_entry(op, node)
    total = op("Add", op("ReduceMax", last, keepdims=0), op("Cast", op.const(1), to=ir.DataType.INT32))
    return _group_query_attention(op, node, last, total)


def _last_entry(op: Ops, node: ir.Node) -> ir.Value:
    """[B], of each row the entry of its last token."""
    return op("ReduceMax", node.inputs[5], op.ints([1]), keepdims=0)


def _group_query_attention(op: Ops, node: ir.Node, last: Any, total: Any) -> Sequence[ir.Value]:
    """``total``: a scalar in the host's memory, how many entries to look at."""
    q, k, v, k_cache, v_cache, _, _ = node.inputs
    (heads, width), (kv_heads, _) = sizes(node, 0), sizes(node, 1)
    out, new_k, new_v = op.multi(
        "GroupQueryAttention",
        3,
        join_heads(op, q, heads, width),
        join_heads(op, k, kv_heads, width),
        join_heads(op, v, kv_heads, width),
        k_cache,
        v_cache,
        last,
        total,
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=attribute(node, "scale"),
    )
    return [split_heads(op, out, heads, width), new_k, new_v]


def rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """By RotaryEmbedding, which reads the tables of cosines and sines row by row."""
    x, cos, sin = node.inputs
    heads, width = sizes(node)
    rows = op("Shape", cos, start=0, end=2)
    count = op("ReduceProd", rows, keepdims=0)
    ids = op("Reshape", op("Range", op.const(0), count, op.const(1)), rows)  # each row of the tables once
    tables = [op("Reshape", t, op.ints([-1, width // 2])) for t in (cos, sin)]
    joined = join_heads(op, x, heads, width)
    out = op("RotaryEmbedding", joined, ids, *tables, domain="com.microsoft", num_heads=heads)
    out.type = joined.type
    out.shape = joined.shape
    return [split_heads(op, out, heads, width)]


def rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """With the sum before it, else plain operators, which ONNX Runtime fuses into SimplifiedLayerNormalization."""
    x, weight = node.inputs
    assert x is not None and weight is not None  # noqa: PT018
    if (fused := skip_norm(op, x, weight, attribute(node, "epsilon"))) is not None:
        return [fused]
    square = op("ReduceMean", op("Pow", x, op.const(2.0)), op.ints([-1]))
    root = op("Sqrt", op("Add", square, op.const(attribute(node, "epsilon"))))
    return [op("Mul", op("Div", x, root), weight)]


def causal_convolution(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """By CausalConvWithState, SiLU included."""
    x, weight, state = node.inputs
    return op.multi(
        "CausalConvWithState",
        2,
        x,
        weight,
        None,
        state,
        domain="com.microsoft",
        ndim=1,
        channels_last=1,
        activation="silu",
    )


def delta_rule(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Queries are divided by the square root of their width there."""
    q, k, v, decay, beta, state = node.inputs
    (key_heads, key_width), (heads, width) = sizes(node, 0), sizes(node, 2)
    out, new = op.multi(
        "LinearAttention",
        2,
        join_heads(op, q, key_heads, key_width),
        join_heads(op, k, key_heads, key_width),
        join_heads(op, v, heads, width),
        state,
        decay,
        beta,
        domain="com.microsoft",
        q_num_heads=key_heads,
        kv_num_heads=heads,
        update_rule="gated_delta",
        scale=0.0,
    )
    return [split_heads(op, out, heads, width), new]


def cached_attention_with_entries(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """How many entries to look at is the size of an input, which is known without waiting for the GPU."""
    entries = node.inputs[6]
    assert entries is not None
    entries.name = ENTRIES  # of which a pass makes an input
    total = op("Cast", op("Squeeze", op("Shape", entries), op.ints([0])), to=ir.DataType.INT32)
    return _group_query_attention(op, node, _last_entry(op, node), total)


def fused_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """In one kernel, with the sum before it where there is one; squares are summed up in float32."""
    x, weight = node.inputs
    assert x is not None and weight is not None  # noqa: PT018
    if (fused := skip_norm(op, x, weight, attribute(node, "epsilon"))) is not None:
        return [fused]
    return [
        op(
            "SimplifiedLayerNormalization",
            x,
            weight,
            axis=-1,
            stash_type=1,
            epsilon=attribute(node, "epsilon"),
        )
    ]
