"""How users name the devices that a bundle runs on."""

from __future__ import annotations

import re

from .engine_record import TARGETS
from .errors import BackendError

DEVICES = ("auto", "cpu", "cuda", "openvino", *TARGETS)
# where both run in the host's memory, pixels are pruned by ONNX Runtime
STAGES = ("vision", "language")
ON_HOST = re.compile(r"cpu|openvino(:(CPU|(GPU|NPU)(\.\d+)?))?")
EXPECTED = (
    f"one of: {', '.join(DEVICES)}, openvino:GPU, openvino:NPU; or a device for each stage, cpu or one of openvino's, "
    "such as vision=openvino,language=cpu"
)


def places_of(device: str) -> dict[str, str]:
    """The device of each stage; one that is not named beside another runs on the CPU. Raises BackendError."""
    if not isinstance(device, str):
        raise BackendError(f"device is {device!r:.80}, expected {EXPECTED}")
    if "=" not in device:
        if device not in DEVICES and not ON_HOST.fullmatch(device):
            raise BackendError(f"device is {device!r}, expected {EXPECTED}")
        return dict.fromkeys(STAGES, device)
    found: dict[str, str] = {}
    for part in device.split(","):
        stage, _, place = part.strip().partition("=")
        if stage not in STAGES or stage in found or not ON_HOST.fullmatch(place):
            raise BackendError(
                f"device is {device!r}, expected {EXPECTED}, each stage once; found {part.strip()!r}"
            )
        found[stage] = place
    return {**dict.fromkeys(STAGES, "cpu"), **found}
