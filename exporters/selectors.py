"""Writes the selector graphs that ship with the package: ``python -m ppexport.exporters.selectors``."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx_ir as ir

from ..models.config import PRUNE_GRAPHS, SELECTOR_BLOCKS, prune_file
from .dialects import DIALECTS
from .prune import prune_graph

DIRECTORY = Path(__file__).resolve().parent.parent / "runtime" / "selectors"


def packaged() -> dict[Path, bytes]:
    """File -> the serialized graph, for every block size, method and metric."""
    found = {}
    for block, (method, metric) in itertools.product(SELECTOR_BLOCKS, PRUNE_GRAPHS):
        proto = ir.to_proto(prune_graph(block, DIALECTS["ort"], method, metric))
        found[DIRECTORY / str(block) / prune_file(method, metric)] = proto.SerializeToString(deterministic=True)
    return found


if __name__ == "__main__":
    for path, content in packaged().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
