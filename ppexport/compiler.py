"""One graph -> one engine of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import profiles
from .models.errors import BackendError, RequestError
from .models.profiles import Profile
from .runtime import trt_api

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Options:
    """How to compile. Sizes are in ``Profiles``."""

    max_pixels: int = profiles.MAX_PIXELS  # default profiles only
    capacity: int | None = None  # default profiles only: tokens in the cache of a sequence
    batch: int = 1  # default profiles only
    workspace: int | None = None  # bytes of scratch memory the compiler may plan with; None: no limit
    version_compatible: bool = False  # run on later versions of TensorRT too
    hardware_compatible: bool = False  # run on other GPUs from Ampere on (tensorrt; RTX engines do so anyway)
    compute_capabilities: tuple[str, ...] = ()  # tensorrt-rtx: "8.9", ...; empty: all that it supports
    timing_cache: Path | None = None  # tensorrt: reused between builds (RTX would need a GPU for it)


def compile_graph(
    trt: Any,
    target: str,
    graph: str,
    model: bytes,
    source: Path,
    listed: Sequence[Profile],
    options: Options,
    progress: Progress,
) -> tuple[memoryview, dict[str, tuple[str, ...]], float]:
    """One serialized engine, the names of its inputs' axes and the seconds it took.

    ``model``: the graph; ``source``: its file, beside which the weights lie; ``listed``: the profiles. Raises
    BackendError quoting the compiler, RequestError for options or profiles that it cannot have, KeyboardInterrupt.
    """
    begin = time.perf_counter()
    log = trt_api.logger(trt)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model, str(source)):
        told = " | ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"{target} {trt.__version__} refuses the {graph} graph: {told[:1500]}")
    config = builder.create_builder_config()
    _configure(trt, target, config, options)
    monitor = _monitor(trt, graph, progress)
    config.progress_monitor = monitor
    axes = _axes(network)
    for profile in listed:
        config.add_optimization_profile(_profile(builder, network, axes, profile, graph))
    cache = _timing_cache(trt, target, config, options)
    blob = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if blob is None or blob.nbytes == 0:
        raise BackendError(
            f"{target} {trt.__version__} could not compile the {graph} graph: {trt_api.quote(log)}; "
            "smaller profiles or more workspace may help"
        )
    if cache is not None and options.timing_cache is not None:
        options.timing_cache.write_bytes(memoryview(cache.serialize()))
    return memoryview(blob), axes, time.perf_counter() - begin


def _axes(network: Any) -> dict[str, tuple[str, ...]]:
    """The axis names of every input of a network, "" for an axis of fixed size."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return {
        t.name: tuple(t.get_dimension_name(axis) if size < 0 else "" for axis, size in enumerate(t.shape))
        for t in tensors
    }


def _profile(builder: Any, network: Any, axes: dict[str, tuple[str, ...]], profile: Profile, graph: str) -> Any:
    """A profile for all inputs of a network, from the sizes of its named axes."""
    made = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes: list[list[int]] = [[], [], []]
        for size, name in zip(tensor.shape, axes[tensor.name], strict=True):
            if name and name not in profile:
                raise RequestError(f"the {graph} graph has the axis {name!r} ({tensor.name}), the profile does not")
            for shape, n in zip(shapes, profile[name] if name else (size,) * 3, strict=True):
                shape.append(n)
        made.set_shape(tensor.name, *shapes)
    return made


def _configure(trt: Any, target: str, config: Any, options: Options) -> None:
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.compute_capabilities:
        if target != "tensorrt-rtx":
            raise RequestError(
                "compute capabilities can be chosen for tensorrt-rtx only: tensorrt compiles for its GPU"
            )
        config.num_compute_capabilities = len(options.compute_capabilities)
        for i, name in enumerate(options.compute_capabilities):
            value = getattr(trt.ComputeCapability, "SM" + name.replace(".", ""), None)
            if value is None:
                known = [n[2:-1] + "." + n[-1] for n in dir(trt.ComputeCapability) if n[:2] == "SM"]
                raise RequestError(f"compute capability is {name!r}, expected some of: {', '.join(sorted(known))}")
            config.set_compute_capability(value, i)


def flags(options: Options) -> tuple[str, ...]:
    """The compiler's flags, by name."""
    flags = ["STRONGLY_TYPED"]
    flags += ["VERSION_COMPATIBLE"] if options.version_compatible else []
    flags += ["HARDWARE_COMPATIBLE_AMPERE_PLUS"] if options.hardware_compatible else []
    return tuple(flags)


def _timing_cache(trt: Any, target: str, config: Any, options: Options) -> Any:
    if options.timing_cache is None:
        return None
    if target != "tensorrt":
        raise RequestError("a timing cache is for tensorrt only: with it, tensorrt-rtx would need a GPU to compile")
    old = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
    cache = config.create_timing_cache(old)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, graph: str, progress: Progress) -> Any:
    """Reports the steps of the compiler's outermost phase, and the name of the one it is in.

    Ctrl-C ends the compilation at the next step.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.outermost, self.done, self.total = "", 0, 1
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost, self.done, self.total = phase_name, 0, max(1, num_steps)
            self._tell(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name == self.outermost:
                self.done = self.total
                self._tell(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                self.done = min(step + 1, self.total)
            self._tell(phase_name)
            return not self.interrupted

        def _tell(self, phase: str) -> None:
            try:
                progress(f"compile {graph}: {phase}", self.done, self.total)
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
