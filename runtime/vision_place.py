"""Which backend runs a vision tower sooner on this machine: measured once, kept in the user's cache directory.

The file is ``ppexport/vision-<digest>.json`` there (XDG_CACHE_HOME, else ~/.cache); the digest stands for the tower's
files, the CPU, the threads and the releases of the packages, so that another of any of these is measured anew. Removing
it does no harm.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.dtype import BY_PRECISION
from ..models.families import FAMILIES
from ..models.files import write_whole
from ..models.manifest import Manifest
from ..models.strict import StrictError, from_json, to_json
from ..models.version import __version__
from .backends import processor
from .backends.stages import Stage
from .image import cut, frames_of
from .vision import Vision

LOG = logging.getLogger(__name__)
SCHEMA = 1
SIDE = 384  # pixels of the image that is looked at, where a family does not resize it
RUNS = 3  # at most, after one that is not counted
ENOUGH = 1500  # milliseconds, after which no other run begins
GAIN = 0.95  # share of the first one's time that another has to stay under to be taken
PACKAGES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Measured:
    """How long one image took."""

    schema: int
    cpu: str
    milliseconds: dict[str, float]  # Backend.name -> of the fastest run


def fastest(manifest: Manifest, stages: Sequence[Stage], threads: int) -> tuple[Stage, Measured]:
    """Of several ways to run the tower, the fastest; the first one unless another gains 5 %."""
    path = _file(manifest, threads)
    names = [stage.backend.name for stage in stages]
    found = _read(path)
    if found is None or set(found.milliseconds) != set(names):
        found = Measured(
            SCHEMA,
            processor.name(),
            {stage.backend.name: _milliseconds(manifest, stage) for stage in stages},
        )
        LOG.debug("the vision tower was measured: %s", found.milliseconds)
        _keep(path, found)
    took = [found.milliseconds[name] for name in names]
    best = int(np.argmin(took))
    return stages[best if took[best] < GAIN * took[0] else 0], found


def known(manifest: Manifest, threads: int = 0) -> Measured | None:
    """What was measured of a bundle's tower on this machine; None where nothing was."""
    return _read(_file(manifest, threads))


def cache_directory() -> Path | None:
    """Where programs keep what they can make again; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "ppexport"
    try:
        return Path.home() / ".cache" / "ppexport"
    except RuntimeError:
        return None


def _file(manifest: Manifest, threads: int) -> Path | None:
    directory = cache_directory()
    if directory is None:
        return None
    graph = manifest.graphs["vision"]
    files = [graph.file, f"{graph.file}.data", *graph.also.values()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    of = [
        [manifest.files[name].sha256 for name in files],
        [processor.name(), processor.said("flags"), cores, threads],
        [__version__, *(_release(package) for package in PACKAGES)],
    ]
    return directory / f"vision-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]}.json"


def _release(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: Path | None) -> Measured | None:
    """What was measured; None where nothing was, or the file is damaged."""
    try:
        text = path.read_text(encoding="utf-8") if path is not None else ""
    except OSError:
        return None
    try:
        found = from_json(Measured, json.loads(text))
    except (ValueError, RecursionError, StrictError):
        return None
    whole = found.schema == SCHEMA and all(0 < took < 1e9 for took in found.milliseconds.values())
    return found if whole else None


def _keep(path: Path | None, measured: Measured) -> None:
    text = json.dumps(to_json(measured), indent=1) + "\n"
    try:
        if path is None:
            raise OSError("this user has no home")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as err:
        LOG.debug(
            "what was measured of the vision tower cannot be kept, and is measured again next time: %s", err
        )


def _milliseconds(manifest: Manifest, stage: Stage) -> float:
    """The fastest of some runs over every token of one view of an image."""
    model = manifest.model
    family = FAMILIES[manifest.family]
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    frames, shown = frames_of(noise, lambda h, w: family.views(model, manifest.preprocessing, h, w))
    view = shown.views[0]
    backend = stage.backend
    pixels = backend.upload(cut(frames, view))
    keep = np.arange(view.total, dtype=np.int32)
    others = {name: backend.upload(x) for name, x in family.tower_inputs(model, view, keep).items()}
    vision = Vision(backend, stage.graph, model, BY_PRECISION[manifest.compute].name)

    def run() -> float:
        begin = time.perf_counter()
        vision.encode(pixels, backend.upload(keep), others)
        return (time.perf_counter() - begin) * 1e3

    run()  # kernels and packed weights are made then
    took = [run()]
    while len(took) < RUNS and sum(took) < ENOUGH:
        took.append(run())
    return round(min(took), 3)
