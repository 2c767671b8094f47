"""``ppexport doctor``: what is installed, what can be built and run here, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .models.engine_record import TARGETS
from .models.errors import BackendError, PpexportError
from .models.version import __version__
from .runtime.backends import cuda, trt_api
from .runtime.backends.ort import import_onnxruntime
from .runtime.bundle import open_bundle
from .runtime.pipeline import load

PACKAGES = [
    "numpy",
    "pillow",
    "click",
    "rich",
    "tokenizers",
    "jinja2",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "cuda-python",
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
]
EXPORT = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if something is missing."""

    name: str
    found: str
    todo: str = ""


def runs_on(name: str) -> Finding:
    """That a bundle runs on a device."""
    return Finding(name, "runs")


def examine(bundle: str | None = None) -> Iterator[Finding]:
    """Everything about this machine, then about a bundle on it."""
    yield Finding("ppexport", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("CPU", f"{os.cpu_count()} cores")
    packages = [(name, version) for name in PACKAGES if (version := _version(name))]
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in packages))
    yield _jetpack()
    gpu = _gpu()
    yield gpu
    for target in TARGETS:
        yield _flavour(target)
    yield _providers()
    missing = [name for name in EXPORT if _version(name) is None]
    yield Finding(
        "export", f"missing: {', '.join(missing)}" if missing else "ready", _pip("export") if missing else ""
    )
    yield from _targets(gpu.todo == "")
    if bundle is not None:
        yield from _bundle(bundle)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(extra: str) -> str:
    return f"pip install 'ppexport[{extra}]'"


def _jetpack() -> Finding:
    """The L4T release, and the JetPack that it belongs to."""
    release = Path("/etc/nv_tegra_release")
    if not release.is_file():
        return Finding("Jetson", "no")
    line = release.read_text(encoding="utf-8", errors="replace").splitlines()[0].lstrip("# ")
    found = re.match(r"R(\d+)", line)
    jetpack = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7"}.get(
        found[1] if found else "", "unknown JetPack"
    )
    return Finding("Jetson", f"{jetpack} ({line})")


def _gpu() -> Finding:
    try:
        api = cuda.api()
        count = cuda.check(api.cudaGetDeviceCount())
        names = []
        for device in range(count):
            properties = cuda.check(api.cudaGetDeviceProperties(device))
            name = properties.name.decode() if isinstance(properties.name, bytes) else properties.name
            memory = properties.totalGlobalMem / 1e9
            names.append(f"{name}, {memory:.1f} GB, compute capability {cuda.compute_capability(device)}")
        driver = cuda.check(api.cudaDriverGetVersion())
        return Finding(
            "GPU", f"{'; '.join(names)}; its driver takes CUDA up to {driver // 1000}.{driver % 1000 // 10}"
        )
    except PpexportError as err:
        return Finding(
            "GPU", f"none that can be used: {err}", "a GPU with its driver, and cuda-python, to run engines"
        )


def _flavour(target: str) -> Finding:
    try:
        module = trt_api.load(target)
        return Finding(target, f"{module.__version__} (module {module.__name__})")
    except PpexportError:
        return Finding(target, "not installed", trt_api.INSTALL[target])


def _provider_names() -> list[str]:
    try:
        return list(import_onnxruntime("cpu").get_available_providers())
    except BackendError:
        return []


def _providers() -> Finding:
    names = [name.removesuffix("ExecutionProvider") for name in _provider_names()]
    if not names:
        return Finding("ONNX Runtime", "not installed", f"{_pip('cpu')}, or on an NVIDIA GPU {_pip('cuda')}")
    version = _version("onnxruntime") or _version("onnxruntime-gpu") or ""
    return Finding("ONNX Runtime", f"{version}: {', '.join(names)}")


def _targets(gpu: bool) -> Iterator[Finding]:
    """What ``build --target`` and ``run --device`` can do here."""
    builds = []
    runs = ["cpu"] if _version("onnxruntime") or _version("onnxruntime-gpu") else []
    for target in TARGETS:
        try:
            trt_api.load(target)
        except PpexportError:
            continue
        if gpu or target == "tensorrt-rtx":
            builds.append(target)
        if gpu:
            runs.append(target)
    if gpu and "CUDAExecutionProvider" in _provider_names():
        runs.append("cuda")
    yield Finding("can compile for", ", ".join(builds) or "nothing")
    yield Finding("can run on", ", ".join(runs) or "nothing", "" if runs else _pip("cpu"))


def _bundle(bundle: str) -> Iterator[Finding]:
    """Does the bundle run here, on each device? It is loaded and hashed, not looked at only."""
    _, manifest = open_bundle(bundle)
    dialects = ", ".join(sorted({graph.dialect for graph in manifest.graphs.values()}))
    yield Finding("bundle", f"{manifest.family}, weights in {manifest.precision}, dialect {dialects}")
    for device in ("cpu", "cuda", *TARGETS):
        try:
            with load(bundle, device, verify=True):
                yield runs_on(f"  on {device}")
        except PpexportError as err:
            yield Finding(f"  on {device}", f"does not run: {err}")
