"""TensorRT and TensorRT-RTX through one door: their Python APIs differ in the module's name and a few calls."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from ...models.engine_record import TARGETS
from ...models.errors import BackendError

MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
INSTALL = {
    "tensorrt": "install TensorRT 10.3 or later (on a Jetson: sudo apt install nvidia-jetpack; elsewhere: pip install "
    "tensorrt)",
    "tensorrt-rtx": "install it with: pip install 'ppexport[rtx]'",
}
KERNEL = re.compile(r"^Name: (\S+), LayerType: (\w+)", re.M)
NO_KERNELS = ("signal", "wait", "shape_call", "ShapeHostToDevice")


def load(target: str) -> ModuleType:
    """The Python module of a target, "tensorrt" or "tensorrt-rtx". Raises BackendError that says what to install."""
    if target not in TARGETS:
        raise BackendError(f"target is {target!r}, expected one of: {', '.join(TARGETS)}")
    problems = []
    for name in MODULES[target]:
        try:
            return importlib.import_module(name)
        except ImportError as err:
            problems.append(str(err))
        except Exception as err:  # libraries that do not load
            problems.append(f"{name}: {err}")
    raise BackendError(f"{target} cannot be imported ({'; '.join(problems)}); {INSTALL[target]}")


def logger(trt: Any, kernels: list[str] | None = None) -> Any:
    """A logger that prints nothing and keeps the latest messages of errors in ``messages``.

    ``kernels`` gets the names of an engine's kernels, where the compiler was asked for details.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages = [*self.messages[-9:], message]
            elif kernels is not None:
                kernels.extend(
                    f"{kind} {name}" for name, kind in KERNEL.findall(message) if kind not in NO_KERNELS
                )

    return Log()


def quote(log: Any) -> str:
    """What TensorRT said since this was last asked, shortened, without its complaint that there is no GPU (compiling
    needs none)."""
    messages = log.messages
    log.messages = []
    told = [
        m for m in messages if "CUDA driver version is insufficient" not in m and "no CUDA-capable" not in m
    ]
    return " | ".join(told)[:1500] or "no reason given"
