"""Which backend runs a vision tower sooner on this machine: measured once, kept in the user's cache directory.

The file is ``ppexport/vision-<digest>.json`` there (XDG_CACHE_HOME, else ~/.cache); the digest stands for the tower's
files, the CPU, the threads and the releases of the packages, so that another of any of these is measured anew. Removing
it does no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.dtype import BY_PRECISION
from ..models.errors import BackendError
from ..models.families import FAMILIES
from ..models.files import write_whole
from ..models.manifest import Manifest
from ..models.strict import from_json, to_json
from ..models.version import __version__, installed
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
NAMES = {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino")


@dataclass(frozen=True)
class Measured:
    """How long one image took."""

    schema: int
    cpu: str
    milliseconds: dict[str, float]  # place ("cpu" is ONNX Runtime's, "openvino") -> of the fastest run
    refused: str  # why OpenVINO does not run this tower; "" where it does

    @property
    def faster(self) -> str:
        """The place to take: OpenVINO has to gain 5 %."""
        took = self.milliseconds
        return "openvino" if not self.refused and took["openvino"] < GAIN * took["cpu"] else "cpu"

    @property
    def figures(self) -> str:
        """In words; of a tower that OpenVINO refused, of the one place."""
        return ", ".join(f"{NAMES[place]} {took:.3g} ms" for place, took in self.milliseconds.items())


def measured(
    manifest: Manifest, cpu: Callable[[], Stage], openvino: Callable[[], Stage], threads: int
) -> Measured:
    """What is known of a tower on this machine, measured now where nothing is.

    ``cpu`` and ``openvino`` make the two ways to run it. Raises BackendError where the first one fails, or where
    OpenVINO itself is broken; a tower that OpenVINO refuses is remembered.
    """
    path = _file(manifest, threads)
    found = _read(path)
    if found is not None:
        return found
    ways = {"cpu": cpu(), "openvino": openvino()}
    LOG.info("measuring where the vision tower runs sooner; this is done once for a bundle and a machine")
    took = {"cpu": _milliseconds(manifest, ways["cpu"])}
    refused = ""
    try:
        took["openvino"] = _milliseconds(manifest, ways["openvino"])
    except BackendError as err:
        refused = str(err)
    other = _read(path)  # of another process, meanwhile: all shall choose the same
    if other is not None:
        return other
    found = Measured(SCHEMA, processor.name(), took, refused)
    _keep(path, found)
    return found


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    of = [
        manifest.hashes("vision"),
        [processor.name(), processor.features(), cores, threads, repr(manifest.preprocessing)],
        [__version__, *(installed(package) for package in PACKAGES)],
    ]
    return directory / f"vision-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]}.json"


def _read(path: Path | None) -> Measured | None:
    """What was measured; None where nothing was, or the file is damaged."""
    if path is None:
        return None
    try:
        found = from_json(Measured, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, OverflowError, RecursionError):
        return None
    expected = {"cpu"} if found.refused else {"cpu", "openvino"}
    whole = found.schema == SCHEMA and set(found.milliseconds) == expected
    return found if whole and all(0 < took < 1e9 for took in found.milliseconds.values()) else None


def _keep(path: Path | None, measured: Measured) -> None:
    text = json.dumps(to_json(measured), indent=1) + "\n"
    try:
        if path is None:
            raise OSError("this user has no home")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as err:
        LOG.info(
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
