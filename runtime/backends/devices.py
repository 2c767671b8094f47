"""Where a bundle runs: the backend for a device, and how "auto" chooses one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from ...models.engine_record import TARGETS, folder
from ...models.errors import BackendError, BundleError, PpexportError
from ...models.manifest import Manifest
from ...models.version import release
from .ort import FIRST_WITH_DELTA_RULE, OrtCpu, import_onnxruntime
from .session import Backend

CPUINFO = Path("/proc/cpuinfo")
DEVICES = ("auto", "cpu", "cuda", *TARGETS)


def open_device(
    device: str, directory: Path, manifest: Manifest, threads: int, verify: bool = False
) -> tuple[Backend, str]:
    """The backend of a device and one line that says what was chosen and why. ``verify``: check hashes of engines.

    "auto" takes TensorRT-RTX or TensorRT where the bundle has engines that run here, CUDA for graphs that are made for
    it, else the CPU. Raises BackendError, BundleError.
    """
    if device not in DEVICES:
        raise BackendError(f"device is {device!r}, expected one of: {', '.join(DEVICES)}")
    if device != "auto":
        backend = _open(device, directory, manifest, threads, verify)
        return backend, f"{backend.name}, as asked for"
    problems = []
    own = [target for target in reversed(TARGETS) if folder(directory, target).is_dir()]
    own += ["cuda"] if manifest.graphs["language"].dialect == "cuda" else []
    for target in own:
        try:
            backend = _open(target, directory, manifest, threads, verify)
            why = (
                "its graphs are for it" if target == "cuda" else "the bundle has engines for it that run here"
            )
            return backend, f"{backend.name}: {why}"
        except PpexportError as err:
            problems.append(str(err))
    if not problems:
        backend = _open("cpu", directory, manifest, threads)
        return backend, f"{backend.name}: the bundle has no engines"
    try:
        backend = _open("cpu", directory, manifest, threads)
    except PpexportError as err:
        raise BackendError(f"the bundle runs on no device here: {'; '.join([*problems, str(err)])}") from err
    return backend, f"{backend.name}: {'; '.join(problems)}"


def _open(device: str, directory: Path, manifest: Manifest, threads: int, verify: bool = False) -> Backend:
    if device in TARGETS:
        from .trt import TrtBackend

        return TrtBackend(directory, manifest, device, verify)
    dialects = ", ".join(sorted({graph.dialect for graph in manifest.graphs.values()}))
    found = f"{directory}: has {manifest.compute} graphs of dialect {dialects}"
    if device == "cuda":
        if dialects not in ("cuda", "plain"):
            raise BundleError(f"{found}, expected 'cuda' (or 'plain') for CUDA; build it with --dialect cuda")
        _check_release(directory, manifest, device)
        from .ort_cuda import OrtCuda

        return OrtCuda()
    if dialects not in ("ort", "plain", "cuda") or manifest.compute == "bf16":
        raise BundleError(
            f"{found}, expected 'ort' for a CPU (or 'plain' in fp32 or fp16, or 'cuda' in fp16); build it with "
            "--dialect ort"
        )
    if manifest.precision.uses("w8a8") and saturates():
        raise BackendError(
            f"{directory}: has w8a8 weights, which need products of 8 bits that add up exactly, found a CPU without "
            "VNNI; build it with --precision int8"
        )
    _check_release(directory, manifest, device)
    return OrtCpu(threads)


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
    try:
        importlib.metadata.version("onnxruntime-gpu")
        extra = "hybrid-cuda"
    except importlib.metadata.PackageNotFoundError:
        extra = "hybrid"
    return f"pip install 'ppexport[{extra}]' (Python 3.11 or later)"


def saturates() -> bool:
    """Does this x86 CPU add two products of 8 bits in 16 (vpmaddubsw)? False where the system does not say."""
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    return flags is not None and not {"avx_vnni", "avx512_vnni"} & set(flags)
