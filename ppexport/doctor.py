"""``ppexport doctor``: what is installed, what can be built and run here, and what to install for the rest."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .models.engine_record import TARGETS
from .models.errors import BackendError, PpexportError
from .models.version import __version__, installed, release
from .runtime import vision_place
from .runtime.backends import cuda, trt_api
from .runtime.backends.devices import newer_onnxruntime
from .runtime.backends.openvino import import_openvino, new_core
from .runtime.backends.ort import FIRST_WITH_DELTA_RULE, import_onnxruntime
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
    "openvino",
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
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
UPDATE = "JetPack 6.1 or later: engines need TensorRT 10.3"


@dataclass(frozen=True)
class JetPack:
    """What a release brings, by NVIDIA's release notes."""

    name: str
    tensorrt: str
    cuda: str
    python: str


JETPACKS = (  # by the first L4T release of each
    ((34, 0), JetPack("5", "8.5", "11.4", "3.8")),
    ((36, 2), JetPack("6.0", "8.6", "12.2", "3.10")),
    ((36, 4), JetPack("6.1", "10.3", "12.6", "3.10")),
    ((36, 4, 3), JetPack("6.2", "10.3", "12.6", "3.10")),
    ((38, 0), JetPack("7.0", "10.13", "13.0", "3.12")),
    ((38, 4), JetPack("7.1 or later", "10.13", "13.0", "3.12")),
)


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
    packages = [(name, version) for name in PACKAGES if (version := installed(name))]
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in packages))
    yield _jetpack()
    gpu = _gpu()
    yield gpu
    for target in TARGETS:
        yield _flavour(target)
    yield _providers()
    yield _openvino()
    missing = [name for name in EXPORT if installed(name) is None]
    yield Finding(
        "export", f"missing: {', '.join(missing)}" if missing else "ready", _pip("export") if missing else ""
    )
    yield from _targets(gpu.todo == "")
    if bundle is not None:
        yield from _bundle(bundle)


def _pip(extra: str) -> str:
    return f"pip install 'ppexport[{extra}]'"


def _jetpack() -> Finding:
    """The L4T release, the JetPack that it belongs to, and what runs there."""
    if not TEGRA_RELEASE.is_file():
        return Finding("Jetson", "no")
    text = TEGRA_RELEASE.read_text(encoding="utf-8", errors="replace")
    line = text.partition("\n")[0].lstrip("# ")
    found = re.match(r"R(\d+)[^,]*, REVISION: ([\d.]+)", line)
    if found is None:
        return Finding(
            "Jetson", f"found {line!r} in {TEGRA_RELEASE}, expected 'R36 (release), REVISION: 4.3, ...'"
        )
    release = (int(found[1]), *(int(n) for n in found[2].split(".") if n))
    known = [jetpack for since, jetpack in JETPACKS if release >= since]
    name = f"L4T {found[1]}.{found[2]}"
    if not known:
        return Finding("Jetson", f"{name}, older than JetPack 5", UPDATE)
    jetpack = known[-1]
    brings = f"JetPack {jetpack.name} ({name}): TensorRT {jetpack.tensorrt}, Python {jetpack.python}, CUDA "
    brings += jetpack.cuda
    if jetpack.tensorrt.startswith("8."):
        return Finding("Jetson", f"{brings}; runs bundles on its CPU only", UPDATE)
    cuda_python = f"cuda-python=={jetpack.cuda}.*"
    return Finding(
        "Jetson",
        f"{brings}; runs engines of dialect plain, with {cuda_python}; a bundle of dialect ort on its CPU",
    )


def _gpu() -> Finding:
    try:
        api = cuda.api()
        count = cuda.check(api.cudaGetDeviceCount())
        names = []
        for device in range(count):
            properties = cuda.check(api.cudaGetDeviceProperties(device))
            memory = properties.totalGlobalMem / 1e9
            names.append(
                f"{cuda.gpu_name(device)}, {memory:.1f} GB, compute capability {cuda.compute_capability(device)}"
            )
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
    try:
        version = import_onnxruntime("cpu").__version__
    except BackendError:
        return Finding("ONNX Runtime", "not installed", f"{_pip('cpu')}, or on an NVIDIA GPU {_pip('cuda')}")
    names = [name.removesuffix("ExecutionProvider") for name in _provider_names()]
    old = release(version) < FIRST_WITH_DELTA_RULE
    first = ".".join(map(str, FIRST_WITH_DELTA_RULE))
    todo = f"{first} or later for Qwen3.5 in the dialects ort and cuda: {newer_onnxruntime()}" if old else ""
    return Finding("ONNX Runtime", f"{version}: {', '.join(names)}", todo)


def _openvino() -> Finding:
    """OpenVINO's devices, and what its CPU device calculates in."""
    todo = f"{_pip('openvino')}, to run vision towers where that is faster, and on Intel's GPUs and NPUs"
    if installed("openvino") is None:
        return Finding("OpenVINO", "not installed", todo)
    try:
        core = new_core(import_openvino())
        offered = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except (BackendError, RuntimeError) as err:
        return Finding("OpenVINO", f"{installed('openvino')}, which does not work: {err}", todo)
    kinds = [kind for kind in ("FP32", "BF16", "FP16", "INT8") if kind in offered]
    devices = ", ".join(core.available_devices)
    return Finding(
        "OpenVINO", f"{installed('openvino')}: {devices}; its CPU device calculates in {', '.join(kinds)}"
    )


def _targets(gpu: bool) -> Iterator[Finding]:
    """What ``build --target`` and ``run --device`` can do here."""
    builds = []
    runs = ["cpu"] if installed("onnxruntime") or installed("onnxruntime-gpu") else []
    runs += ["openvino"] if runs and installed("openvino") else []
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
    openvino = ["openvino"] if installed("openvino") else []
    openvino += ["vision=openvino"] if openvino and manifest.model.sees else []
    for device in ("cpu", *openvino, "cuda", *TARGETS):
        try:
            with load(bundle, device, verify=True):
                yield runs_on(f"  on {device}")
        except PpexportError as err:
            yield Finding(f"  on {device}", f"does not run: {err}")
    try:
        with load(bundle) as pipe:
            found = pipe.chosen
    except PpexportError as err:
        found = f"does not run: {err}"
    yield Finding("  auto", found)
    measured = vision_place.known(manifest) if manifest.model.sees else None
    if measured is not None:
        yield Finding("  vision tower", f"one small image on {measured.cpu}: {measured.figures}")
