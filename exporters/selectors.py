"""Writes the selector graphs that ship with the package: ``python -m ppexport.exporters.selectors``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ..models.config import SELECTOR_BLOCKS
from .dialects import DIALECTS
from .prune import prune_graph

DIRECTORY = Path(__file__).resolve().parent.parent / "runtime" / "selectors"


def selector_bytes(block: int) -> bytes:
    """The packaged graph for tokens of ``block`` x ``block`` pixels, serialized."""
    return ir.to_proto(prune_graph(block, DIALECTS["ort"])).SerializeToString(deterministic=True)


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for block in SELECTOR_BLOCKS:
        (DIRECTORY / f"block_{block}.onnx").write_bytes(selector_bytes(block))
