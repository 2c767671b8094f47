"""The parts of the tensorrt and CUDA APIs that ppexport calls, without a GPU.

An "engine" holds an ONNX graph, which ONNX Runtime executes in float32 on host memory: pointers are real addresses,
profile ranges are enforced, caches must be aliased, an address that is not set is an error, memory is counted and
copies stay inside of it, and a captured graph may not be replayed after anything about its context has changed.

A stream is behind: what is started on it happens when the host waits for it, no sooner. What was not written, what was
given back and what a run leaves in its scratch memory reads as POISON. So a read without waiting for it, or memory that
is used again too early, gives other answers than a CPU.

test_emulator.py checks that everything here exists in the real modules, so that the emulator cannot drift from them.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.machinery
import pickle
import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ppexport.runtime.backends import cuda, gpu

CAPABILITY = {"tensorrt": (8, 7), "tensorrt-rtx": (8, 9)}  # of the emulated GPU: a Jetson Orin, an RTX 4090
PIECE = 1 << 20  # bytes of an engine that are written at once
POISON = 0xFF  # a NaN in every float type
NARROW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class Cuda(types.ModuleType):
    """``cuda.bindings.runtime`` on host memory. ``allocated``: bytes per live pointer."""

    cudaStreamNonBlocking = 1

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaDeviceAttr(enum.IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    class cudaStreamCaptureMode(enum.IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__("cuda.bindings.runtime")
        self.capability = capability
        self.allocated: dict[int, ctypes.Array] = {}
        self.pinned: dict[int, ctypes.Array] = {}
        self.streams: dict[int, list | None] = {}  # what is being captured
        self.started: dict[int, list] = {}  # on each stream, not done yet
        self.graphs: dict[int, list] = {}
        self.launches, self.instantiated, self.created = 0, 0, 0
        self.limit = 8 << 30  # bytes of the device
        self.refuse_captures = ""  # at which call: "run", "end" or "instantiate"

    def _malloc(self, table: dict[int, ctypes.Array], size: int) -> tuple[int, int]:
        if table is self.allocated and size > self.limit - self._taken():
            return 2, 0
        memory = (ctypes.c_uint8 * (size + 512))()
        pointer = -(-ctypes.addressof(memory) // 512) * 512
        table[pointer] = memory
        ctypes.memset(memory, POISON, len(memory))
        return 0, pointer

    def _taken(self) -> int:
        return sum(
            len(memory) - 512 for memory in list(self.allocated.values())
        )  # other threads allocate, too

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.limit - self._taken(), self.limit

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._malloc(self.allocated, size)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:
        return self._malloc(self.pinned, size)

    def cudaFree(self, pointer: int) -> tuple[int]:
        self._catch_up()
        del self.allocated[pointer]
        return (0,)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        self._catch_up()
        del self.pinned[pointer]
        return (0,)

    def start(self, stream: int, work: Any) -> None:
        """Something that happens on a stream, after all that was started before."""
        self.started[stream].append(work)

    def _catch_up(self) -> None:
        """Both ways of giving memory back to CUDA wait for all streams."""
        for stream in list(self.started):
            self.cudaStreamSynchronize(stream)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> tuple[int]:
        assert self.streams[stream] is None, "a copy cannot be captured here"
        for pointer in (to, source):
            assert self._holds(pointer, size), "a copy outside of all allocated memory"
        self.start(stream, lambda: ctypes.memmove(to, source, size))
        return (0,)

    def _holds(self, pointer: int, size: int) -> bool:
        return any(
            start <= pointer and pointer + size <= start + len(memory) - 512
            for table in (self.allocated, self.pinned)
            for start, memory in list(table.items())
        )

    def cudaMemcpy2DAsync(
        self,
        to: int,
        pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: int,
    ) -> tuple[int]:
        assert self._holds(to, (height - 1) * pitch + width)
        assert self._holds(source, (height - 1) * source_pitch + width)

        def rows() -> None:
            for row in range(height):
                ctypes.memmove(to + row * pitch, source + row * source_pitch, width)

        self.start(stream, rows)
        return (0,)

    def cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> tuple[int]:
        assert self._holds(pointer, size)
        self.start(stream, lambda: ctypes.memset(pointer, value, size))
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        self.created += 1
        stream = 1000 + self.created
        self.streams[stream] = None
        self.started[stream] = []
        return 0, stream

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert self.streams[stream] is None, "synchronizing would break the capture"
        works = self.started[stream]
        while works:
            works.pop(0)()
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.cudaStreamSynchronize(stream)
        del self.streams[stream], self.started[stream]
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[int]:
        self.streams[stream] = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list]:
        captured, self.streams[stream] = self.streams[stream], None
        if self.refuse_captures in ("run", "end"):
            return 901, None  # cudaErrorStreamCaptureInvalidated
        return 0, captured  # type: ignore[return-value]

    def cudaGraphInstantiate(self, graph: list, flags: int) -> tuple[int, int]:
        if self.refuse_captures == "instantiate":
            return 1, 0
        self.instantiated += 1
        executable = 5000 + self.instantiated
        self.graphs[executable] = graph
        return 0, executable

    def cudaGraphDestroy(self, graph: list) -> tuple[int]:
        return (0,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        del self.graphs[executable]
        return (0,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        self.launches += 1
        for run in self.graphs[executable]:
            run(stream)
        return (0,)

    def cudaDeviceGetAttribute(self, kind: int, device: int) -> tuple[int, int]:
        return 0, self.capability[kind - self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, types.SimpleNamespace(name=b"Emulated", totalGlobalMem=self.limit)

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, 12060


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def log(self, severity: int, message: str) -> None: ...


class IProgressMonitor:
    pass


class BuilderFlag(enum.IntEnum):
    VERSION_COMPATIBLE = 1
    TF32 = 2


class HardwareCompatibilityLevel(enum.IntEnum):
    NONE = 0
    AMPERE_PLUS = 1


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class CudaGraphStrategy(enum.IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ComputeCapability(enum.IntEnum):
    NONE = 0
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM89 = 89
    SM120 = 120


class IRuntimeCache:
    """Of the emulated RTX: one line for each context that was made with it."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        lines = blob.decode("ascii", "replace").split("\n")
        if lines[0] != KERNELS or lines[-1] != "end":
            return False
        self.kernels = lines[1:-1]
        return True

    def serialize(self) -> memoryview:
        return memoryview("\n".join([KERNELS, *self.kernels, "end"]).encode())


KERNELS = "kernels of the emulated GPU"
RTX_ONLY = (CudaGraphStrategy, ComputeCapability, IRuntimeCache)


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    compiled: ClassVar[list[str]] = []  # of all processes there are

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto):
        self.name = value.name
        dims = value.type.tensor_type.shape.dim
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        self._names = [d.dim_param for d in dims]

    def get_dimension_name(self, axis: int) -> str:
        return self._names[axis]


class INetworkDefinition:
    num_inputs = 0

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.proto.graph.input[index])


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, log: ILogger):
        self.network = network

    def parse(self, model: bytes, path: str) -> bool:
        self.network.proto = onnx.load_from_string(model)  # type: ignore[attr-defined]
        self.network.path = path  # type: ignore[attr-defined]
        self.network.num_inputs = len(self.network.proto.graph.input)  # type: ignore[attr-defined]
        return True

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple] = {}

    def set_shape(self, name: str, smallest: list[int], best: list[int], largest: list[int]) -> None:
        self.shapes[name] = (smallest, best, largest)


class ITimingCache:
    def __init__(self, old: bytes):
        self.old = old

    def serialize(self) -> bytes:
        return self.old + b"timed"


class IBuilderConfig:
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    progress_monitor: Any = None
    num_compute_capabilities = 0

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> bool:
        return index < self.num_compute_capabilities

    def __init__(self) -> None:
        self.profiles: list[dict] = []

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None: ...

    def set_flag(self, flag: BuilderFlag) -> None: ...

    def clear_flag(self, flag: BuilderFlag) -> None: ...

    def create_timing_cache(self, old: bytes) -> ITimingCache:
        return ITimingCache(old)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        return cache.old.replace(b"timed", b"") == b""


class IStreamWriter:
    def write(self, data: bytes) -> int:
        raise NotImplementedError


class Builder:
    def __init__(self, log: ILogger):
        self.log = log

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network_to_stream(
        self, network: Any, config: IBuilderConfig, writer: IStreamWriter
    ) -> bool:
        whole = self.build_serialized_network(network, config)
        pieces = [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
        return all(writer.write(bytes(piece)) == len(piece) for piece in pieces)

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> memoryview:
        config.progress_monitor.phase_start("Building engine", None, 2)
        config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        onnx.external_data_helper.load_external_data_for_model(network.proto, str(Path(network.path).parent))
        return memoryview(pickle.dumps((network.proto.SerializeToString(), config.profiles)))


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: CudaGraphStrategy):
        self.engine, self.profile, self.scratch, self.strategy = engine, 0, 0, strategy
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.runs, self.changes = 0, 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return profile < len(self.engine.profiles)

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert pointer in self.engine.cuda.allocated
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.scratch, self.changes = pointer, self.changes + 1

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer % 256 == 0, f"{name} is not aligned"
        self.addresses[name], self.changes = pointer, self.changes + 1
        return name in self.engine.types

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name], self.changes = tuple(shape), self.changes + 1
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.scratch in self.engine.cuda.allocated, "no device memory for the activations"
        addresses, shapes, changes = dict(self.addresses), dict(self.shapes), self.changes
        scratch, size = self.scratch, self.engine.scratch[self.profile]

        def run(stream: int) -> bool:
            assert self.changes == changes, (
                "a graph is replayed whose context has changed since it was captured"
            )
            self.runs += 1
            self.engine.cuda.start(stream, lambda: self.engine.run(addresses, shapes))
            self.engine.cuda.start(stream, lambda: ctypes.memset(scratch, POISON, size))
            return True

        capturing = self.engine.cuda.streams[stream]
        if capturing is not None:
            if self.engine.cuda.refuse_captures == "run":
                return False
            capturing.append(run)
            return True
        return run(stream)


class ICudaEngine:
    def __init__(self, blob: bytes, cuda: Cuda):
        proto, self.profiles = pickle.loads(blob)
        self.cuda = cuda
        widened, self.types = widen(ir.from_proto(onnx.load_from_string(proto)))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            ir.to_proto(widened).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.num_io_tensors, self.num_optimization_profiles = len(self.types), len(self.profiles)
        # in place, as TensorScatter is; other states may be read while the new ones are written
        self.caches = {n for n in self.types if n.startswith(("new_key", "new_value"))}
        self.others = {n for n in self.types if n.startswith("new_")} - self.caches
        self.scratch = [(1 + i) << 20 for i in range(len(self.profiles))]  # bytes, of each profile

    @property
    def device_memory_size_v2(self) -> int:
        return max(self.scratch)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.scratch[profile]

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | IRuntimeConfig
    ) -> IExecutionContext:
        graphs = CudaGraphStrategy.DISABLED
        if isinstance(how, IRuntimeConfig):
            kernel = f"{'-'.join(self.outputs[:1])} of {len(self.inputs)} inputs"
            if kernel not in how.cache.kernels:
                how.cache.kernels.append(kernel)
                IRuntimeConfig.compiled.append(kernel)
            graphs, how = how.cuda_graph_strategy, how.strategy
        assert how == ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self, graphs)

    def run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        for name in self.types:
            if name not in addresses:
                raise AssertionError(f"the address of {name} is not set")
        for name in self.caches:
            assert addresses[name] == addresses[name.removeprefix("new_")], (
                f"{name} is not aliased with its input"
            )
        for name in self.others:
            assert addresses[name] != addresses[name.removeprefix("new_")], (
                f"{name} is written over its input"
            )
        feed = {name: read(addresses[name], shapes[name], self.types[name]) for name in self.inputs}
        for name, value in zip(self.outputs, self.session.run(self.outputs, feed), strict=True):
            write(addresses[name], value, self.types[name])


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, log: ILogger):
        self.cuda = sys.modules["cuda.bindings"].runtime

    def deserialize_cuda_engine(self, blob: bytes) -> ICudaEngine:
        return ICudaEngine(blob, self.cuda)


def widen(model: ir.Model) -> tuple[ir.Model, dict[str, ir.DataType]]:
    """The graph with every 16-bit value in float32, and the types its inputs and outputs had."""
    types = {v.name: v.dtype for v in [*model.graph.inputs, *model.graph.outputs]}
    for value in model.graph.initializers.values():
        if value.dtype in NARROW:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.inputs:
        if value.dtype in NARROW:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype in NARROW:
                value.type = ir.TensorType(ir.DataType.FLOAT)
        to = node.attributes.get("to")
        if to is not None and ir.DataType(to.as_int()) in NARROW:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        constant = node.attributes.get("value")
        if constant is not None and constant.value.dtype in NARROW:
            wide = ir.tensor(constant.value.numpy().astype(np.float32))
            node.attributes["value"] = ir.AttrTensor("value", wide)
    return model, types


def read(pointer: int, shape: tuple[int, ...], dtype: ir.DataType) -> np.ndarray:
    """The tensor at an address, 16-bit types as float32."""
    size = int(np.prod(shape) * dtype.itemsize)
    raw = np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8).copy()
    return raw.view(dtype.numpy()).reshape(shape).astype(np.float32 if dtype in NARROW else dtype.numpy())


def write(pointer: int, value: np.ndarray, dtype: ir.DataType) -> None:
    narrow = np.ascontiguousarray(value.astype(dtype.numpy()))
    ctypes.memmove(pointer, narrow.ctypes.data, narrow.nbytes)


@contextmanager
def poisoned(api: Cuda) -> Iterator[None]:
    """What a backend gives back is anybody's: memory of the host at once, of the device in the order of its stream."""
    streams: weakref.WeakKeyDictionary[cuda.Memory, int] = weakref.WeakKeyDictionary()
    begin, give_back = gpu.GpuBackend.__init__, cuda.Memory.give_back

    def begun(backend: gpu.GpuBackend) -> None:
        begin(backend)
        streams[backend.memory] = backend.stream

    def given(memory: cuda.Memory, pinned: bool, size: int, pointer: int, outgrown: bool = False) -> None:
        def poison() -> None:
            ctypes.memset(pointer, POISON, size)

        stream = streams.get(memory)
        if not pinned and stream in api.started:
            api.start(stream, poison)
        else:
            poison()
        give_back(memory, pinned, size, pointer, outgrown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.GpuBackend, "__init__", begun)
        patch.setattr(cuda.Memory, "give_back", given)
        yield


@contextmanager
def installed(target: str = "tensorrt") -> Iterator[Cuda]:
    """The emulated modules in place of ``tensorrt`` or ``tensorrt_rtx``, and of ``cuda.bindings``."""
    rtx = target == "tensorrt-rtx"
    name = "tensorrt_rtx" if rtx else "tensorrt"
    module, bindings = types.ModuleType(name), types.ModuleType("cuda.bindings")
    for key, value in globals().items():
        if isinstance(value, type) and value.__module__ == __name__ and (rtx or value not in RTX_ONLY):
            setattr(module, key, value)
    module.__version__ = "1.7.1" if rtx else "10.15.0"  # type: ignore[attr-defined]
    runtime = Cuda(CAPABILITY[target])
    bindings.runtime = runtime  # type: ignore[attr-defined]
    emulated = {name: module, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
    emulated["cuda"] = types.ModuleType("cuda")
    for key, value in emulated.items():
        value.__spec__ = importlib.machinery.ModuleSpec(key, None)
    before = {name: sys.modules.get(name) for name in emulated}
    sys.modules.update(emulated)
    try:
        with poisoned(runtime):
            yield runtime
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
