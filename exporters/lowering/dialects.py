"""How the nodes of ``ops.py`` are written in ONNX: one table of translations per dialect.

The translations are in ort_operators.py, onnx_operators.py and delta_rule.py.

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

import onnx_ir as ir

from . import onnx_operators, ort_operators
from .delta_rule import causal_convolution, delta_rule
from .onnx_writer import Ops
from .ops import DOMAIN
from .passes import (
    cache_rows,
    entries_input,
    float_cumsum,
    float_outputs,
    one_reshape,
    shapes_after_cast,
)

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


ORT = {
    "Attention": ort_operators.attention,
    "CachedAttention": ort_operators.cached_attention,
    "Rotary": ort_operators.rotary,
    "RMSNorm": ort_operators.rms_norm,
    "Gelu": onnx_operators.gelu,
    "QuickGelu": ort_operators.quick_gelu,
    "CausalConvolution": ort_operators.causal_convolution,
    "DeltaRule": ort_operators.delta_rule,
}
COMMON = {  # of the dialects for engines
    "Rotary": onnx_operators.rotary,
    "Gelu": onnx_operators.gelu,
    "QuickGelu": onnx_operators.quick_gelu,
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
        table={
            **ORT,
            "CachedAttention": ort_operators.cached_attention_with_entries,
            "RMSNorm": ort_operators.fused_rms_norm,
        },
        passes=(one_reshape, entries_input),
    ),
    "standard": Dialect(
        "standard",
        opset=24,
        cast_first=True,
        table={
            **COMMON,
            "Attention": onnx_operators.attention,
            "CachedAttention": onnx_operators.scatter_cached_attention,
            "RMSNorm": onnx_operators.rms_norm,
        },
        passes=(entries_input,),
    ),
    "plain": Dialect(
        "plain",
        opset=20,
        cast_first=True,
        table={
            **COMMON,
            "Attention": onnx_operators.plain_attention,
            "CachedAttention": onnx_operators.concat_cached_attention,
            "RMSNorm": onnx_operators.plain_rms_norm,
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
        "Attention": onnx_operators.plain_attention,
        "Rotary": onnx_operators.openvino_rotary,
        "RMSNorm": onnx_operators.plain_rms_norm,
    },
    passes=(float_outputs,),
)
