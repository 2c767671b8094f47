"""engines/<target>/record.json of a bundle: what was compiled, by what, for what. The runtime checks it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from . import profiles
from .errors import BundleError
from .manifest import Manifest, sha256
from .precision import ENGINES
from .profiles import Profile, Profiles
from .pruners import of_family, pruners_of
from .pruners.pixelprune import prune_file
from .pruners.prunesid import INFORMATION, PruneSID
from .strict import StrictError, from_json, to_json

SCHEMA = 3
FILE = "record.json"
TARGETS = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Engine:
    """One compiled graph."""

    file: str
    bytes: int
    sha256: str
    profiles: tuple[Profile, ...]  # in the engine's order
    axes: dict[str, tuple[str, ...]]  # input -> name of each axis, "" where its size is fixed
    build_seconds: float


@dataclass(frozen=True)
class EngineRecord:
    """All engines of one target."""

    schema: int
    target: str  # one of TARGETS
    module: str  # Python module that compiled them
    version: str  # of that module; engines run on the same one only, unless a flag says otherwise
    compute_capabilities: tuple[str, ...]  # "8.9", ...; what they were compiled for
    dialect: str
    precision: str  # what the engines calculate in
    flags: tuple[str, ...]  # builder flags and compatibility levels
    profiles: Profiles
    workspace: int | None  # bytes the compiler could use, None: no limit
    engines: dict[str, Engine]  # as ``compiled_graphs`` names them
    graphs: dict[str, str]  # sha256 of each graph and weight file that was compiled
    build_seconds: float
    peak_memory: int  # bytes, of the building process


def folder(bundle: Path, target: str) -> Path:
    """Where the engines of a target lie."""
    return bundle / "engines" / target


def rebuild(bundle: Path, target: str) -> str:
    """What to do about engines that do not fit, for an error."""
    return f"run: ppexport build {bundle} --target {target}"


def compiled_graphs(manifest: Manifest) -> dict[str, str]:
    """Name of an engine -> the graph's file: what every request runs, and the bundle's pruners of features."""
    found = {graph: manifest.graphs[graph].file for graph in manifest.model.graphs}
    for pruner in of_family(pruners_of(manifest.prune), manifest.model.vision.class_token):
        if pruner.after == "vision":
            found[pruner.graph] = prune_file(pruner.graph)
        if isinstance(pruner, PruneSID):
            found[INFORMATION] = prune_file(INFORMATION)
    return found


def compiled_files(manifest: Manifest) -> dict[str, str]:
    """sha256 of the graphs and weights of a bundle, which tie engines to it."""
    return {name: record.sha256 for name, record in manifest.files.items() if ".onnx" in name}


def write(record: EngineRecord, directory: Path) -> None:
    """Write record.json."""
    (directory / FILE).write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


def read(bundle: Path, manifest: Manifest, target: str, verify: bool = False) -> EngineRecord:
    """The record of a target; raises BundleError if there is none, or it is damaged or of another bundle.

    ``verify``: also if an engine is not the one that was compiled.
    """
    path = folder(bundle, target) / FILE
    todo = rebuild(bundle, target)
    if any(graph.dialect not in ENGINES for graph in manifest.graphs.values()):
        todo = (
            f"its graphs are for ONNX Runtime only: build a bundle from the checkpoint with --target {target}"
        )
    if not path.is_file():
        raise BundleError(f"{bundle}: has no engines for {target}; {todo}")
    try:
        record = from_json(EngineRecord, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, StrictError) as err:
        raise BundleError(f"{path}: is damaged ({err}); {todo}") from err
    expected = set(compiled_graphs(manifest))
    if record.schema != SCHEMA or record.target != target or set(record.engines) != expected:
        raise BundleError(f"{path}: found schema {record.schema}, target {record.target!r}; {todo}")
    if record.graphs != compiled_files(manifest):
        raise BundleError(f"{path}: the engines were compiled from other graphs than the bundle's; {todo}")
    for graph, engine in record.engines.items():
        known = set(profiles.engine_axes(graph, manifest.model))
        axes = {axis for names in engine.axes.values() for axis in names} - {""}
        if Path(engine.file).name != engine.file or not engine.profiles or not axes <= known:
            raise BundleError(
                f"{path}: its {graph} engine has a file, axes or profiles that none has; {todo}"
            )
        if graph == "language" and len(engine.profiles) < 2:
            raise BundleError(f"{path}: its language engine has no profile of its own for decode; {todo}")
        if any(not axes <= set(profile) for profile in engine.profiles):
            raise BundleError(f"{path}: the profiles of its {graph} engine are not of its axes; {todo}")
        file = path.parent / engine.file
        size = file.stat().st_size if file.is_file() else None
        if size != engine.bytes:
            raise BundleError(f"{file}: found {size} bytes, expected {engine.bytes}; {todo}")
        if verify and sha256(file) != engine.sha256:
            raise BundleError(f"{file}: is not the engine that was compiled (its hash differs); {todo}")
    return record
