"""A few lines over onnx_ir to write nodes as calls: ``op("Add", x, y)`` returns the output value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Ops:
    """Records nodes in order; ``nodes`` is the list so far. A subgraph's ``prefix`` keeps the names of values apart."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self.prefix = prefix

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output and return that output."""
        return self.multi(op_type, 1, *inputs, domain=domain, **attributes)[0]

    def multi(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Append a node with ``outputs`` outputs and return them."""
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=outputs)
        self.nodes.append(node)
        if self.prefix:
            for i, value in enumerate(node.outputs):
                value.name = f"{self.prefix}{len(self.nodes)}_{i}"
        return node.outputs

    def const(self, value: float | int) -> ir.Value:
        """A scalar constant: float32 for a float, int64 for an int."""
        if isinstance(value, float):
            return self("Constant", value_float=value)
        return self("Constant", value_int=value)

    def like(self, value: float, x: Any) -> ir.Value:
        """A scalar constant of the type of ``x``."""
        return self("Cast", self.const(value), to=x.dtype)

    def uint8(self, value: int) -> ir.Value:
        """A scalar of that type."""
        return self("Constant", value=ir.tensor(np.array(value, np.uint8)))

    def ints(self, values: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self("Constant", value_ints=list(values))
