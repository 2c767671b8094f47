"""Energy and GPU memory while something runs, from what the machine tells: Jetson's power rails, NVIDIA's library.

Jetson boards measure their rails with INA3221 chips, whose Linux driver shows millivolts and milliamperes as files
(Documentation/hwmon/ina3221.rst of the kernel; NVIDIA's Jetson Linux guide, "Power and thermal").
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from .machine import nvml

HWMON = Path("/sys/class/hwmon")
EVERY = 0.05  # seconds


class Meter:
    """Inside, a thread takes samples. ``joules`` by rail and ``gpu_bytes``, the most, are None where there is none."""

    def __init__(self, hwmon: Path = HWMON):
        self.joules: dict[str, float] | None = None
        self.gpu_bytes: int | None = None
        self._rails = rails(hwmon)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ppexport-meter")

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with nvml() as library:
            handle = (
                library.nvmlDeviceGetHandleByIndex(0) if library and library.nvmlDeviceGetCount() else None
            )
            if handle is None and not self._rails:
                return
            joules: dict[str, float] = defaultdict(float)
            begin = _gpu_millijoules(library, handle)
            last = time.perf_counter()
            while True:
                ended = self._stop.wait(EVERY)
                now = time.perf_counter()
                for name, (voltage, current) in self._rails.items():
                    joules[name] += _number(voltage) * _number(current) * 1e-6 * (now - last)
                last = now
                if handle is not None:
                    with contextlib.suppress(
                        library.NVMLError
                    ):  # a GPU on the CPU's chip has no memory of its own
                        used = int(library.nvmlDeviceGetMemoryInfo(handle).used)
                        self.gpu_bytes = max(self.gpu_bytes or 0, used)
                if ended:
                    break
            end = _gpu_millijoules(library, handle)
            if begin is not None and end is not None:
                joules["GPU"] = (end - begin) / 1e3
            self.joules = dict(joules) or None


def rails(hwmon: Path = HWMON) -> dict[str, tuple[Path, Path]]:
    """Name of a rail -> the files of its voltage (mV) and its current (mA)."""
    found = {}
    for chip in sorted(hwmon.glob("hwmon*")):
        try:
            if (chip / "name").read_text(encoding="ascii").strip() != "ina3221":
                continue
            for label in sorted(chip.glob("in*_label")):
                index = label.name[len("in") : -len("_label")]
                voltage = chip / f"in{index}_input"
                current = chip / f"curr{index}_input"
                if voltage.exists() and current.exists():
                    found[label.read_text(encoding="ascii").strip()] = (voltage, current)
        except (OSError, UnicodeDecodeError):
            continue
    return found


def _number(path: Path) -> float:
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0


def _gpu_millijoules(library: object, handle: object) -> int | None:
    """Since the driver was loaded; None where the GPU does not count."""
    if handle is None:
        return None
    try:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(handle))  # type: ignore[attr-defined]
    except Exception:  # NVMLError of a library that may be absent
        return None
