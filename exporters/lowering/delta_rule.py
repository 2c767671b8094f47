"""The gated delta rule and its convolution in standard operators, for dialects without an operator of their own.

Tokens are calculated in chunks, all chunks at once as batched products; a Loop carries the state from chunk to chunk.
A single token is a chunk of one, and the Loop ends before its first step. Source: Yang et al. 2024, "Gated Delta
Networks", arXiv:2412.06464, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from ...models.config import DELTA_CHUNK
from .onnx_writer import Ops

NEVER = -1e30  # of an exponent


def causal_convolution(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """See ops.causal_convolution: as many products as the kernel has taps."""
    x, weight, state = node.inputs
    assert weight is not None
    assert weight.shape is not None
    taps = int(weight.shape[2])  # type: ignore[arg-type]
    whole = op("Concat", state, x, axis=1)
    count = op("Shape", x, start=1, end=2)
    mixed: Any = None
    for i in range(taps):
        first = op.ints([i])
        part = op("Slice", whole, first, op("Add", count, first), op.ints([1]))
        product = op("Mul", part, op("Reshape", op("Gather", weight, op.ints([i]), axis=2), op.ints([-1])))
        mixed = product if mixed is None else op("Add", mixed, product)
    out = op("Mul", mixed, op("Sigmoid", mixed))
    end = op("Add", count, op.ints([taps - 1]))
    return [out, op("Slice", whole, count, end, op.ints([1]))]


def delta_rule(op: Ops, node: ir.Node) -> Sequence[ir.Value]:
    """See ops.delta_rule."""
    q, k, v, decay, beta, state = node.inputs
    assert q is not None and v is not None  # noqa: PT018
    assert q.shape is not None and v.shape is not None  # noqa: PT018
    key_heads, key_width = int(q.shape[2]), int(q.shape[3])  # type: ignore[arg-type]
    heads, width = int(v.shape[2]), int(v.shape[3])  # type: ignore[arg-type]
    tokens = op("Shape", q, start=1, end=2)
    size = op("Min", tokens, op.ints([DELTA_CHUNK]))
    count = op("Div", op("Add", tokens, op("Sub", size, op.ints([1]))), size)
    padding = op("Sub", op("Mul", count, size), tokens)

    def chunked(x: Any, inner: int) -> ir.Value:
        """[B, S, H, inner] -> [B, H, chunks, size, inner]; what is filled up changes nothing: no decay, no beta."""
        pads = op("Concat", op.ints([0, 0, 0, 0, 0]), padding, op.ints([0, 0]), axis=0)
        filled = op("Pad", x, pads)
        shape = op("Concat", op.ints([0]), count, size, op.ints([heads, inner]), axis=0)
        return op("Transpose", op("Reshape", filled, shape), perm=[0, 3, 1, 2, 4])

    def every_head(x: Any) -> Any:
        if key_heads == heads:
            return x
        parts = [op("Unsqueeze", x, op.ints([3]))] * (heads // key_heads)
        return op("Reshape", op("Concat", *parts, axis=3), op.ints([0, 0, heads, key_width]))

    q = chunked(op("Mul", every_head(q), op.const(key_width**-0.5)), key_width)
    k = chunked(every_head(k), key_width)
    v = chunked(v, width)
    decay, beta = (chunked(op("Unsqueeze", x, op.ints([3])), 1) for x in (decay, beta))

    parts = _parts(op, q, k, v, decay, beta, size)
    first, state = _step(op, parts, op.const(0), state)
    inner = Ops("chunk_")
    step, go = ir.val("step", ir.DataType.INT64, []), ir.val("go", ir.DataType.BOOL, [])
    before_it = ir.val("state_in", ir.DataType.FLOAT, ["B", heads, key_width, width])
    out, after = _step(inner, parts, inner("Add", step, inner.const(1)), before_it)
    still = inner("Identity", go)
    still.type, still.shape = go.type, go.shape
    after.type, after.shape = before_it.type, before_it.shape
    out.type, out.shape = before_it.type, ir.Shape(["B", heads, "n", width])
    body = ir.Graph([step, go, before_it], [still, after, out], nodes=inner.nodes, name="chunk")
    always = op("Cast", op.const(1), to=ir.DataType.BOOL)  # TensorRT wants a condition
    times = op("Squeeze", op("Sub", count, op.ints([1])))
    state, others = op.multi("Loop", 2, times, always, state, body=body)
    found = op("Concat", op("Unsqueeze", first, op.ints([0])), others, axis=0)  # [chunks, B, H, size, dv]
    found = op("Transpose", found, perm=[1, 0, 3, 2, 4])
    whole = op("Concat", op.ints([0]), op("Mul", count, size), op.ints([heads, width]), axis=0)
    found = op("Slice", op("Reshape", found, whole), op.ints([0]), tokens, op.ints([1]))
    return [found, state]


def _parts(op: Ops, q: Any, k: Any, v: Any, decay: Any, beta: Any, size: Any) -> dict[str, ir.Value]:
    """What needs no state, of all chunks at once: q, k, v, decay and beta [B, H, chunks, size, ...]."""
    number = op("Range", op.const(0), op("Squeeze", size), op.const(1))
    row, column = op("Unsqueeze", number, op.ints([1])), op("Unsqueeze", number, op.ints([0]))
    until = op("LessOrEqual", column, row)
    # [..., size, 1], from the chunk's beginning
    since = op("MatMul", op("Cast", until, to=ir.DataType.FLOAT), decay)
    distance = op("Sub", since, op("Transpose", since, perm=[0, 1, 2, 4, 3]))
    between = op("Exp", op("Where", until, distance, op.const(NEVER)))
    turned = op("Transpose", k, perm=[0, 1, 2, 4, 3])
    keys = op("Mul", k, beta)
    system = op("Mul", op("MatMul", keys, turned), between)
    inverse = _inverse(op, system, row, column)
    grown = op("Exp", since)
    last = op("Gather", since, op.ints([-1]), axis=3)  # [B, H, chunks, 1, 1]
    return {
        "u": op("MatMul", inverse, op("Mul", v, beta)),
        "w": op("MatMul", inverse, op("Mul", keys, grown)),
        "att": op("Mul", op("MatMul", q, turned), between),
        "q": op("Mul", q, grown),
        "k": op("Mul", k, op("Exp", op("Sub", last, since))),
        "e": op("Exp", last),
    }


def _inverse(op: Ops, system: Any, row: Any, column: Any) -> Any:
    """Of the unit triangular matrices whose values below the diagonal are those of ``system`` [..., size, size].

    Block by block, each level from the one before: [[P, 0], [C, Q]] has the inverse [[P', 0], [-Q' C P', Q']]. A sum of
    powers would take fewer levels, but where keys are alike its terms are of 1e17 and cancel out.
    """
    inverse = op("Cast", op("Equal", column, row), to=ir.DataType.FLOAT)
    side = 1
    while side < DELTA_CHUNK:
        of_row, of_column = (op("Div", each, op.const(side)) for each in (row, column))
        of_pair = op("Equal", *(op("Div", each, op.const(2 * side)) for each in (row, column)))
        between = op("And", of_pair, op("Less", of_column, of_row))
        lower = op("Where", between, system, op.const(0.0))
        if side > 1:  # blocks of one are their own inverses
            lower = op("MatMul", inverse, op("MatMul", lower, inverse))
        inverse = op("Sub", inverse, lower)
        side *= 2
    return inverse


def _step(op: Ops, parts: dict[str, ir.Value], number: Any, state: Any) -> tuple[Any, Any]:
    """What a chunk puts out, and the state behind it."""
    own = {name: op("Gather", part, number, axis=2) for name, part in parts.items()}
    put_in = op("Sub", own["u"], op("MatMul", own["w"], state))
    out = op("Add", op("MatMul", own["q"], state), op("MatMul", own["att"], put_in))
    added = op("MatMul", op("Transpose", own["k"], perm=[0, 1, 3, 2]), put_in)
    return out, op("Add", op("Mul", state, own["e"]), added)
