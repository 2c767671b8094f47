"""Compiles the graphs of a bundle with TensorRT or TensorRT-RTX. Needs neither torch nor onnx: it runs on a Jetson."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from .compiler import Options, Progress, compile_graph, flags
from .models import engines, profiles
from .models.config import ModelConfig, Preprocessing
from .models.engines import Engine, EngineRecord
from .models.errors import BundleError, SpaceError
from .models.manifest import BYTES, GRAPHS, sha256
from .models.profiles import Profiles
from .onnx_dims import set_axis
from .runtime import trt_api
from .runtime.bundle import open_bundle

DIALECTS = ("standard", "plain")


def compile_bundle(
    bundle: str | Path,
    target: str,
    sizes: Profiles | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
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
            blob, axes, seconds = compile_graph(trt, target, graph, model, source, listed, options, progress)
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
            flags(options),
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


def _current(target: str) -> tuple[str, ...]:
    """Compute capabilities of engines for which none was chosen."""
    if target == "tensorrt-rtx":
        return ("all",)
    from .runtime import cuda

    return (cuda.compute_capability(),)


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
