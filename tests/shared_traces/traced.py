"""Traced graphs, in memory and in a folder that the processes of a run share: tracing takes most of a build."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch._subclasses.fake_tensor import FakeTensor


class Traces:
    """Graphs by what they were traced from; every use gets a copy."""

    SHARED = ("trace_vision", "trace_language")  # of exporters/graphs.py

    def __init__(self, folder: Path):
        self.folder = folder
        self.reads = True  # graphs that other processes have traced
        self._held: dict[str, ir.Model] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def anew(self) -> None:
        """Trace everything once more from now on."""
        self.reads = False
        self._held.clear()

    def once(self, trace: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
        """The same function, whose results are kept."""

        def traced_once(config: Any, *given: Any) -> ir.Model:
            settled = [sorted(value) if isinstance(value, Set) else value for value in given]
            key = hashlib.sha256(repr((trace.__name__, config, settled)).encode()).hexdigest()
            if key not in self._held:
                file = self.folder / key
                if self.reads and file.exists():
                    self._held[key] = loaded(file.read_bytes())
                else:
                    self._held[key] = trace(config, *given)
                    partial = file.with_name(f"{key}.{os.getpid()}")
                    partial.write_bytes(stored(self._held[key]))
                    partial.replace(file)
            return self._held[key].clone()

        return traced_once


def stored(model: ir.Model) -> bytes:
    """A traced graph as a file: weights, which have no values yet, are inputs after the others there."""
    copy = model.clone()
    count = len(copy.graph.inputs)
    for name, value in list(copy.graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
    return count.to_bytes(4, "little") + ir.to_proto(copy).SerializeToString()


def loaded(data: bytes) -> ir.Model:
    """The graph again."""
    model = ir.from_proto(onnx.ModelProto.FromString(data[4:]))
    count = int.from_bytes(data[:4], "little")
    for value in list(model.graph.inputs)[count:]:
        model.graph.inputs.remove(value)
        assert value.name is not None
        model.graph.initializers[value.name] = value
    return model
