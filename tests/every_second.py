"""A pruner that keeps every second token, as two files would add it: settings in models, graphs in exporters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from ppexport.exporters.lowering.dialects import Dialect
from ppexport.exporters.lowering.onnx_writer import Ops
from ppexport.exporters.pruners import Sizes
from ppexport.exporters.pruners.pixelprune import finish, image_input, output


@dataclass(frozen=True)
class EverySecond:
    """Of the image: its tokens ``first``, ``first`` + 2, ..."""

    name: ClassVar[str] = "every_second"
    after: ClassVar[Literal["image", "vision"]] = "image"
    first: int = 0  # 0 or 1

    @property
    def graph(self) -> str:
        return self.name

    def inputs(self, block: int) -> dict[str, int]:
        return {"first": self.first}

    def idle(self, tokens: int) -> str:
        return ""


@dataclass(frozen=True)
class EverySecondFeature(EverySecond):
    """The same, of what the vision tower gives."""

    name: ClassVar[str] = "every_second_feature"
    after: ClassVar[Literal["image", "vision"]] = "vision"


def graphs(sizes: Sizes, dialect: Dialect) -> dict[str, ir.Model]:
    op = Ops()
    image, grid = image_input(op, dialect, sizes.block)
    first, order, count = _sorted(op, grid.total)
    outputs = [output(order, "order", "N"), output(count, "count", 1)]
    return {EverySecond.name: finish(op, dialect, [image, first], outputs)}


def feature_graphs(sizes: Sizes, dialect: Dialect) -> dict[str, ir.Model]:
    op = Ops()
    features = ir.val("features", sizes.dtype, [1 + sizes.levels, "K", sizes.width])
    total = op("Squeeze", op("Shape", features, start=1, end=2))
    first, order, count = _sorted(op, total)
    pruned = op("Gather", features, order, axis=1)
    outputs = [
        output(order, "order", "K"),
        output(count, "count", 1),
        output(pruned, "pruned", 1 + sizes.levels, "K", sizes.width, dtype=sizes.dtype),
    ]
    return {EverySecondFeature.name: finish(op, dialect, [features, first], outputs)}


def _sorted(op: Ops, total: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The input ``first``; the tokens first, first + 2, ... and then the others, int32 [N]; how many those are."""
    first = ir.val("first", ir.DataType.INT32, [1])
    start = op("Squeeze", op("Cast", first, to=ir.DataType.INT64))
    kept = op("Range", start, total, op.const(2))
    others = op("Range", op("Sub", op.const(1), start), total, op.const(2))
    order = op("Cast", op("Concat", kept, others, axis=0), to=ir.DataType.INT32)
    return first, order, op("Cast", op("Shape", kept), to=ir.DataType.INT32)
