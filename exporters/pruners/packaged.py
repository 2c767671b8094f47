"""Writes the pruning graphs that ship with the package: ``python -m ppexport.exporters.pruners.packaged``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...models.pruners.pixelprune import SELECTOR_BLOCKS
from ..lowering.dialects import DIALECTS
from . import Sizes, pruning_graphs

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "runtime" / "selectors"


def packaged() -> dict[Path, bytes]:
    """File -> the serialized graph, for every block size, method and metric."""
    found = {}
    for block in SELECTOR_BLOCKS:
        for file, graph in pruning_graphs(Sizes(block), DIALECTS["ort"]).items():
            found[DIRECTORY / str(block) / file] = ir.to_proto(graph).SerializeToString(deterministic=True)
    return found


if __name__ == "__main__":
    for path, content in packaged().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
