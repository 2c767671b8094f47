"""OpenVINO: graphs on Intel's CPUs, GPUs and NPUs, and on other CPUs, on memory that numpy owns.

Source of the properties: openvino.properties and docs.openvino.ai ("CPU device", "Model caching overview").
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...models.checks import utf8
from ...models.dtype import BY_NAME
from ...models.errors import BackendError
from ...models.version import installed
from .host import HostMemory
from .processor import adds_up_bytes, multiplies_bfloat16
from .session import Buffer

LOG = logging.getLogger(__name__)
CACHE = "openvino-cache"  # folder of a bundle, with one for each graph and its weights
TELEMETRY = "openvino_telemetry"
IMPORTS = threading.Lock()
INSTALL = "pip install 'ppexport[openvino]'"


def has_openvino() -> bool:
    """Is the package installed?"""
    return installed("openvino") is not None


def import_openvino() -> Any:
    """The module. Raises BackendError that says what is missing and names the extra to install.

    Its package openvino-telemetry would report to Intel that it was imported, and leave an identifier in the user's
    home: while openvino is imported that one is not to be found, which openvino is made for.
    """
    with IMPORTS:
        hidden = "openvino" not in sys.modules
        reports = sys.modules.get(TELEMETRY)
        if hidden:
            sys.modules[TELEMETRY] = None  # type: ignore[assignment]
        try:
            return importlib.import_module("openvino")
        except ImportError as err:
            raise BackendError(
                f"openvino cannot be imported ({err}), expected for device 'openvino'; install it with: {INSTALL}"
            ) from err
        finally:
            if hidden:
                sys.modules.pop(TELEMETRY, None)
            if hidden and reports is not None:
                sys.modules[TELEMETRY] = reports


def new_core(openvino: Any) -> Any:
    """What knows the devices. Raises BackendError where OpenVINO's libraries do not work."""
    try:
        return openvino.Core()
    except (RuntimeError, AttributeError) as err:
        raise BackendError(f"OpenVINO does not start: {err}; install it again: {INSTALL}") from err


class OpenVino(HostMemory):
    """The backend.

    ``place``: the device, as OpenVINO names it ("CPU", "GPU", "GPU.1", "NPU"); ``threads``: of the CPU, 0 for one per
    core; ``cache``: folder for compiled graphs, None for no such thing.

    What is float32 in a graph is calculated so (an NPU knows 16 bits only). What is bfloat16 is on CPUs that multiply
    it, in float32 elsewhere (OpenVINO would imitate it, fifteen times slower); products of 8 bits are calculated in
    floats where they would not add up.
    """

    batches = False

    def __init__(self, place: str = "CPU", threads: int = 0, cache: Path | None = None):
        self._openvino = import_openvino()
        self._core = new_core(self._openvino)
        self._place = place
        self._bfloat16 = place == "CPU" and multiplies_bfloat16()
        self.name = f"openvino-{place.lower()}"
        self.device = "openvino" if place == "CPU" else f"openvino:{place}"
        self.notes: list[str] = []
        self.byte_max = True
        self._properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if place == "CPU":
            self._properties |= {
                "INFERENCE_NUM_THREADS": threads,
                "ENABLE_CPU_PINNING": False,  # several processes would all take the first cores
            }
            if not adds_up_bytes():
                self._properties["LP_TRANSFORMS_MODE"] = False
        if place != "NPU":
            self._properties["INFERENCE_PRECISION_HINT"] = "f32"
        if cache is not None and _can_be_made(cache):
            self._properties["CACHE_DIR"] = utf8(cache)

    def session(self, path: Path) -> OpenVinoSession:
        """See session.Backend. Raises BackendError quoting OpenVINO if it refuses the graph or has no such device."""
        try:
            source = utf8(path) if self._bfloat16 else self._without_bfloat16(path)
            model = self._core.compile_model(source, self._place, self._properties)
        except RuntimeError as err:
            there = self._core.available_devices
            lacks = not any(name.split(".")[0] == self._place.split(".")[0] for name in there)
            todo = f"; install the driver of Intel's {self._place}, or name another device" if lacks else ""
            raise BackendError(
                f"OpenVINO {self._openvino.__version__} cannot load {path.name} on {self._place}: {_reason(err)}; "
                f"devices here: {', '.join(there) or 'none'}{todo}"
            ) from err
        return OpenVinoSession(self._openvino, model)

    def _without_bfloat16(self, path: Path) -> Any:
        """The graph with float32 in its place; the path itself where there is none."""
        float32, bfloat16 = self._openvino.Type.f32, self._openvino.Type.bf16
        model = self._core.read_model(utf8(path))
        found = [
            node
            for node in model.get_ordered_ops()
            if node.get_type_name() in ("Constant", "Convert") and node.get_output_element_type(0) == bfloat16
        ]
        for node in found:
            source = node.output(0) if node.get_type_name() == "Constant" else node.input_value(0)
            readers = node.output(0).get_target_inputs()
            wide = self._openvino.opset13.convert(source, float32)
            for reader in readers:
                reader.replace_source_output(wide.output(0))
        model.validate_nodes_and_infer_types()
        return model if found else utf8(path)


class OpenVinoSession:
    """An openvino.CompiledModel."""

    def __init__(self, openvino: Any, model: Any):
        self.openvino = openvino
        self.model = model
        self.inputs: Sequence[str] = [value.get_any_name() for value in model.inputs]
        self.outputs: Sequence[str] = [value.get_any_name() for value in model.outputs]

    def binding(self) -> OpenVinoBinding:
        """See session.Session."""
        return OpenVinoBinding(self)


class OpenVinoBinding:
    """An infer request whose tensors are the bound buffers themselves."""

    def __init__(self, session: OpenVinoSession):
        self._openvino = session.openvino
        try:
            self._request = session.model.create_infer_request()
        except RuntimeError as err:
            raise BackendError(f"OpenVINO has no room for a request: {_reason(err)}") from err
        self._bound: dict[str, Buffer] = {}

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding. Raises BackendError for a shape or a type that the graph does not take."""
        try:
            self._request.set_tensor(name, self._openvino.Tensor(_memory(buffer), shared_memory=True))
        except RuntimeError as err:
            raise BackendError(f"OpenVINO does not take {name} {list(buffer.shape)}: {_reason(err)}") from err
        self._bound[name] = buffer

    output = input

    def run(self) -> None:
        """See session.Binding."""
        try:
            self._request.infer()
        except RuntimeError as err:
            raise BackendError(f"OpenVINO could not run the graph: {_reason(err)}") from err


def _memory(buffer: Buffer) -> np.ndarray:
    """A buffer as an array that may be written, which OpenVINO wants of inputs, too."""
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.pointer))
    return memory.view(BY_NAME[buffer.dtype].numpy).reshape(buffer.shape)


def _reason(err: RuntimeError) -> str:
    """OpenVINO's words without the places in its source."""
    lines = [
        line for line in str(err).splitlines() if line and not line.startswith(("Exception from", "Check "))
    ]
    return " ".join(lines)[:500] or str(err)[:500]


def _can_be_made(folder: Path) -> bool:
    """Is there a folder of that name, or can one be made, that files can be put into?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        LOG.info("%s: compiled graphs cannot be kept: %s", folder, err)
        return False
    return os.access(folder, os.W_OK)
