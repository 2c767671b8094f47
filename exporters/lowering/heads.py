"""What translations of several dialects share: sizes and attributes of a node, and where heads stand."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from .onnx_writer import Ops


def sizes(node: ir.Node, index: int = 0) -> tuple[int, int]:
    """(heads, Dh) of input ``index``, a [B, S, heads, Dh] value; both are static in every graph."""
    shape = node.inputs[index].shape  # type: ignore[union-attr]
    assert shape is not None
    return int(shape[2]), int(shape[3])  # type: ignore[arg-type]


def attribute(node: ir.Node, name: str) -> Any:
    """The value of an attribute of a node."""
    return node.attributes[name].value


def join_heads(op: Ops, x: Any, heads: int, width: int) -> ir.Value:
    """[B, S, heads, Dh] -> [B, S, heads * Dh]."""
    out = op("Reshape", x, op.ints([0, 0, heads * width]))
    if x.shape is not None:
        out.type = x.type
        out.shape = ir.Shape([*x.shape[:2], heads * width])
    return out


def split_heads(op: Ops, x: Any, heads: int, width: int) -> ir.Value:
    """[B, S, heads * Dh] -> [B, S, heads, Dh]."""
    return op("Reshape", x, op.ints([0, 0, heads, width]))


def swap_heads(op: Ops, x: Any) -> ir.Value:
    """[B, S, heads, Dh] <-> [B, heads, S, Dh]."""
    return op("Transpose", x, perm=[0, 2, 1, 3])
