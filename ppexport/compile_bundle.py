"""Compiles the graphs of a bundle with TensorRT or TensorRT-RTX. Needs neither torch nor onnx: it runs on a Jetson."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .models import engine_record, profiles, prune_place
from .models.config import ModelConfig, Preprocessing
from .models.engine_record import Engine, EngineRecord
from .models.errors import BundleError, RequestError, SpaceError
from .models.manifest import Manifest, sha256
from .models.precision import ENGINES, Precision
from .models.profiles import Profiles
from .models.progress import Progress, silent
from .models.pruners import Pruner, pruners_of
from .models.pruners.pixelprune import PixelPrune
from .onnx_dims import set_axis
from .runtime.bundle import open_bundle
from .table import aligned
from .trt_build import Options, compile_graph, flags, prepare


def compile_bundle(
    bundle: str | Path,
    target: str,
    sizes: Profiles | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
    progress: Progress = silent,
) -> EngineRecord:
    """Compile all graphs of a bundle for ``target`` into its engines/<target>/, replacing what is there.

    Raises BackendError (the target is not installed, or refuses a graph: its words are quoted), BundleError (graphs of
    another dialect), RequestError (profiles that do not fit). On any error or interruption the bundle stays as it was.
    """
    trt, options = prepare(target, options)
    directory, manifest = open_bundle(bundle)
    dialect = check_dialect({g.dialect for g in manifest.graphs.values()}, manifest.compute, str(directory))
    check_pruners(pruners_of(manifest.prune))
    if manifest.precision.uses("int8") and manifest.precision.grouped("int8"):
        raise BundleError(
            f"{directory}: has matrices in int8 with a scale per group, expected one per output: TensorRT would write "
            "each out in 16 bits in every run; build the bundle again from the checkpoint (or in int4, in groups)"
        )
    sizes = plan_sizes(manifest.model, manifest.context, manifest.preprocessing, dialect, sizes, options)
    if manifest.compute == "bf16" and (old := [c for c in options.compute_capabilities if float(c) < 8]):
        raise RequestError(
            f"compute capability {old[0]} has no bf16; build from the checkpoint with --precision fp16"
        )
    folder = engine_record.folder(directory, target)
    try:
        folder.parent.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target}.", suffix=".partial", dir=folder.parent))
    except OSError as err:
        raise SpaceError(f"{folder}: cannot be written: {err}") from err
    begin = time.perf_counter()
    try:
        compiled = {}
        for graph, name in engine_record.compiled_graphs(manifest).items():
            int4 = all_int4(manifest.precision)
            listed = profiles.engine_profiles(sizes, manifest.model, graph, dialect, int4)
            source = directory / name
            model = source.read_bytes()
            if graph == "language" and dialect == "standard":
                model = set_axis(
                    model, "M", sizes.capacity
                )  # TensorRT wants a fixed size for caches updated in place
            given = replace(options, tf32=_may_round(manifest, graph))
            file = work / f"{graph}.engine"
            axes, seconds = compile_graph(trt, target, graph, model, source, listed, given, progress, file)
            size = file.stat().st_size
            digest = sha256(file)
            compiled[graph] = Engine(file.name, size, digest, tuple(listed), axes, round(seconds, 2))
        record = EngineRecord(
            engine_record.SCHEMA,
            target,
            trt.__name__,
            trt.__version__,
            options.compute_capabilities,
            dialect,
            manifest.compute,
            flags(options),
            sizes,
            options.workspace,
            compiled,
            engine_record.compiled_files(manifest),
            round(time.perf_counter() - begin, 2),
            _peak_memory(),
        )
        engine_record.write(record, work)
        _replace(folder, work)
        prune_place.forget(directory, target)  # measured of other engines
    except OSError as err:
        raise SpaceError(f"{folder}: cannot be written: {err}; the bundle is as it was") from err
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return record


def _may_round(manifest: Manifest, graph: str) -> bool:
    """May an engine round products of float32 values to TF32? Not where features are pruned, nor in states."""
    states = any(state.dtype == "float32" for state in manifest.model.states)
    return graph in ("prune", "vision") or (graph == "language" and not states)


def all_int4(precision: Precision) -> bool:
    """Are the matrices of the decoder stored so, those of its head, too?"""
    return precision.language == precision.head == "int4"


def told(bundle: str | Path, target: str) -> list[str]:
    """What each engine of a target takes, beside the weights that it was compiled from, a line each."""
    directory, manifest = open_bundle(bundle)
    record = engine_record.read(directory, manifest, target)
    rows = []
    for graph, name in engine_record.compiled_graphs(manifest).items():
        size = record.engines[graph].bytes
        weights = sum(manifest.files[f].bytes for f in (name, f"{name}.data") if f in manifest.files)
        rows.append(
            [f"{target} {graph}", f"{size / 1e6:.1f} MB", f"of {weights / 1e6:.1f} MB of graph and weights"]
        )
    return aligned(rows)


def check_dialect(dialects: set[str], compute: str, what: str) -> str:
    """The dialect of all graphs, if TensorRT takes it and what they calculate in; raises BundleError."""
    if len(dialects) != 1 or not dialects <= set(ENGINES):
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


def check_pruners(pruners: Iterable[Pruner]) -> None:
    """Raise RequestError for pruners that look at the image and are not compiled."""
    named = [pruner.name for pruner in pruners if pruner.after == "image"]
    if named not in ([], [PixelPrune.name]):
        raise RequestError(
            f"the bundle prunes images with {', '.join(named)}, expected {PixelPrune.name} alone or none: engines "
            "have no others; name no other pruner, or build it without a target"
        )


def plan_sizes(
    model: ModelConfig,
    context: int,
    preprocessing: Preprocessing,
    dialect: str,
    sizes: Profiles | None,
    options: Options,
) -> Profiles:
    """The given profiles, checked, or default ones. Raises RequestError."""
    if sizes is None:
        pixels = min(options.max_pixels or profiles.MAX_PIXELS[dialect], preprocessing.max_pixels)
        capacity = options.capacity or min(profiles.CAPACITY[dialect], context)
        sizes = profiles.defaults(model, context, pixels, capacity)
    if sizes.max_pixels < preprocessing.min_pixels:
        raise RequestError(
            f"max_pixels is {sizes.max_pixels}, expected at least {preprocessing.min_pixels}: the model enlarges "
            "smaller images to that"
        )
    return profiles.check(sizes, model, context)


def _replace(folder: Path, work: Path) -> None:
    """Put ``work`` in the place of ``folder``; on any error what was there is there again."""
    old = work.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        work.chmod(0o755)
        work.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
