"""One graph -> one engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from .models.errors import BackendError, RequestError, SpaceError
from .models.files import write_whole
from .models.profiles import Profile
from .models.progress import Progress
from .runtime.backends import cuda, trt_api


@dataclass(frozen=True)
class Options:
    """How to compile. Sizes are in ``Profiles``."""

    max_pixels: int | None = None  # default profiles only; None: profiles.MAX_PIXELS of the dialect
    capacity: int | None = (
        None  # default profiles only: tokens in the cache of a sequence; None: profiles.CAPACITY
    )
    workspace: int | None = None  # bytes of scratch memory the compiler may plan with; None: no limit
    version_compatible: bool = False  # tensorrt: run on later versions of TensorRT too
    hardware_compatible: bool = False  # tensorrt: run on other GPUs from Ampere on
    compute_capabilities: tuple[
        str, ...
    ] = ()  # tensorrt-rtx: "8.9", ...; empty: all that it knows from 8.0 on
    timing_cache: Path | None = None  # tensorrt: reused between builds (RTX would need a GPU for it)
    tf32: bool = True  # may products of float32 values be rounded to TF32?


def prepare(target: str, options: Options) -> tuple[ModuleType, Options]:
    """The module of a target and the options in their final form, before any work is done.

    Raises BackendError (not installed, no GPU where one is needed), RequestError (options that the target cannot have).
    """
    trt = trt_api.load(target)
    rtx = target == "tensorrt-rtx"
    for name, given in (("version", options.version_compatible), ("hardware", options.hardware_compatible)):
        if given and rtx:
            raise RequestError(
                f"{name}-compatible engines are for tensorrt only: an engine of tensorrt-rtx belongs to its release, "
                "and to the GPUs that it was compiled for (--compute-capability)"
            )
    if options.timing_cache is not None:
        if rtx:
            raise RequestError(
                "a timing cache is for tensorrt only: with it, tensorrt-rtx would need a GPU to compile"
            )
        if options.timing_cache.is_dir() or not options.timing_cache.absolute().parent.is_dir():
            raise RequestError(
                f"{options.timing_cache}: expected a file in an existing directory as timing cache"
            )
    if not rtx:
        if options.compute_capabilities:
            raise RequestError(
                "compute capabilities are for tensorrt-rtx only: tensorrt compiles for the GPU at hand"
            )
        try:
            here = cuda.compute_capability()
        except BackendError as err:
            raise BackendError(
                f"tensorrt compiles on the GPU that it compiles for, found none: {err}"
            ) from err
        return trt, replace(options, compute_capabilities=(here,))
    known = {f"{name[2:-1]}.{name[-1]}": name for name in vars(trt.ComputeCapability) if name[:2] == "SM"}
    chosen = options.compute_capabilities or tuple(sorted((c for c in known if float(c) >= 8), key=float))
    for capability in chosen:
        if capability not in known:
            raise RequestError(
                f"compute capability is {capability!r}, expected some of: {', '.join(sorted(known))}"
            )
    return trt, replace(options, compute_capabilities=tuple(dict.fromkeys(chosen)))


def compile_graph(
    trt: Any,
    target: str,
    graph: str,
    model: bytes,
    source: Path,
    listed: Sequence[Profile],
    options: Options,
    progress: Progress,
    file: Path,
    kernels: list[str] | None = None,
) -> tuple[dict[str, tuple[str, ...]], float]:
    """Write one engine to ``file``; returns the names of its inputs' axes and the seconds it took.

    ``model``: the graph; ``source``: its file, beside which the weights lie; ``listed``: the profiles; ``options`` as
    ``prepare`` gave them; ``kernels`` gets "kind name" of every kernel, in their order.

    Raises BackendError quoting the compiler, RequestError for profiles that do not fit the graph, OSError for the file,
    and whatever ``progress`` raised, KeyboardInterrupt for one.
    """
    begin = time.perf_counter()
    log = trt_api.logger(trt, kernels)
    try:
        builder = trt.Builder(log)
    except TypeError as err:  # pybind11's words for a constructor that returned nothing
        raise BackendError(f"{target} {trt.__version__} does not start: {trt_api.quote(log)}") from err
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model, str(source)):
        told = " | ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"{target} {trt.__version__} refuses the {graph} graph: {told[:1500]}")
    config = builder.create_builder_config()
    _configure(trt, target, config, options)
    if kernels is not None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    monitor = _monitor(trt, graph, progress)
    config.progress_monitor = monitor
    axes = _axes(network)
    for profile in listed:
        config.add_optimization_profile(_profile(builder, network, axes, profile, graph))
    cache = _timing_cache(config, options)
    try:
        written = _write_engine(trt, builder, network, config, file)
    except OSError:
        raise
    except Exception as err:  # an interruption inside of the monitor's own lines
        raise monitor.raised or err from err
    if monitor.raised is not None:
        raise monitor.raised
    if not written:
        told = trt_api.quote(log)
        hint = (
            "; smaller profiles or more --workspace may help"
            if re.search("memory|workspace", told, re.I)
            else ""
        )
        raise BackendError(f"{target} {trt.__version__} could not compile the {graph} graph: {told}{hint}")
    if cache is not None and options.timing_cache is not None:
        _keep_timings(cache, options.timing_cache)
    return axes, time.perf_counter() - begin


def _write_engine(trt: Any, builder: Any, network: Any, config: Any, file: Path) -> int:
    """Build into a file, in pieces where this TensorRT can do that, so that no second copy is in memory.

    Returns the number of bytes, 0 where the compiler failed. Raises OSError.
    """
    with file.open("wb") as out:
        if not hasattr(builder, "build_serialized_network_to_stream"):  # from 10.12 on
            blob = builder.build_serialized_network(network, config)
            return 0 if blob is None else out.write(memoryview(blob))
        writer = _writer(trt, out)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.raised is not None:
            raise writer.raised
        return out.tell() if built else 0


def _writer(trt: Any, out: IO[bytes]) -> Any:
    """Takes an engine in pieces. What is raised while it writes is kept in ``raised``: TensorRT cannot pass it on."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.raised: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return out.write(data)
            except OSError as err:
                self.raised = err
                return 0

    return Writer()


def _axes(network: Any) -> dict[str, tuple[str, ...]]:
    """The axis names of every input of a network, "" for an axis of fixed size."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return {
        t.name: tuple(t.get_dimension_name(axis) if size < 0 else "" for axis, size in enumerate(t.shape))
        for t in tensors
    }


def _profile(
    builder: Any, network: Any, axes: dict[str, tuple[str, ...]], profile: Profile, graph: str
) -> Any:
    """A profile for all inputs of a network, from the sizes of its named axes."""
    made = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes: list[list[int]] = [[], [], []]
        for size, name in zip(tensor.shape, axes[tensor.name], strict=True):
            if name and name not in profile:
                raise RequestError(
                    f"the {graph} graph has the axis {name!r} ({tensor.name}), the profile does not"
                )
            for shape, n in zip(shapes, profile[name] if name else (size,) * 3, strict=True):
                shape.append(n)
        made.set_shape(tensor.name, *shapes)
    return made


def _configure(trt: Any, target: str, config: Any, options: Options) -> None:
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if target == "tensorrt-rtx":
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, name in enumerate(options.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + name.replace(".", "")), i)


def flags(options: Options) -> tuple[str, ...]:
    """The compiler's flags, by name."""
    flags = ["STRONGLY_TYPED"]
    flags += ["VERSION_COMPATIBLE"] if options.version_compatible else []
    flags += ["HARDWARE_COMPATIBLE_AMPERE_PLUS"] if options.hardware_compatible else []
    return tuple(flags)


def _timing_cache(config: Any, options: Options) -> Any:
    """What was measured in earlier builds. Raises RequestError for a file of another TensorRT, GPU or kind."""
    path = options.timing_cache
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise RequestError(
            f"{path}: is no timing cache of this TensorRT on this GPU; name another file, or remove it"
        )
    return cache


def _keep_timings(cache: Any, path: Path) -> None:
    try:
        write_whole(path, lambda partial: partial.write_bytes(memoryview(cache.serialize())))
    except OSError as err:
        raise SpaceError(f"{path}: the timing cache cannot be written: {err}") from err


def _monitor(trt: Any, graph: str, progress: Progress) -> Any:  # noqa: C901 (a class that needs the module)
    """Reports the steps of the compiler's outermost phase, and the name of the one it is in.

    What is raised here, by ``progress`` or by Ctrl-C, is kept in ``raised`` and ends the compilation at its next step:
    the compiler could not pass it on.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.outermost = ""
            self.done = 0
            self.total = 1
            self.raised: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                if parent_phase is None:
                    self.outermost = phase_name
                    self.done = 0
                    self.total = max(1, num_steps)
                self._tell(phase_name)
            except BaseException as err:
                self.raised = self.raised or err

        def phase_finish(self, phase_name: str) -> None:
            try:
                if phase_name == self.outermost:
                    self.done = self.total
                    self._tell(phase_name)
            except BaseException as err:
                self.raised = self.raised or err

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name == self.outermost:
                    self.done = min(step + 1, self.total)
                self._tell(phase_name)
            except BaseException as err:
                self.raised = self.raised or err
            return self.raised is None

        def _tell(self, phase: str) -> None:
            if self.raised is None:
                progress(f"compile {graph}: {phase}", self.done, self.total)

    return Monitor()
