"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from process import versions

from ppexport.runtime.backends import processor

# of x86 and of ARM, as Linux names them
PRODUCTS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PRODUCTS += ("asimddp", "i8mm", "bf16", "sve")
PACKAGES = (
    "ppexport",
    "onnxruntime",
    "openvino",
    "torch",
    "onnx",
    "onnx_ir",
    "numpy",
    "pillow",
    "transformers",
)


def describe() -> dict[str, object]:
    """Processor, which instructions for products it has, cores, memory and package versions."""
    memory = next(
        (int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0
    )
    flags = processor.features().split()
    return {
        "cpu": processor.name(),
        "instructions": [name for name in PRODUCTS if name in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(memory * 1024 / 1e9, 1),
        "python": platform.python_version(),
        "packages": versions(*PACKAGES),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
