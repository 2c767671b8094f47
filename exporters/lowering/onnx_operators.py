"""Operations of ops.py in operators of ONNX: for dialects without one of their own.

Shapes of inputs and outputs are those that ops.py gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from .heads import attribute, sizes, swap_heads
from .onnx_writer import Ops
from .passes import ENTRIES

LOWEST = -30000.0  # a score that gets no share, in every float type
FAR = 1 << 30  # an entry behind every token's own


def gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """By Gelu, of opset 20."""
    return [op("Gelu", node.inputs[0], approximate=attribute(node, "approximate"))]


def attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Attention over all keys, or those that a mask names, by Attention of opset 24."""
    q, k, v = (swap_heads(op, x) for x in node.inputs[:3])
    masks = [op("Unsqueeze", mask, op.ints([1, 2])) for mask in node.inputs[3:]]  # [B, 1, 1, S]
    return [swap_heads(op, op("Attention", q, k, v, *masks, scale=attribute(node, "scale")))]


def quick_gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """GELU as CLIP has it, x * sigmoid(1.702 x)."""
    x = node.inputs[0]
    return [op("Mul", x, op("Sigmoid", op("Mul", x, op.like(1.702, x))))]


def scatter_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """New rows go where the cache is; the first ``entries`` of it are looked at."""
    _, k, v, k_cache, v_cache, own, entries = node.inputs
    assert entries is not None
    entries.name = ENTRIES  # of which a pass makes an input
    first = op("Cast", op("ReduceMin", own, op.ints([1]), keepdims=0), to=ir.DataType.INT64)  # [B]
    new_k = op("TensorScatter", k_cache, swap_heads(op, k), first, axis=2)
    new_v = op("TensorScatter", v_cache, swap_heads(op, v), first, axis=2)
    axis = op.ints([2])
    keys, values = (op("Slice", x, op.ints([0]), op("Shape", entries), axis) for x in (new_k, new_v))
    place = op("Unsqueeze", entries, op.ints([0, 1, 2]))  # [1, 1, 1, E]
    return [_grouped_attention(op, node, keys, values, place), new_k, new_v]


def _grouped_attention(op: Ops, node: ir.Node, keys: Any, values: Any, place: Any) -> ir.Value:
    """Causal attention over keys and values [B, kv_heads, n, Dh] at the entries ``place`` [B or 1, 1, 1, n].

    TensorRT makes one kernel of product, Where, Softmax and product, which keeps no scores in memory, as long as keys
    have four dimensions: the query heads that share a key head stand below each other ([B, kv_heads, S * groups, Dh]),
    so keys are not expanded to all heads either.
    """
    q, own = node.inputs[0], node.inputs[5]
    (heads, width), (kv_heads, _) = sizes(node, 0), sizes(node, 1)
    groups = heads // kv_heads
    grouped = op("Reshape", _scaled(op, node), op.ints([0, 0, kv_heads, groups, width]))
    grouped = op("Reshape", op("Transpose", grouped, perm=[0, 2, 1, 3, 4]), op.ints([0, kv_heads, -1, width]))
    query = op("Concat", *[op("Unsqueeze", own, op.ints([2]))] * groups, axis=2)
    query = op("Reshape", query, op.ints([0, 1, -1, 1]))  # [B, 1, S * groups, 1]
    scores = op("MatMul", grouped, op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = op("Where", op("LessOrEqual", place, query), scores, op.like(LOWEST, q))
    out = op("MatMul", op("Softmax", scores, axis=-1), values)
    out = op("Transpose", op("Reshape", out, op.ints([0, kv_heads, -1, groups, width])), perm=[0, 2, 1, 3, 4])
    return op("Reshape", out, op.ints([0, 0, heads, width]))


def rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """The first half of each head is turned with the second."""
    x, cos, sin = node.inputs
    first, second = op.multi("Split", 2, x, axis=-1, num_outputs=2)
    cos, sin = (op("Unsqueeze", t, op.ints([2])) for t in (cos, sin))
    left = op("Sub", op("Mul", first, cos), op("Mul", second, sin))
    right = op("Add", op("Mul", second, cos), op("Mul", first, sin))
    return [op("Concat", left, right, axis=-1)]


def rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """By RMSNormalization, of opset 23."""
    x, weight = node.inputs
    return [op("RMSNormalization", x, weight, axis=-1, epsilon=attribute(node, "epsilon"))]


def _scaled(op: Ops, node: ir.Node) -> ir.Value:
    """The queries times the scale: smaller than the scores, and in range where scores of 16 bits might not be."""
    q = node.inputs[0]
    return op("Mul", q, op.like(attribute(node, "scale"), q))


def plain_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Attention over all keys, or those that a mask names, from MatMul, Softmax and MatMul."""
    q, k, v, *masks = node.inputs
    scores = op("MatMul", swap_heads(op, _scaled(op, node)), op("Transpose", k, perm=[0, 2, 3, 1]))
    for mask in masks:
        scores = op("Where", op("Unsqueeze", mask, op.ints([1, 2])), scores, op.like(LOWEST, q))
    return [swap_heads(op, op("MatMul", op("Softmax", scores, axis=-1), swap_heads(op, v)))]


def openvino_rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """As OpenVINO's pass RoPEFusionGPTNEOX knows it, which makes one kernel of it."""
    x, *tables = node.inputs
    _, width = sizes(node)
    x = swap_heads(op, x)
    cos, sin = (op("Unsqueeze", op("Concat", t, t, axis=-1), op.ints([1])) for t in tables)
    halves = ((0, width // 2), (width // 2, width))
    first, second = (
        op("Slice", x, op.ints([begin]), op.ints([end]), op.ints([3]), op.ints([1])) for begin, end in halves
    )
    turned = op("Concat", op("Mul", second, op.like(-1.0, node.inputs[0])), first, axis=-1)
    return [swap_heads(op, op("Add", op("Mul", x, cos), op("Mul", turned, sin)))]


def concat_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Cache and new rows side by side; a key belongs at an entry, FAR where the cache holds nothing."""
    _, k, v, k_cache, v_cache, own, entries = node.inputs
    first = op("ReduceMin", own, op.ints([1]), keepdims=1)  # [B, 1]
    far = op("Cast", op.const(FAR), to=ir.DataType.INT32)
    held = op("Where", op("Less", entries, first), entries, far)  # [B, M]
    place = op("Unsqueeze", op("Concat", held, own, axis=1), op.ints([1, 2]))  # [B, 1, 1, M + S]
    keys = op("Concat", k_cache, swap_heads(op, k), axis=2)
    values = op("Concat", v_cache, swap_heads(op, v), axis=2)
    rows = [op("Transpose", x, perm=[1, 0, 2, 3]) for x in (k, v)]
    return [_grouped_attention(op, node, keys, values, place), *rows]


def plain_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """The sum of squares in float32: in 16 bits it would overflow or lose its small terms."""
    x, weight = node.inputs
    assert x is not None
    wide = x if x.dtype == ir.DataType.FLOAT else op("Cast", x, to=ir.DataType.FLOAT)
    square = op("ReduceMean", op("Mul", wide, wide), op.ints([-1]))
    out = op("Div", wide, op("Sqrt", op("Add", square, op.const(attribute(node, "epsilon")))))
    return [op("Mul", out if wide is x else op("Cast", out, to=x.dtype), weight)]
