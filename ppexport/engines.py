"""Compiles the graphs of a bundle with TensorRT or TensorRT-RTX. Needs neither torch nor onnx: it runs on a Jetson."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import engines, profiles
from .models.config import ModelConfig, Preprocessing
from .models.engines import Engine, EngineRecord
from .models.errors import BackendError, BundleError, RequestError, SpaceError
from .models.manifest import BYTES, GRAPHS, sha256
from .models.profiles import Profile, Profiles
from .onnx_dims import set_axis
from .runtime import trt_api
from .runtime.bundle import open_bundle

Progress = Callable[[str, int, int], None]  # stage, done, total
DIALECTS = ("standard", "plain")


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


def compile_bundle(
    bundle: str | Path,
    target: str,
    sizes: Profiles | None = None,
    options: Options = Options(),
    progress: Progress = lambda stage, done, total: None,
) -> EngineRecord:
    """Compile all graphs of a bundle for ``target`` into its engines/<target>/, replacing what is there.

    Raises BackendError (the target is not installed, or refuses a graph: its words are quoted), BundleError (graphs of
    another dialect), RequestError (profiles that do not fit). On any error or interruption the bundle stays as it was.
    """
    trt = trt_api.load(target)
    directory, manifest = open_bundle(bundle)
    dialect = check_dialect({g.dialect for g in manifest.graphs.values()}, manifest.compute, str(directory))
    sizes = plan_sizes(manifest.model, manifest.context, manifest.preprocessing, sizes, options)
    folder = engines.folder(directory, target)
    try:
        folder.parent.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target}.", suffix=".partial", dir=folder.parent))
    except OSError as err:
        raise SpaceError(f"{folder}: cannot be written: {err}") from err
    begin = time.perf_counter()
    try:
        compiled = {}
        for graph in GRAPHS:
            listed = profiles.engine_profiles(sizes, graph, dialect)
            model = (directory / manifest.graphs[graph].file).read_bytes()
            if graph == "language" and dialect == "standard":
                model = set_axis(model, "M", sizes.capacity)  # TensorRT wants a fixed size for caches updated in place
            source = directory / manifest.graphs[graph].file
            blob, axes, seconds = _compile(trt, target, graph, model, source, listed, options, progress)
            file = work / f"{graph}.engine"
            file.write_bytes(blob)
            size, digest = file.stat().st_size, sha256(file)
            compiled[graph] = Engine(file.name, size, digest, tuple(listed), axes, round(seconds, 2))
        record = EngineRecord(
            engines.SCHEMA,
            target,
            trt.__name__,
            trt.__version__,
            options.compute_capabilities or _current(target),
            dialect,
            manifest.compute,
            _flags(options, target),
            sizes,
            options.workspace,
            compiled,
            engines.compiled_files(manifest),
            round(time.perf_counter() - begin, 2),
            _peak_memory(),
        )
        engines.write(record, work)
        _replace(folder, work)
    except OSError as err:
        raise SpaceError(f"{folder}: cannot be written: {err}; the bundle is as it was") from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return record


def check_dialect(dialects: set[str], compute: str, what: str) -> str:
    """The dialect of all graphs, if TensorRT takes it and what they calculate in; raises BundleError."""
    if len(dialects) != 1 or not dialects <= set(DIALECTS):
        raise BundleError(
            f"{what}: found graphs of dialect {', '.join(sorted(dialects))}, expected standard (TensorRT 10.15 or "
            "later, TensorRT-RTX) or plain (TensorRT 10.3 or later); build from the checkpoint with --dialect standard "
            "or plain"
        )
    if compute == "fp32":
        raise BundleError(
            f"{what}: found graphs that calculate in fp32, expected bf16 or fp16 for TensorRT (it has no attention in "
            "float32); build from the checkpoint with --precision bf16 or fp16"
        )
    return next(iter(dialects))


def plan_sizes(
    model: ModelConfig, context: int, preprocessing: Preprocessing, sizes: Profiles | None, options: Options
) -> Profiles:
    """The given profiles, checked, or default ones. Raises RequestError."""
    if sizes is None:
        pixels = min(options.max_pixels, preprocessing.max_pixels)
        sizes = profiles.defaults(model, context, pixels, options.capacity, options.batch)
    return profiles.check(sizes, model, context)


def memory(model: ModelConfig, compute: str, weights: int, sizes: Profiles) -> dict[str, int]:
    """What running the engines will take on the device, in bytes, by what it is for; activations come on top."""
    c, width = model.text, BYTES[compute]
    kept = max(profile["K"][2] for profile in sizes.prefill)
    pixels = max(profile["H"][2] * profile["W"][2] for profile in sizes.prune)
    return {
        "weights": weights,
        "caches": 2 * c.layers * sizes.batch * sizes.capacity * c.kv_heads * c.head_dim * width,
        "image": 3 * pixels,
        "features": (1 + len(model.vision.deepstack)) * kept * c.width * width,
        "logits": 4 * sizes.batch * c.vocab,
    }


def _compile(
    trt: Any,
    target: str,
    graph: str,
    model: bytes,
    source: Path,
    listed: Sequence[Profile],
    options: Options,
    progress: Progress,
) -> tuple[memoryview, dict[str, tuple[str, ...]], float]:
    """One serialized engine, the names of its inputs' axes and the seconds it took."""
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


def _flags(options: Options, target: str) -> tuple[str, ...]:
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


def _current(target: str) -> tuple[str, ...]:
    """Compute capabilities of engines for which none was chosen."""
    if target == "tensorrt-rtx":
        return ("all",)
    from .runtime import cuda

    return (cuda.compute_capability(),)


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


def _replace(folder: Path, work: Path) -> None:
    """Put ``work`` in the place of ``folder``."""
    old = work.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    work.chmod(0o755)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
