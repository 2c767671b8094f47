"""The promise: no stage of our bundle becomes more than 10 % slower on this device, and no answer becomes wrong."""

from __future__ import annotations

import os
from typing import Any

BUNDLE = os.environ.get("BUNDLE", "my.bundle")
SECONDS = float(os.environ.get("LATENCY_SECONDS", "60"))


def test_latency(latency: Any) -> None:
    latency.check(
        BUNDLE, "screens/", baseline="latency/cpu.json", tolerance="10%", taus=(0.0,), duration=SECONDS
    )
