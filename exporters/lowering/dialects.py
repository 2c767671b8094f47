"""How the nodes of ``ops.py`` are written in ONNX: one table of translations per dialect.

``ort``       ONNX Runtime on a CPU: GroupQueryAttention and MultiHeadAttention, caches updated in place; in float32.
``cuda``      The same for ONNX Runtime's CUDA provider, in 16 bits; decode is made of what a CUDA graph can hold.
``standard``  ONNX opset 24, no vendor op: caches by TensorScatter, the tower's attention by Attention, for TensorRT
              (10.15 or later) and TensorRT-RTX.
``plain``     ONNX opset 20 and the operators of TensorRT 10.3 (JetPack 6): attention from MatMul and Softmax.

``openvino`` is for a tower only, which stands a second time in a bundle of dialect ``ort``, on the same weights: no
vendor op, attention from MatMul and Softmax and rotary positions in the form that OpenVINO makes one kernel of each.

Sources: the ONNX operator pages (Attention-24, TensorScatter-24, RMSNormalization-23, Gelu-20), ONNX Runtime's
docs/ContribOperators.md (com.microsoft: GroupQueryAttention, MultiHeadAttention, RotaryEmbedding) and
docs/OperatorKernels.md (types by provider), and onnx-tensorrt's docs/operators.md of release 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .delta_rule import causal_convolution, delta_rule
from .onnx_writer import Ops
from .ops import DOMAIN
from .passes import (
    ENTRIES,
    cache_rows,
    entries_input,
    float_cumsum,
    float_outputs,
    one_reshape,
    shapes_after_cast,
    skip_norm,
)

LOWEST = -30000.0  # a score that gets no share, in every float type
FAR = 1 << 30  # an entry behind every token's own
Translation = Callable[[Ops, ir.Node], Sequence[ir.Value]]


@dataclass(frozen=True)
class Dialect:
    """One way to write a graph."""

    name: str
    opset: int  # of the default domain
    cast_first: bool  # cast a uint8 image before anything else (TensorRT takes uint8 as a graph input only)
    table: Mapping[str, Translation]  # op type in the domain "ppexport" -> its nodes
    passes: tuple[Callable[[ir.Model], None], ...] = ()  # over the whole graph, afterwards
    byte_max: bool = True  # may Max and Min be used on uint8?


def lower(model: ir.Model, dialect: Dialect) -> None:
    """Replace every node of the domain "ppexport" by the nodes of ``dialect``, in place.

    Raises KeyError for an op that the dialect does not know.
    """
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        op = Ops()
        new = dialect.table[node.op_type](op, node)
        for before, after in zip(node.outputs, new, strict=True):
            after.name = before.name
            after.type = before.type
            after.shape = before.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, node.outputs, new)
    model.graph.opset_imports.pop(DOMAIN, None)
    model.graph.opset_imports[""] = dialect.opset
    for domain in {node.domain for node in model.graph} - {""}:
        model.graph.opset_imports[domain] = 1
    for step in dialect.passes:
        step(model)


def _sizes(node: ir.Node, index: int = 0) -> tuple[int, int]:
    """(heads, Dh) of input ``index``, a [B, S, heads, Dh] value; both are static in every graph."""
    shape = node.inputs[index].shape  # type: ignore[union-attr]
    assert shape is not None
    return int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def _attr(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def _join(op: Ops, x: Any, heads: int, width: int) -> ir.Value:
    """[B, S, heads, Dh] -> [B, S, heads * Dh]."""
    out = op("Reshape", x, op.ints([0, 0, heads * width]))
    if x.shape is not None:
        out.type = x.type
        out.shape = ir.Shape([*x.shape[:2], heads * width])
    return out


def _split(op: Ops, x: Any, heads: int, width: int) -> ir.Value:
    """[B, S, heads * Dh] -> [B, S, heads, Dh]."""
    return op("Reshape", x, op.ints([0, 0, heads, width]))


def _swap(op: Ops, x: Any) -> ir.Value:
    """[B, S, heads, Dh] <-> [B, heads, S, Dh]."""
    return op("Transpose", x, perm=[0, 2, 1, 3])


def _gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    return [op("Gelu", node.inputs[0], approximate=_attr(node, "approximate"))]


# ---------------------------------------------------------------------------------------------------- ort


def _ort_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    heads, width = _sizes(node)
    inputs: list[Any] = [_join(op, x, heads, width) for x in node.inputs[:3]]
    if len(node.inputs) > 3:  # no bias; which keys are real
        inputs += [None, op("Cast", node.inputs[3], to=ir.DataType.INT32)]
    out = op(
        "MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=heads, scale=_attr(node, "scale")
    )
    return [_split(op, out, heads, width)]


def _ort_quick_gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    return [op("QuickGelu", node.inputs[0], domain="com.microsoft", alpha=1.702)]


def _ort_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    last = _last_entry(op, node)
    total = op("Add", op("ReduceMax", last, keepdims=0), op("Cast", op.const(1), to=ir.DataType.INT32))
    return _group_query_attention(op, node, last, total)


def _last_entry(op: Ops, node: ir.Node) -> ir.Value:
    """[B], of each row the entry of its last token."""
    return op("ReduceMax", node.inputs[5], op.ints([1]), keepdims=0)


def _group_query_attention(op: Ops, node: ir.Node, last: Any, total: Any) -> Sequence[ir.Value]:
    """``total``: a scalar in the host's memory, how many entries to look at."""
    q, k, v, k_cache, v_cache, _, _ = node.inputs
    (heads, width), (kv_heads, _) = _sizes(node, 0), _sizes(node, 1)
    out, new_k, new_v = op.multi(
        "GroupQueryAttention",
        3,
        _join(op, q, heads, width),
        _join(op, k, kv_heads, width),
        _join(op, v, kv_heads, width),
        k_cache,
        v_cache,
        last,
        total,
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=_attr(node, "scale"),
    )
    return [_split(op, out, heads, width), new_k, new_v]


def _ort_rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    x, cos, sin = node.inputs
    heads, width = _sizes(node)
    rows = op("Shape", cos, start=0, end=2)
    count = op("ReduceProd", rows, keepdims=0)
    ids = op("Reshape", op("Range", op.const(0), count, op.const(1)), rows)  # each row of the tables once
    tables = [op("Reshape", t, op.ints([-1, width // 2])) for t in (cos, sin)]
    joined = _join(op, x, heads, width)
    out = op("RotaryEmbedding", joined, ids, *tables, domain="com.microsoft", num_heads=heads)
    out.type = joined.type
    out.shape = joined.shape
    return [_split(op, out, heads, width)]


def _ort_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """With the sum before it, else plain operators, which ONNX Runtime fuses into SimplifiedLayerNormalization."""
    x, weight = node.inputs
    assert x is not None and weight is not None  # noqa: PT018
    if (fused := skip_norm(op, x, weight, _attr(node, "epsilon"))) is not None:
        return [fused]
    square = op("ReduceMean", op("Pow", x, op.const(2.0)), op.ints([-1]))
    root = op("Sqrt", op("Add", square, op.const(_attr(node, "epsilon"))))
    return [op("Mul", op("Div", x, root), weight)]


def _ort_causal_convolution(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
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


def _ort_delta_rule(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Queries are divided by the square root of their width there."""
    q, k, v, decay, beta, state = node.inputs
    (key_heads, key_width), (heads, width) = _sizes(node, 0), _sizes(node, 2)
    out, new = op.multi(
        "LinearAttention",
        2,
        _join(op, q, key_heads, key_width),
        _join(op, k, key_heads, key_width),
        _join(op, v, heads, width),
        state,
        decay,
        beta,
        domain="com.microsoft",
        q_num_heads=key_heads,
        kv_num_heads=heads,
        update_rule="gated_delta",
        scale=0.0,
    )
    return [_split(op, out, heads, width), new]


# --------------------------------------------------------------------------------------------------- cuda


def _cuda_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """How many entries to look at is the size of an input, which is known without waiting for the GPU."""
    entries = node.inputs[6]
    assert entries is not None
    entries.name = ENTRIES  # of which a pass makes an input
    total = op("Cast", op("Squeeze", op("Shape", entries), op.ints([0])), to=ir.DataType.INT32)
    return _group_query_attention(op, node, _last_entry(op, node), total)


def _cuda_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """In one kernel, with the sum before it where there is one; squares are summed up in float32."""
    x, weight = node.inputs
    assert x is not None and weight is not None  # noqa: PT018
    if (fused := skip_norm(op, x, weight, _attr(node, "epsilon"))) is not None:
        return [fused]
    return [
        op("SimplifiedLayerNormalization", x, weight, axis=-1, stash_type=1, epsilon=_attr(node, "epsilon"))
    ]


# ----------------------------------------------------------------------------------------------- standard


def _standard_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v = (_swap(op, x) for x in node.inputs[:3])
    masks = [op("Unsqueeze", mask, op.ints([1, 2])) for mask in node.inputs[3:]]  # [B, 1, 1, S]
    return [_swap(op, op("Attention", q, k, v, *masks, scale=_attr(node, "scale")))]


def _quick_gelu(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    x = node.inputs[0]
    return [op("Mul", x, op("Sigmoid", op("Mul", x, op.like(1.702, x))))]


def _standard_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """New rows go where the cache is; the first ``entries`` of it are looked at."""
    _, k, v, k_cache, v_cache, own, entries = node.inputs
    assert entries is not None
    entries.name = ENTRIES  # of which a pass makes an input
    first = op("Cast", op("ReduceMin", own, op.ints([1]), keepdims=0), to=ir.DataType.INT64)  # [B]
    new_k = op("TensorScatter", k_cache, _swap(op, k), first, axis=2)
    new_v = op("TensorScatter", v_cache, _swap(op, v), first, axis=2)
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
    (heads, width), (kv_heads, _) = _sizes(node, 0), _sizes(node, 1)
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


def _standard_rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    x, cos, sin = node.inputs
    first, second = op.multi("Split", 2, x, axis=-1, num_outputs=2)
    cos, sin = (op("Unsqueeze", t, op.ints([2])) for t in (cos, sin))
    left = op("Sub", op("Mul", first, cos), op("Mul", second, sin))
    right = op("Add", op("Mul", second, cos), op("Mul", first, sin))
    return [op("Concat", left, right, axis=-1)]


def _standard_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    x, weight = node.inputs
    return [op("RMSNormalization", x, weight, axis=-1, epsilon=_attr(node, "epsilon"))]


# -------------------------------------------------------------------------------------------------- plain


def _scaled(op: Ops, node: ir.Node) -> ir.Value:
    """The queries times the scale: smaller than the scores, and in range where scores of 16 bits might not be."""
    q = node.inputs[0]
    return op("Mul", q, op.like(_attr(node, "scale"), q))


def _plain_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    q, k, v, *masks = node.inputs
    scores = op("MatMul", _swap(op, _scaled(op, node)), op("Transpose", k, perm=[0, 2, 3, 1]))
    for mask in masks:
        scores = op("Where", op("Unsqueeze", mask, op.ints([1, 2])), scores, op.like(LOWEST, q))
    return [_swap(op, op("MatMul", op("Softmax", scores, axis=-1), _swap(op, v)))]


def _openvino_rotary(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """As OpenVINO's pass RoPEFusionGPTNEOX knows it, which makes one kernel of it."""
    x, *tables = node.inputs
    _, width = _sizes(node)
    x = _swap(op, x)
    cos, sin = (op("Unsqueeze", op("Concat", t, t, axis=-1), op.ints([1])) for t in tables)
    halves = ((0, width // 2), (width // 2, width))
    first, second = (
        op("Slice", x, op.ints([begin]), op.ints([end]), op.ints([3]), op.ints([1])) for begin, end in halves
    )
    turned = op("Concat", op("Mul", second, op.like(-1.0, node.inputs[0])), first, axis=-1)
    return [_swap(op, op("Add", op("Mul", x, cos), op("Mul", turned, sin)))]


def _plain_cached_attention(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """Cache and new rows side by side; a key belongs at an entry, FAR where the cache holds nothing."""
    _, k, v, k_cache, v_cache, own, entries = node.inputs
    first = op("ReduceMin", own, op.ints([1]), keepdims=1)  # [B, 1]
    far = op("Cast", op.const(FAR), to=ir.DataType.INT32)
    held = op("Where", op("Less", entries, first), entries, far)  # [B, M]
    place = op("Unsqueeze", op("Concat", held, own, axis=1), op.ints([1, 2]))  # [B, 1, 1, M + S]
    keys = op("Concat", k_cache, _swap(op, k), axis=2)
    values = op("Concat", v_cache, _swap(op, v), axis=2)
    rows = [op("Transpose", x, perm=[1, 0, 2, 3]) for x in (k, v)]
    return [_grouped_attention(op, node, keys, values, place), *rows]


def _plain_rms_norm(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """The sum of squares in float32: in 16 bits it would overflow or lose its small terms."""
    x, weight = node.inputs
    assert x is not None
    wide = x if x.dtype == ir.DataType.FLOAT else op("Cast", x, to=ir.DataType.FLOAT)
    square = op("ReduceMean", op("Mul", wide, wide), op.ints([-1]))
    out = op("Div", wide, op("Sqrt", op("Add", square, op.const(_attr(node, "epsilon")))))
    return [op("Mul", out if wide is x else op("Cast", out, to=x.dtype), weight)]


ORT = {
    "Attention": _ort_attention,
    "CachedAttention": _ort_cached_attention,
    "Rotary": _ort_rotary,
    "RMSNorm": _ort_rms_norm,
    "Gelu": _gelu,
    "QuickGelu": _ort_quick_gelu,
    "CausalConvolution": _ort_causal_convolution,
    "DeltaRule": _ort_delta_rule,
}
COMMON = {  # of the dialects for engines
    "Rotary": _standard_rotary,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "CausalConvolution": causal_convolution,
    "DeltaRule": delta_rule,
}
DIALECTS = {
    "ort": Dialect(
        "ort",
        opset=21,
        cast_first=False,
        table=ORT,
        passes=(one_reshape,),
    ),
    "cuda": Dialect(
        "cuda",
        opset=21,
        cast_first=True,  # Max, Min and Shape of bytes are for CPUs only
        table={**ORT, "CachedAttention": _cuda_cached_attention, "RMSNorm": _cuda_rms_norm},
        passes=(one_reshape, entries_input),
    ),
    "standard": Dialect(
        "standard",
        opset=24,
        cast_first=True,
        table={
            **COMMON,
            "Attention": _standard_attention,
            "CachedAttention": _standard_cached_attention,
            "RMSNorm": _standard_rms_norm,
        },
        passes=(entries_input,),
    ),
    "plain": Dialect(
        "plain",
        opset=20,
        cast_first=True,
        table={
            **COMMON,
            "Attention": _plain_attention,
            "CachedAttention": _plain_cached_attention,
            "RMSNorm": _plain_rms_norm,
        },
        passes=(float_cumsum, shapes_after_cast, cache_rows),
    ),
}
OPENVINO = Dialect(
    "openvino",
    opset=20,
    cast_first=False,
    table={
        **COMMON,
        "Attention": _plain_attention,
        "Rotary": _openvino_rotary,
        "RMSNorm": _plain_rms_norm,
    },
    passes=(float_outputs,),
)
