"""What a measurement ran on: processor, clocks, GPU, packages; and how fast that is at two fixed tasks right now."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..models.errors import BackendError
from ..runtime.backends import processor
from .schema import Gpu, Machine

try:
    import psutil
except ImportError as err:
    raise BackendError(
        "psutil is not installed; 'ppexport bench' needs: pip install 'ppexport[bench]'"
    ) from err

PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "numpy",
    "pillow",
    "tokenizers",
)
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe() -> Machine:
    """This machine, now."""
    clocks = _clocks()
    return Machine(
        cpu=processor.name(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        clock_mhz=round(clocks, 1) if clocks else None,
        governor=_text(GOVERNOR),
        gpu=_gpu(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=dict(_packages()),
    )


def differences(base: Machine, new: Machine) -> list[str]:
    """What makes times of two machines no comparison, in words."""
    found = []
    for name in ("cpu", "cores", "system"):
        before = getattr(base, name)
        after = getattr(new, name)
        if before != after:
            found.append(f"{name}: {before} before, {after} now")
    gpus = [machine.gpu.name if machine.gpu else "none" for machine in (base, new)]
    if gpus[0] != gpus[1]:
        found.append(f"GPU: {gpus[0]} before, {gpus[1]} now")
    return found


REPEATS = 1000
LINE = 64  # bytes of a cache line


class Probe:
    """Two fixed tasks of one thread, milliseconds each: a slow moment of the machine shows here, too.

    Of one thread, since several that wait for each other become many times slower when something else runs.
    """

    def __init__(self) -> None:
        self._array = _aligned(16 << 20)  # more than a cache holds
        self._small = _aligned(8 << 10)  # stays in the first cache
        self.memory: list[float] = []
        self.arithmetic: list[float] = []

    @property
    def nbytes(self) -> int:
        """Memory that it takes itself."""
        return self._array.nbytes + self._small.nbytes

    def run(self) -> None:
        """Measure once more, the better of three tries each."""
        self.memory.append(self._array.nbytes / _seconds(self._array.max) / 1e9)
        self.arithmetic.append(REPEATS * self._small.size / _seconds(self._multiply) / 1e9)

    def _multiply(self) -> None:
        for _ in range(REPEATS):
            np.multiply(self._small, self._small, out=self._small)


def _aligned(count: int) -> np.ndarray:
    """Ones, float32 [count], from the start of a cache line on.

    Where numpy puts an array differs from process to process, and vectors that straddle two lines take 1.4 times as
    long: two measurements of an unchanged machine would be taken for ones of different speed.
    """
    memory = np.ones(count + LINE // 4, np.float32)
    first = -memory.ctypes.data % LINE // 4
    return memory[first : first + count]


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _seconds(task: Any) -> float:
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        task()
        found.append(time.perf_counter() - begin)
    return min(found)


def _clocks() -> float | None:
    """Mean clock of the cores in MHz, where the system tells."""
    with contextlib.suppress(Exception):  # psutil raises what its platform does
        found = psutil.cpu_freq()
        return float(found.current) if found and found.current else None
    return None


def _gpu() -> Gpu | None:
    with nvml() as library:
        if library is None or not library.nvmlDeviceGetCount():
            return None
        handle = library.nvmlDeviceGetHandleByIndex(0)
        clock = most = memory = None  # a GPU on the same chip as the CPU tells less
        with contextlib.suppress(library.NVMLError):
            memory = int(library.nvmlDeviceGetMemoryInfo(handle).total)
        with contextlib.suppress(library.NVMLError):
            clock = int(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM))
            most = int(library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM))
        name = str(library.nvmlDeviceGetName(handle))
        driver = str(library.nvmlSystemGetDriverVersion())
        return Gpu(name=name, driver=driver, memory_bytes=memory, clock_mhz=clock, clock_max_mhz=most)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """NVIDIA's management library, or None where there is no GPU, driver or package of it."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVMLError of a library that may be absent itself
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
