"""ONNX Runtime's CUDA provider: graphs run with IO binding on device memory, on the backend's own stream.

Graphs of the dialect ``plain``: the ``ort`` ones calculate in float32, which GroupQueryAttention on CUDA does not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.checks import utf8
from ...models.dtype import BY_NAME
from ...models.errors import BackendError
from .gpu import GpuBackend
from .ort import import_onnxruntime
from .session import Buffer

PROVIDER = "CUDAExecutionProvider"


class OrtCuda(GpuBackend):
    """The backend. Raises BackendError if onnxruntime-gpu or a GPU is missing."""

    def __init__(self) -> None:
        self.ort = import_onnxruntime("cuda")
        providers = self.ort.get_available_providers()
        if PROVIDER not in providers:
            raise BackendError(
                f"onnxruntime {self.ort.__version__} has the providers {', '.join(providers)}, expected "
                f"{PROVIDER}; pip uninstall onnxruntime, then: pip install 'ppexport[cuda]'"
            )
        super().__init__()
        self.name = f"onnxruntime-cuda {self.ort.__version__}"

    def session(self, path: Path) -> OrtCudaSession:
        """See session.Backend. Raises BackendError quoting ONNX Runtime if it refuses the graph."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        settings = {
            "device_id": "0",
            "user_compute_stream": str(self.stream),
            "use_tf32": "0",
        }  # float32 as it says
        provider = (PROVIDER, settings)
        file = utf8(path)
        try:
            session = self.ort.InferenceSession(file, options, providers=[provider, "CPUExecutionProvider"])
        except Exception as err:
            raise BackendError(
                f"ONNX Runtime {self.ort.__version__} cannot load {path.name} on CUDA: {err}"
            ) from err
        if PROVIDER not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime did not take {PROVIDER} for {path.name}: its CUDA libraries do not load"
            )
        return OrtCudaSession(self, session)


class OrtCudaSession:
    """An onnxruntime.InferenceSession on the GPU."""

    def __init__(self, backend: OrtCuda, session: Any):
        self.backend = backend
        self.loaded = session
        self.inputs: Sequence[str] = [value.name for value in session.get_inputs()]
        self.outputs: Sequence[str] = [value.name for value in session.get_outputs()]

    def binding(self) -> OrtCudaBinding:
        """See session.Session."""
        return OrtCudaBinding(self)


class OrtCudaBinding:
    """IO binding on device pointers; keeps the bound buffers alive."""

    def __init__(self, session: OrtCudaSession):
        self.session = session
        self.io = session.loaded.io_binding()
        self.buffers: dict[str, Buffer] = {}

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self.buffers[name] = buffer
        self.io.bind_input(name, "cuda", 0, BY_NAME[buffer.dtype].onnx, buffer.shape, buffer.pointer)

    def output(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self.buffers[name] = buffer
        self.io.bind_output(name, "cuda", 0, BY_NAME[buffer.dtype].onnx, buffer.shape, buffer.pointer)

    def run(self) -> None:
        """See session.Binding."""
        try:
            with self.session.backend.lock:
                self.session.loaded.run_with_iobinding(self.io)
        except Exception as err:
            raise BackendError(f"ONNX Runtime could not run the graph on CUDA: {err}") from err
