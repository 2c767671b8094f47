"""Where a bundle runs: backends for a device, stage by stage, and how "auto" chooses them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ...models.devices import ON_HOST, places_of
from ...models.engine_record import TARGETS, folder
from ...models.errors import BackendError, BundleError, PpexportError
from ...models.manifest import Manifest
from ...models.version import installed, release
from ..vision_place import measured
from .openvino import CACHE, INSTALL, OpenVino, has_openvino
from .ort import FIRST_WITH_DELTA_RULE, OrtCpu, import_onnxruntime
from .processor import saturates
from .session import Backend
from .stages import Stage, Stages


def open_stages(
    device: str, directory: Path, manifest: Manifest, threads: int, verify: bool = False
) -> Stages:
    """What runs the stages of a bundle on a device. ``verify``: check hashes of engines, and compile for OpenVINO anew.

    "auto" takes TensorRT-RTX or TensorRT where the bundle has engines that run here, CUDA for graphs that are made for
    it, else the CPU; there the tower runs on OpenVINO where that is installed and was measured to be faster.
    "vision=openvino,language=cpu" says it stage by stage. Raises BackendError, BundleError.
    """
    places = places_of(device)
    if "vision=" in device and not manifest.model.sees:
        raise BackendError(
            f"device is {device!r}, expected none for the vision stage: a {manifest.family} model takes text only"
        )
    if all(ON_HOST.fullmatch(place) for place in places.values()):
        return _on_host(directory, manifest, threads, places, verify)
    if device != "auto":
        backend = _on_gpu(device, directory, manifest, verify)
        return _all_on(backend, directory, manifest, f"{backend.name}, as asked for")
    problems = []
    own = [target for target in reversed(TARGETS) if folder(directory, target).is_dir()]
    own += ["cuda"] if manifest.graphs["language"].dialect == "cuda" else []
    for target in own:
        try:
            backend = _on_gpu(target, directory, manifest, verify)
            why = (
                "its graphs are for it" if target == "cuda" else "the bundle has engines for it that run here"
            )
            return _all_on(backend, directory, manifest, f"{backend.name}: {why}")
        except PpexportError as err:
            problems.append(str(err))
    why = "; ".join(problems) or "the bundle has no engines"
    try:
        return _on_cpu(directory, manifest, threads, why, verify)
    except PpexportError as err:
        if not problems:
            raise
        raise BackendError(f"the bundle runs on no device here: {'; '.join([*problems, str(err)])}") from err


def _all_on(backend: Backend, directory: Path, manifest: Manifest, chosen: str) -> Stages:
    """Every stage on one backend."""
    stages = {
        name: Stage(backend, directory / manifest.graphs[name].file) for name in manifest.model.with_weights
    }
    return Stages(backend, stages.get("vision"), stages["language"], chosen)


def _on_gpu(device: str, directory: Path, manifest: Manifest, verify: bool) -> Backend:
    if device in TARGETS:
        from .trt import TrtBackend

        return TrtBackend(directory, manifest, device, verify)
    found = _dialects(manifest)
    if found not in ("cuda", "plain"):
        raise BundleError(
            f"{directory}: has {manifest.compute} graphs of dialect {found}, expected 'cuda' (or 'plain') for CUDA; "
            "build it with --dialect cuda"
        )
    _check_release(directory, manifest, device)
    from .ort_cuda import OrtCuda

    return OrtCuda()


def _on_host(
    directory: Path, manifest: Manifest, threads: int, places: Mapping[str, str], verify: bool
) -> Stages:
    """Each stage where it was asked for."""
    stages = {
        name: _stage(name, places[name], directory, manifest, threads, not verify)
        for name in manifest.model.with_weights
    }
    names = {name: stage.backend.name for name, stage in stages.items()}
    chosen = names["language"]
    if len(set(names.values())) > 1:
        chosen = ", ".join(f"{name} on {backend}" for name, backend in names.items())
    return Stages(OrtCpu(threads), stages.get("vision"), stages["language"], f"{chosen}, as asked for")


def _on_cpu(directory: Path, manifest: Manifest, threads: int, why: str, verify: bool) -> Stages:
    """The decoder on ONNX Runtime, the tower there or on OpenVINO."""
    language = _stage("language", "cpu", directory, manifest, threads)
    chosen = f"{language.backend.name}: {why}"
    vision = None
    if manifest.model.sees:
        vision, of_vision = _tower(directory, manifest, threads, not verify)
        chosen += of_vision
    return Stages(OrtCpu(threads), vision, language, chosen)


def _tower(directory: Path, manifest: Manifest, threads: int, caches: bool) -> tuple[Stage, str]:
    """Where the tower runs sooner, and the words for ``chosen`` where OpenVINO could."""

    def on(place: str, keeps: bool = False) -> Stage:
        return _stage("vision", place, directory, manifest, threads, keeps)

    if not has_openvino():
        return on("cpu"), ""
    try:
        _check_cpu("vision", directory, manifest)
    except BackendError as refused:  # w8a8 without VNNI
        try:
            tower = on("openvino", caches)
        except PpexportError as err:
            raise BackendError(
                f"{refused}; and OpenVINO does not run its vision tower either: {err}"
            ) from err
        return tower, f"; vision on {tower.backend.name}: this CPU has no VNNI for ONNX Runtime's"
    try:
        _openvino_graph("vision", directory, manifest)
    except BundleError:  # a bundle for other devices
        return on("cpu"), ""
    try:
        found = measured(manifest, lambda: on("cpu"), lambda: on("openvino"), threads)
        if found.faster == "openvino":
            tower = on("openvino", caches)
            return (
                tower,
                f"; vision on {tower.backend.name}, which was measured to be faster: {found.figures}",
            )
        if not found.refused:
            return on("cpu"), f"; vision there, too: {found.figures}"
        problem = found.refused
    except BackendError as err:
        problem = str(err)
    return on("cpu"), f"; vision not on OpenVINO: {problem}" if problem else ""


def _stage(
    name: str, place: str, directory: Path, manifest: Manifest, threads: int, caches: bool = False
) -> Stage:
    """A graph on a CPU ("cpu") or a device of OpenVINO. Raises BackendError, BundleError for one that cannot run.

    ``caches``: may OpenVINO keep what it compiles in the bundle, and take what it kept?
    """
    if place == "cpu":
        _check_cpu(name, directory, manifest)
        return Stage(OrtCpu(threads), directory / manifest.graphs[name].file)
    file = _openvino_graph(name, directory, manifest)
    cache = directory / CACHE / _digest(manifest, name) if caches else None
    return Stage(OpenVino(place.partition(":")[2] or "CPU", threads, cache), directory / file)


def _digest(manifest: Manifest, name: str) -> str:
    """Of a graph and its weights: OpenVINO itself knows a graph by its path, size and time."""
    return hashlib.sha256(" ".join(manifest.hashes(name)).encode()).hexdigest()[:16]


def _openvino_graph(name: str, directory: Path, manifest: Manifest) -> str:
    """The file of a graph that OpenVINO reads. Raises BundleError where there is none."""
    graph = manifest.graphs[name]
    if graph.dialect == "plain" and manifest.compute != "bf16":
        return graph.file
    if "openvino" in graph.also:
        return graph.also["openvino"]
    found = f"{directory}: has its {name} graph in {manifest.compute} and dialect {graph.dialect}"
    if name == "vision":
        raise BundleError(
            f"{found}, expected dialect 'ort' for a tower on OpenVINO, or 'plain' in fp32 or fp16 for all of it; build "
            "it with --dialect ort, or with --dialect plain --precision fp16"
        )
    tower = manifest.model.sees and "openvino" in manifest.graphs["vision"].also
    other = "run the tower alone there with --device vision=openvino, or " if tower else ""
    raise BundleError(
        f"{found}, expected 'plain' in fp32 or fp16 for OpenVINO; {other}build it with --dialect plain --precision fp16"
    )


def _check_cpu(name: str, directory: Path, manifest: Manifest) -> None:
    """Raise BackendError, BundleError where ONNX Runtime does not run a stage on this CPU."""
    found = _dialects(manifest)
    if found not in ("ort", "plain", "cuda") or manifest.compute == "bf16":
        raise BundleError(
            f"{directory}: has {manifest.compute} graphs of dialect {found}, expected 'ort' for a CPU (or 'plain' in "
            "fp32 or fp16, or 'cuda' in fp16); build it with --dialect ort"
        )
    parts = ("vision",) if name == "vision" else ("language", "head")
    if any(manifest.precision.of(part) == "w8a8" for part in parts) and saturates():
        others = ""
        if name == "vision":
            others = ", or let OpenVINO run it: "
            others += "--device vision=openvino" if has_openvino() else INSTALL
        raise BackendError(
            f"{directory}: has w8a8 weights, which need products of 8 bits that add up exactly, found a CPU without "
            f"VNNI; build it with --precision int8 --vision-precision int8{others}"
        )
    if name == "language":
        _check_release(directory, manifest, "cpu")


def _dialects(manifest: Manifest) -> str:
    return ", ".join(sorted({graph.dialect for graph in manifest.graphs.values()}))


def _check_release(directory: Path, manifest: Manifest, device: str) -> None:
    """Raise BackendError where the graphs have operators that the installed onnxruntime does not know."""
    version = import_onnxruntime(device).__version__
    own = manifest.graphs["language"].dialect in ("ort", "cuda") and manifest.model.text.delta is not None
    if own and release(version) < FIRST_WITH_DELTA_RULE:
        first = ".".join(map(str, FIRST_WITH_DELTA_RULE))
        raise BackendError(
            f"{directory}: has layers of linear attention, found onnxruntime {version}, expected {first} or later; "
            f"{newer_onnxruntime()}, or build the bundle with --dialect plain --precision fp16"
        )


def newer_onnxruntime() -> str:
    """How to get one with LinearAttention; that for CUDA and that for the CPU are packages of one folder."""
    extra = "hybrid-cuda" if installed("onnxruntime-gpu") else "hybrid"
    return f"pip install 'ppexport[{extra}]' (Python 3.11 or later)"
