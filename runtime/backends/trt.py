"""TensorRT and TensorRT-RTX: engines run on one CUDA stream (gpu.py). Pure Python on the vendor's API."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models import engine_record
from ...models.engine_record import Engine, EngineRecord
from ...models.errors import BackendError, BundleError, RequestError
from ...models.manifest import Manifest
from ...models.profiles import fitting, outside
from ...models.version import release
from . import cuda, trt_api
from .gpu import GpuBackend
from .kernels import KernelCache
from .session import Buffer

VERSION_COMPATIBLE = "VERSION_COMPATIBLE"
ALIGNMENT = 256  # bytes, of every address that an engine reads or writes


class TrtBackend(GpuBackend):
    """The backend. Raises BackendError, BundleError if the engines cannot run here, with the command to rebuild."""

    def __init__(self, directory: Path, manifest: Manifest, target: str, verify: bool = False):
        self.record = engine_record.read(directory, manifest, target, verify)
        self.trt = trt_api.load(target)
        check_fits(self.record, self.trt, directory)
        super().__init__()
        self.name = f"{target} {self.trt.__version__}"
        self.device = target
        self.capacity = self.record.profiles.capacity
        self.max_pixels = self.record.profiles.max_pixels
        # profiles may be edited to begin higher
        self.appends = all(p["S"][0] == p["K"][0] == 1 for p in self.record.profiles.prefill)
        self.log = trt_api.logger(self.trt)
        try:
            self.runtime = self.trt.Runtime(self.log)
        except TypeError as err:  # pybind11's words for a constructor that returned nothing
            raise BackendError(f"{self.name} does not start: {trt_api.quote(self.log)}") from err
        if VERSION_COMPATIBLE in self.record.flags:  # such an engine brings code of its own
            self.runtime.engine_host_code_allowed = True
        self._directory = directory
        self._sessions: list[TrtSession] = []
        self._scratch: cuda.Block | None = None
        self._settled = True  # has every context its scratch memory?
        self._graphs = engine_record.compiled_graphs(manifest)
        rtx = hasattr(self.trt, "CudaGraphStrategy")
        self.kernels = KernelCache(engine_record.folder(directory, target)) if rtx else None

    def add(self, session: TrtSession) -> None:
        """A session whose contexts share the scratch memory of all; they get it from ``settle``."""
        self._sessions.append(session)
        self._settled = False

    def settle(self) -> None:
        """See session.Backend: the same scratch memory for all contexts, as large as any needs: they run one by one."""
        if self._settled:
            return
        size = max(s.loaded.device_memory_size_v2 for s in self._sessions)
        if self._scratch is None or self._scratch.size < size:
            self.wait()
            if self._scratch is not None:
                self._scratch.outgrown = True
                self._scratch = None
            self._scratch = self.memory.take(max(size, 1))
        for each in self._sessions:
            for context in each.all_contexts():
                self.forget_capture(context)  # it holds the address of the memory before
                context.context.set_device_memory(self._scratch.pointer, self._scratch.size)
        self._settled = True
        if self.kernels is not None:
            self.kernels.keep()

    def close(self) -> None:
        """See session.Backend."""
        try:
            if self.kernels is not None:
                self.kernels.keep()  # those, too, that were compiled for the sizes of requests
        finally:
            super().close()

    def forget_capture(self, context: Context) -> None:
        """Before anything about a context changes: TensorRT forbids to replay what was captured before."""
        if context.capture is not None:
            del self.captures[int(context.capture)]
            cuda.check(self.cuda.cudaGraphExecDestroy(context.capture))
            context.capture = None

    def session(self, path: Path) -> TrtSession:
        """The engine that was compiled from a graph; see session.Backend."""
        for graph, file in self._graphs.items():
            if file == path.name:
                return TrtSession(self, graph, self.record.engines[graph], self._directory)
        compiled = [file for graph, file in self._graphs.items() if graph not in ("vision", "language")]
        raise RequestError(
            f"{path.name} is not compiled for {self.record.target}: engines prune with {' and '.join(compiled)} only, "
            "which the bundle's own pruning names"
        )


class TrtSession:
    """A deserialized engine, with one execution context for each of its profiles."""

    def __init__(self, backend: TrtBackend, graph: str, engine: Engine, bundle: Path):
        trt = backend.trt
        self.backend = backend
        self.graph = graph
        self.engine = engine
        target = backend.record.target
        folder = engine_record.folder(bundle, target)
        with (
            (folder / engine.file).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            self.loaded = backend.runtime.deserialize_cuda_engine(data)  # makes a copy of its own
        if self.loaded is None:
            raise BackendError(
                f"{backend.name} cannot load the {graph} engine: {trt_api.quote(backend.log)}; "
                f"{engine_record.rebuild(bundle, target)}"
            )
        names = [self.loaded.get_tensor_name(i) for i in range(self.loaded.num_io_tensors)]
        modes = {name: self.loaded.get_tensor_mode(name) for name in names}
        self.inputs: Sequence[str] = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self.outputs: Sequence[str] = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        if self.loaded.num_optimization_profiles != len(engine.profiles):
            raise BackendError(
                f"{folder / engine.file}: has {self.loaded.num_optimization_profiles} profiles, its record "
                f"{len(engine.profiles)}; {engine_record.rebuild(bundle, target)}"
            )
        decodes = graph == "language"  # its last profile is for single tokens
        count = len(engine.profiles) - decodes
        self.contexts = [self._context(i) for i in range(count)]
        self.decode = self._context(count, replays=True) if decodes else None
        backend.add(self)

    def all_contexts(self) -> list[Context]:
        """Those for prompts and images, and the one for decode."""
        return [*self.contexts, *([self.decode] if self.decode else [])]

    def _context(self, profile: int, replays: bool = False) -> Context:
        """A context for one profile; ``replays``: CUDA graphs, which the runtime of RTX captures by itself."""
        backend = self.backend
        trt = self.backend.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if backend.kernels is not None:
            config = self.loaded.create_runtime_config()
            backend.kernels.attach(config)
            if replays:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_execution_context_allocation_strategy(strategy)
            made = self.loaded.create_execution_context(config)
        else:
            made = self.loaded.create_execution_context(strategy)
        if made is None or not made.set_optimization_profile_async(profile, backend.stream):
            raise BackendError(
                f"{backend.name} has no room for profile {profile} of the {self.graph} engine: "
                f"{trt_api.quote(backend.log)}; build it with smaller or fewer profiles"
            )
        backend.wait()
        return Context(made, captures=replays and backend.kernels is None)

    def binding(self) -> TrtBinding:
        """See session.Session."""
        return TrtBinding(self)


class Context:
    """An execution context and what is set in it; a run that repeats the last one is captured as a CUDA graph."""

    def __init__(self, context: Any, captures: bool):
        self.context = context
        self.captures = captures
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.capture: Any = None  # an executable CUDA graph of exactly what is bound


class TrtBinding:
    """See session.Binding. Runs are queued on the backend's stream, in order with its copies."""

    def __init__(self, session: TrtSession):
        self.session = session
        self.backend = session.backend
        self.buffers: dict[str, Buffer] = {}
        self.changed = True  # has any buffer been bound since the last run?
        self.context: Context | None = None  # of that run
        self.wanted: dict[str, tuple[int, tuple[int, ...]]] = {}  # addresses and shapes of that run
        self.copies: dict[str, Buffer] = {}  # of buffers that are not aligned

    def input(self, name: str, buffer: Buffer) -> None:
        """See session.Binding."""
        self.buffers[name] = buffer
        self.changed = True

    output = input

    def run(self) -> None:
        """See session.Binding. Raises RequestError for sizes outside every profile."""
        session = self.session
        backend = self.backend
        if self.changed or self.context is None:
            self.context = self._context()
            aligned = {name: self._aligned(name, buffer) for name, buffer in self.buffers.items()}
            self.copies = {name: b for name, b in aligned.items() if b is not self.buffers[name]}
            self.wanted = {name: (b.pointer, b.shape) for name, b in aligned.items()}
            self.changed = False
        context = self.context
        with backend.lock:
            backend.settle()
            for name, copy in self.copies.items():
                if name in session.inputs:
                    backend.copy(copy, self.buffers[name])
            if context.bound == self.wanted and context.capture is not None:
                cuda.check(backend.cuda.cudaGraphLaunch(context.capture, backend.stream))
            elif context.bound == self.wanted and context.captures:
                self._capture(context)
            else:
                self._set(context, self.wanted)
                self._enqueue(context)
            for name, copy in self.copies.items():
                if name in session.outputs:
                    backend.copy(self.buffers[name], copy)

    def _aligned(self, name: str, buffer: Buffer) -> Buffer:
        """The buffer, or memory for a copy of it where its address is not as TensorRT wants it.

        Views into a buffer with several parts can lie anywhere; with the widths of real models they do not.
        """
        if buffer.pointer % ALIGNMENT == 0:
            return buffer
        copy = self.copies.get(name)
        if copy is not None and copy.shape == buffer.shape:
            return copy
        return self.backend.empty(buffer.shape, buffer.dtype)

    def _context(self) -> Context:
        session = self.session
        engine = self.session.engine
        sizes: dict[str, int] = {}
        for name, axes in engine.axes.items():
            if name not in self.buffers:
                raise BackendError(f"the input {name} of the {session.graph} engine is not bound")
            sizes |= {axis: n for axis, n in zip(axes, self.buffers[name].shape, strict=True) if axis}
        listed = list(engine.profiles)
        if session.decode is not None and sizes["S"] == 1 and fitting(listed[-1:], sizes) == 0:
            return session.decode  # other profiles take a single token, too, but were not made for it
        found = fitting(listed[: len(session.contexts)], sizes)
        if found is None:
            raise RequestError(f"the {session.graph} engine: {outside(listed, sizes, session.graph)}")
        return session.contexts[found]

    def _set(self, context: Context, wanted: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Addresses and shapes that differ from what the context has."""
        self.backend.forget_capture(context)
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

    def _capture(self, context: Context) -> None:
        """Run as a CUDA graph, to be replayed as long as addresses and shapes stay; as it is where that cannot be."""
        backend = self.backend
        api = backend.cuda
        try:
            context.capture = self._captured(context)
        except BackendError as err:
            context.captures = False
            backend.note(f"the {self.session.graph} engine runs without a CUDA graph, somewhat slower: {err}")
            self._enqueue(context)
            return
        backend.captures[int(context.capture)] = context.capture
        cuda.check(api.cudaGraphLaunch(context.capture, backend.stream))

    def _captured(self, context: Context) -> Any:
        """An executable CUDA graph of what is bound, not run. Raises BackendError; the stream is as before then."""
        api = self.backend.cuda
        stream = self.backend.stream
        cuda.check(
            api.cudaStreamBeginCapture(stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        try:
            self._enqueue(context)
        except BackendError:
            api.cudaStreamEndCapture(stream)  # that it has failed is known
            raise
        captured = cuda.check(api.cudaStreamEndCapture(stream))
        try:
            return cuda.check(api.cudaGraphInstantiate(captured, 0))
        finally:
            cuda.check(api.cudaGraphDestroy(captured))


def check_fits(record: EngineRecord, trt: Any, directory: Path) -> None:
    """Raise BundleError unless the installed module and the GPU run these engines."""
    todo = engine_record.rebuild(directory, record.target)
    later = VERSION_COMPATIBLE in record.flags and release(trt.__version__) >= release(record.version)
    if record.version != trt.__version__ and not later:
        raise BundleError(
            f"{directory}: the engines were compiled by {record.target} {record.version}, found {trt.__version__} "
            f"here; {todo}"
        )
    here = cuda.compute_capability()
    made_for = record.compute_capabilities
    from_ampere_on = "HARDWARE_COMPATIBLE_AMPERE_PLUS" in record.flags and int(here.split(".")[0]) >= 8
    if here not in made_for and not from_ampere_on:
        raise BundleError(
            f"{directory}: the engines were compiled for compute capability {', '.join(made_for)}, found {here} here; "
            f"{todo}"
        )
