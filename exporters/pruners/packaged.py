"""Writes the pruning graphs that ship with the package: ``python -m ppexport.exporters.pruners.packaged``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...models.pruners.pixelprune import SELECTOR_BLOCKS, prune_file
from ..lowering.dialects import DIALECTS
from . import Sizes, pruning_graphs
from .prunesid import prunesid_graph

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "runtime" / "selectors"


def packaged() -> dict[Path, bytes]:
    """File -> the serialized graph: on pixels for every block size, on features for every width."""
    graphs = {}
    for block in SELECTOR_BLOCKS:
        for file, graph in pruning_graphs(Sizes(block), DIALECTS["ort"], after=("image",)).items():
            graphs[DIRECTORY / str(block) / file] = graph
    for variant in ("qwen", "llava"):
        file = prune_file(f"prunesid.{variant}")
        graphs[DIRECTORY / "features" / file] = prunesid_graph(variant, None, DIALECTS["ort"])
    return {path: ir.to_proto(graph).SerializeToString(deterministic=True) for path, graph in graphs.items()}


if __name__ == "__main__":
    for path, content in packaged().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
