"""TensorRT and TensorRT-RTX: engines run on one CUDA stream, on memory that is kept between requests.

Pure Python on the vendor's API and cuda-python. Nothing here waits for the GPU but ``download`` and ``wait``. One lock
guards the stream and the execution contexts, so several threads may share a pipeline; their requests take turns.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models import engines
from ..models.engines import Engine, EngineRecord
from ..models.errors import BackendError, BundleError, RequestError
from ..models.manifest import Manifest
from ..models.profiles import fitting, outside
from . import cuda, trt_api
from .session import Buffer

NUMPY = {"uint8": np.uint8, "int32": np.int32, "float16": np.float16, "float32": np.float32}


class TrtBackend:
    """The backend. Raises BackendError, BundleError if the engines cannot run here, with the command to rebuild."""

    cache_step = 128  # the used part of a cache by position grows in such steps, so that shapes seldom change

    def __init__(self, directory: Path, manifest: Manifest, target: str):
        self.record = engines.read(directory, manifest, target)
        self.trt, self.cuda = trt_api.load(target), cuda.api()
        check_fits(self.record, self.trt, directory)
        self.name = f"{target} {self.trt.__version__}"
        self.capacity: int | None = self.record.profiles.capacity
        self.max_pixels: int | None = self.record.profiles.max_pixels
        self.lock = threading.RLock()
        self.memory = cuda.Memory(self.cuda)
        self.stream = int(cuda.check(self.cuda.cudaStreamCreateWithFlags(self.cuda.cudaStreamNonBlocking)))
        self.log = trt_api.logger(self.trt)
        self.runtime = self.trt.Runtime(self.log)
        self._folder = engines.folder(directory, target)
        self._in_flight: list[cuda.Block] = []  # pinned memory that copies still read

    def session(self, path: Path) -> TrtSession:
        """The engine that was compiled from a graph; see session.Backend."""
        return TrtSession(self, path.stem, self.record.engines[path.stem], self._folder)

    def zeros(self, shape: Sequence[int], dtype: str) -> Buffer:
        """See session.Backend."""
        buffer = self._new(shape, dtype)
        with self.lock:
            cuda.check(self.cuda.cudaMemsetAsync(buffer.pointer, 0, buffer.nbytes, self.stream))
        return buffer

    def upload(self, array: np.ndarray) -> Buffer:
        """See session.Backend."""
        array = np.ascontiguousarray(array)
        buffer = self._new(array.shape, array.dtype.name)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See session.Backend; one copy to pinned memory, one from there, in the background."""
        array = np.ascontiguousarray(array)
        staging = self.memory.take(array.nbytes, pinned=True)
        ctypes.memmove(staging.pointer, array.ctypes.data, array.nbytes)
        with self.lock:
            self._copy(buffer.pointer, staging.pointer, array.nbytes, "HostToDevice")
            self._in_flight.append(staging)

    def download(self, buffer: Buffer) -> np.ndarray:
        """See session.Backend; bfloat16 becomes float32."""
        staging = self.memory.take(buffer.nbytes, pinned=True)
        with self.lock:
            self._copy(staging.pointer, buffer.pointer, buffer.nbytes, "DeviceToHost")
            self.wait()
        raw = np.frombuffer((ctypes.c_uint8 * buffer.nbytes).from_address(staging.pointer), np.uint8)
        if buffer.dtype == "bfloat16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(buffer.shape)
        return raw.view(NUMPY[buffer.dtype]).reshape(buffer.shape).copy()

    def copy_into(self, target: Buffer, at: int, source: Buffer) -> None:
        """See session.Backend; on the device."""
        rows, width = source.shape[1], source.nbytes // source.shape[0]
        row = width // rows
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        pitch = target.shape[1] * row
        with self.lock:
            cuda.check(
                self.cuda.cudaMemcpy2DAsync(
                    target.pointer + at * row, pitch, source.pointer, width, width, source.shape[0], kind, self.stream
                )
            )
            self._in_flight.append(source.owner)

    def wait(self) -> None:
        """See session.Backend."""
        with self.lock:
            cuda.check(self.cuda.cudaStreamSynchronize(self.stream))
            self._in_flight.clear()

    def close(self) -> None:
        """Give the memory and the stream back; the backend cannot be used afterwards."""
        self.wait()
        self.memory.close()
        cuda.check(self.cuda.cudaStreamDestroy(self.stream))

    def _new(self, shape: Sequence[int], dtype: str) -> Buffer:
        empty = Buffer(0, tuple(shape), dtype, None)
        block = self.memory.take(empty.nbytes)
        return Buffer(block.pointer, empty.shape, dtype, block)

    def _copy(self, to: int, source: int, nbytes: int, kind: str) -> None:
        value = getattr(self.cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        cuda.check(self.cuda.cudaMemcpyAsync(to, source, nbytes, value, self.stream))


class TrtSession:
    """A deserialized engine, with one execution context for each of its profiles."""

    def __init__(self, backend: TrtBackend, graph: str, engine: Engine, folder: Path):
        trt, self.backend, self.graph, self.engine = backend.trt, backend, graph, engine
        self.loaded = backend.runtime.deserialize_cuda_engine((folder / engine.file).read_bytes())
        if self.loaded is None:
            raise BackendError(
                f"{backend.name} cannot load the {graph} engine: {trt_api.quote(backend.log)}; {_rebuild(folder)}"
            )
        names = [self.loaded.get_tensor_name(i) for i in range(self.loaded.num_io_tensors)]
        modes = {name: self.loaded.get_tensor_mode(name) for name in names}
        self.inputs: Sequence[str] = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self.outputs: Sequence[str] = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        self.contexts = [self._context(i) for i in range(len(engine.profiles))]

    def _context(self, profile: int) -> Context:
        """A context for one profile; on RTX the runtime captures CUDA graphs by itself."""
        backend, trt = self.backend, self.backend.trt
        if hasattr(trt, "CudaGraphStrategy"):
            config = self.loaded.create_runtime_config()
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            made = self.loaded.create_execution_context(config)
        else:
            made = self.loaded.create_execution_context()
        if made is None or not made.set_optimization_profile_async(profile, backend.stream):
            raise BackendError(
                f"{backend.name} has no room for profile {profile} of the {self.graph} engine: "
                f"{trt_api.quote(backend.log)}; build it with smaller or fewer profiles"
            )
        backend.wait()
        return Context(made, captures=not hasattr(trt, "CudaGraphStrategy"))

    def binding(self) -> TrtBinding:
        """See session.Session."""
        return TrtBinding(self)


class Context:
    """An execution context and what is set in it; a run that repeats the last one is captured as a CUDA graph."""

    def __init__(self, context: Any, captures: bool):
        self.context, self.captures = context, captures
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.graph: tuple[dict[str, tuple[int, tuple[int, ...]]], Any] | None = None


class TrtBinding:
    """See session.Binding. Runs are queued on the backend's stream, in order with its copies."""

    def __init__(self, session: TrtSession):
        self.session, self.backend = session, session.backend
        self.buffers: dict[str, Buffer] = {}

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self.buffers[name] = buffer

    output = input

    def run(self) -> None:
        """See session.Binding. Raises RequestError for sizes outside every profile."""
        session, backend = self.session, self.backend
        wanted = {name: (b.pointer, b.shape) for name, b in self.buffers.items()}
        context = session.contexts[self._profile()]
        with backend.lock:
            if context.graph is not None and context.graph[0] == wanted:
                cuda.check(backend.cuda.cudaGraphLaunch(context.graph[1], backend.stream))
                return
            repeats = context.bound == wanted
            self._set(context, wanted)
            if repeats and context.captures and self._decodes():
                self._capture(context, wanted)
            else:
                self._enqueue(context)

    def _decodes(self) -> bool:
        return self.session.graph == "language" and self.buffers["input_ids"].shape[1] == 1

    def _profile(self) -> int:
        engine, sizes = self.session.engine, {}
        for name, axes in engine.axes.items():
            if name not in self.buffers:
                raise BackendError(f"the input {name} of the {self.session.graph} engine is not bound")
            sizes |= {axis: n for axis, n in zip(axes, self.buffers[name].shape, strict=True) if axis}
        found = fitting(list(engine.profiles), sizes)
        if found is None:
            raise RequestError(f"the {self.session.graph} engine: {outside(list(engine.profiles), sizes)}")
        return found

    def _set(self, context: Context, wanted: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Addresses and shapes that differ from what the context has."""
        for name, (pointer, shape) in wanted.items():
            if context.bound.get(name) == (pointer, shape):
                continue
            ok = context.context.set_tensor_address(name, pointer)
            if ok and name in self.session.inputs:
                ok = context.context.set_input_shape(name, shape)
            if not ok:
                context.bound.pop(name, None)
                raise BackendError(
                    f"{self.backend.name} does not take {name} {list(shape)} for the {self.session.graph} engine: "
                    f"{trt_api.quote(self.backend.log)}"
                )
            context.bound[name] = (pointer, shape)

    def _enqueue(self, context: Context) -> None:
        if not context.context.execute_async_v3(self.backend.stream):
            raise BackendError(
                f"{self.backend.name} could not run the {self.session.graph} engine: {trt_api.quote(self.backend.log)}"
            )

    def _capture(self, context: Context, wanted: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Run as a CUDA graph, to be replayed as long as addresses and shapes stay."""
        api, stream = self.backend.cuda, self.backend.stream
        if context.graph is not None:
            cuda.check(api.cudaGraphExecDestroy(context.graph[1]))
            context.graph = None
        cuda.check(api.cudaStreamBeginCapture(stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        try:
            self._enqueue(context)
        finally:
            captured = cuda.check(api.cudaStreamEndCapture(stream))
        executable = cuda.check(api.cudaGraphInstantiate(captured, 0))
        cuda.check(api.cudaGraphDestroy(captured))
        context.graph = (wanted, executable)
        cuda.check(api.cudaGraphLaunch(executable, stream))


def check_fits(record: EngineRecord, trt: Any, directory: Path) -> None:
    """Raise BundleError unless the installed module and the GPU run these engines."""
    rebuild = f"run: ppexport build {directory} --target {record.target}"
    if record.version != trt.__version__ and "VERSION_COMPATIBLE" not in record.flags:
        raise BundleError(
            f"{directory}: the engines were compiled by {record.target} {record.version}, found {trt.__version__} "
            f"here; {rebuild}"
        )
    here, made_for = cuda.compute_capability(), record.compute_capabilities
    from_ampere_on = "HARDWARE_COMPATIBLE_AMPERE_PLUS" in record.flags and int(here.split(".")[0]) >= 8
    if here not in made_for and "all" not in made_for and not from_ampere_on:
        raise BundleError(
            f"{directory}: the engines were compiled for compute capability {', '.join(made_for)}, found {here} here; "
            f"{rebuild}"
        )


def _rebuild(folder: Path) -> str:
    return f"run: ppexport build {folder.parent.parent} --target {folder.name}"
