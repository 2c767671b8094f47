"""All pruning graphs; writes those that ship with the package: ``python -m ppexport.exporters.pruners.packaged``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ...models.config import PRUNE_GRAPHS, PRUNE_METRICS, SELECTOR_BLOCKS, prune_file
from ..lowering.dialects import DIALECTS, Dialect
from .pixelprune import prune_graph
from .temporal import temporal_graph

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "runtime" / "selectors"


def pruning_graphs(block: int, dialect: Dialect) -> dict[str, ir.Model]:
    """File name -> graph, of every method and metric, for tokens of ``block`` x ``block`` pixels.

    Where graphs calculate on bytes, each one comes in both forms of models.config.prune_file.
    """
    graphs: dict[str, ir.Model] = {}
    for byte_max in (True,) if dialect.cast_first else (True, False):
        form = replace(dialect, byte_max=byte_max)
        for method, metric in PRUNE_GRAPHS:
            graphs[prune_file(method, metric, byte_max)] = prune_graph(block, form, method, metric)
        for metric in PRUNE_METRICS:
            graphs[prune_file("temporal", metric, byte_max)] = temporal_graph(block, form, metric)
    return graphs


def packaged() -> dict[Path, bytes]:
    """File -> the serialized graph, for every block size, method and metric."""
    found = {}
    for block in SELECTOR_BLOCKS:
        for file, graph in pruning_graphs(block, DIALECTS["ort"]).items():
            found[DIRECTORY / str(block) / file] = ir.to_proto(graph).SerializeToString(deterministic=True)
    return found


if __name__ == "__main__":
    for path, content in packaged().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
