"""All pruning graphs; writes those that ship with the package: ``python -m ppexport.exporters.selectors``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ..models.config import PRUNE_GRAPHS, PRUNE_METRICS, SELECTOR_BLOCKS, prune_file
from .dialects import DIALECTS, Dialect
from .prune import prune_graph
from .temporal import temporal_graph

DIRECTORY = Path(__file__).resolve().parent.parent / "runtime" / "selectors"


def pruning_graphs(block: int, dialect: Dialect) -> dict[str, ir.Model]:
    """File name -> graph, of every method and metric, for tokens of ``block`` x ``block`` pixels."""
    found = {prune_file(method, metric): prune_graph(block, dialect, method, metric) for method, metric in PRUNE_GRAPHS}
    return found | {prune_file("temporal", metric): temporal_graph(block, dialect, metric) for metric in PRUNE_METRICS}


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
