"""ONNX Runtime's CUDA provider: graphs run with IO binding on device memory, on the backend's own stream.

Graphs of the dialect ``cuda``, and ``plain`` ones. Those of ``ort`` calculate in float32, which GroupQueryAttention on
CUDA does not take.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.checks import utf8
from ...models.dtype import BY_NAME
from ...models.errors import BackendError
from .gpu import GpuBackend
from .ort import import_onnxruntime
from .session import Buffer

LOG = logging.getLogger(__name__)
PROVIDER = "CUDAExecutionProvider"
DECODER = "language.onnx"
NO_GRAPH = -1  # "gpu_graph_id" of a run that is neither captured nor replayed
MOST_GRAPHS = 64  # ONNX Runtime keeps every captured graph as long as the session


class OrtCuda(GpuBackend):
    """The backend. Raises BackendError if onnxruntime-gpu or a GPU is missing."""

    device = "cuda"

    def __init__(self) -> None:
        self.ort = import_onnxruntime("cuda")
        providers = self.ort.get_available_providers()
        if PROVIDER not in providers:
            raise BackendError(
                f"onnxruntime {self.ort.__version__} has the providers {', '.join(providers)}, expected "
                f"{PROVIDER}; pip uninstall onnxruntime, then: pip install 'ppexport[cuda]'"
            )
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self.ort.preload_dlls()  # of the packages that the extra brings, else of the system
        if said.getvalue():
            LOG.info("libraries of CUDA: %s", said.getvalue().strip())
        super().__init__()
        self.name = f"onnxruntime-cuda {self.ort.__version__}"
        self.said = said.getvalue().strip()

    def session(self, path: Path) -> OrtCudaSession:
        """See session.Backend. Raises BackendError quoting ONNX Runtime if it refuses the graph."""
        if path.name == DECODER:
            try:
                return OrtCudaSession(self, self._loaded(path, captures=True), captures=True)
            except BackendError as err:
                plain = self._loaded(path)
                self.note(f"{path.name} runs without a CUDA graph, somewhat slower: {err}")
                return OrtCudaSession(self, plain)
        return OrtCudaSession(self, self._loaded(path))

    def _loaded(self, path: Path, captures: bool = False) -> Any:
        """An onnxruntime.InferenceSession; ``captures``: ready for CUDA graphs, or refused."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        settings = {
            "device_id": "0",
            "user_compute_stream": str(self.stream),
            "use_tf32": "0",  # float32 as it says
            "enable_cuda_graph": "1" if captures else "0",
        }
        provider = (PROVIDER, settings)
        file = utf8(path)
        try:
            session = self.ort.InferenceSession(file, options, providers=[provider, "CPUExecutionProvider"])
        except Exception as err:
            raise BackendError(
                f"ONNX Runtime {self.ort.__version__} cannot load {path.name} on CUDA: {err}"
            ) from err
        if PROVIDER not in session.get_providers():
            said = f" ({self.said})" if self.said else ""
            raise BackendError(
                f"ONNX Runtime did not take {PROVIDER} for {path.name}: its CUDA libraries do not load{said}; "
                "pip install 'ppexport[cuda]' brings them"
            )
        return session


class OrtCudaSession:
    """An onnxruntime.InferenceSession on the GPU. ``captures``: it replays runs that repeat as CUDA graphs."""

    def __init__(self, backend: OrtCuda, session: Any, captures: bool = False):
        self.backend = backend
        self.loaded = session
        self.prepared = captures  # was it loaded so?
        self.captures = captures
        self.graphs: dict[
            tuple[Any, ...], int
        ] = {}  # number of what was captured, by all addresses and shapes
        self.inputs: Sequence[str] = [value.name for value in session.get_inputs()]
        self.outputs: Sequence[str] = [value.name for value in session.get_outputs()]

    def binding(self) -> OrtCudaBinding:
        """See session.Session."""
        return OrtCudaBinding(self)

    def graph(self, bound: tuple[Any, ...]) -> int:
        """The number of the CUDA graph for a run with these addresses and shapes, NO_GRAPH where there are enough."""
        if bound not in self.graphs and len(self.graphs) >= MOST_GRAPHS:
            self.leave_graphs(f"{MOST_GRAPHS} are captured already, each for memory at other places")
            return NO_GRAPH
        return self.graphs.setdefault(bound, len(self.graphs) + 1)

    def leave_graphs(self, why: str) -> None:
        """Runs that come are neither captured nor, if they were, replayed."""
        self.captures = False
        self.backend.note(f"decode goes on without CUDA graphs, somewhat slower: {why}")


class OrtCudaBinding:
    """IO binding on device pointers; keeps the bound buffers alive."""

    def __init__(self, session: OrtCudaSession):
        self.session = session
        self.io = session.loaded.io_binding()
        self.buffers: dict[str, Buffer] = {}
        self.changed = True  # has any buffer been bound since the last run?
        self.number = NO_GRAPH

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self._keep(name, buffer)
        self.io.bind_input(name, "cuda", 0, BY_NAME[buffer.dtype].onnx, buffer.shape, buffer.pointer)

    def output(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self._keep(name, buffer)
        self.io.bind_output(name, "cuda", 0, BY_NAME[buffer.dtype].onnx, buffer.shape, buffer.pointer)

    def _keep(self, name: str, buffer: Buffer) -> None:
        self.buffers[name] = buffer
        self.changed = True

    def run(self) -> None:
        """See session.Binding. What repeats the last run is captured as a CUDA graph, and replayed from then on."""
        session = self.session
        with session.backend.lock:
            if self.changed or not session.captures:
                self.number = NO_GRAPH
            elif self.number == NO_GRAPH:
                bound = tuple((name, b.pointer, b.shape) for name, b in sorted(self.buffers.items()))
                self.number = session.graph(bound)
            self.changed = False
            try:
                self._run()
            except BackendError as err:
                if self.number == NO_GRAPH:
                    raise
                session.leave_graphs(str(err))
                self.number = NO_GRAPH
                self._run()  # writes the same entries once more

    def _run(self) -> None:
        session = self.session
        options = session.backend.ort.RunOptions()
        if session.prepared:
            options.add_run_config_entry("gpu_graph_id", str(self.number))
        try:
            session.loaded.run_with_iobinding(self.io, options)
        except Exception as err:
            raise BackendError(f"ONNX Runtime could not run the graph on CUDA: {err}") from err
