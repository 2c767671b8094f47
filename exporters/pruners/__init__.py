"""Pruning as ONNX graphs: one file per pruner, named like its settings in models/pruners.

A file has a function ``graphs(sizes, dialect)``: name (Pruner.graph) -> graph. After "image" a graph takes image uint8
[H, W, 3], after "vision" features [1 + L, K, D], and whatever ``Pruner.inputs`` names as int32. It gives order
int32 [N] or [K], the kept token indices and then the dropped ones, and count int32 [1], how many are kept; after
"image" those rise. After "vision" it gives also pruned [1 + L, K, D], of which the first count tokens are what stands
for the kept ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ...models.config import ModelConfig
from ...models.pruners import PRUNERS
from ...models.pruners.pixelprune import prune_file
from ..lowering.dialects import Dialect
from . import pixelprune, prunesid, temporal


@dataclass(frozen=True)
class Sizes:
    """What graphs of pruners are made for."""

    block: int  # pixels per side of a merged token
    levels: int = 0  # L
    width: int = 1  # D
    dtype: ir.DataType = ir.DataType.FLOAT  # of the features
    hidden: int = 0  # C, of towers that give what the features are made of, and a score by their class token

    @classmethod
    def of(cls, model: ModelConfig, dtype: ir.DataType) -> Sizes:
        """Of a model whose features have this dtype."""
        hidden = model.vision.width if model.vision.class_token else 0
        return cls(model.vision.block, model.levels, model.text.width, dtype, hidden)


Graphs = Callable[[Sizes, Dialect], dict[str, ir.Model]]
GRAPHS: dict[str, Graphs] = {"pixelprune": pixelprune.graphs, "prunesid": prunesid.graphs}  # by Pruner.name


def pruning_graphs(
    sizes: Sizes, dialect: Dialect, after: Sequence[str] = ("image", "vision")
) -> dict[str, ir.Model]:
    """File name -> graph, of every pruner that looks at these, and of the prediction from the frame before.

    Where graphs calculate on bytes, each one comes in both forms of models.pruners.pixelprune.prune_file.
    """
    found: dict[str, ir.Model] = {}
    for byte_max in (True,) if dialect.cast_first else (True, False):
        form = replace(dialect, byte_max=byte_max)
        made = temporal.graphs(sizes, form)
        for name, graphs in GRAPHS.items():
            if PRUNERS[name].after in after and (byte_max or PRUNERS[name].after == "image"):
                made |= graphs(sizes, form)
        found |= {prune_file(graph, byte_max): model for graph, model in made.items()}
    return found
