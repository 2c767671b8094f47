"""Commands that tests start find no OpenVINO, as the tests themselves: else each would measure its bundle."""

from __future__ import annotations

import os
import sys
from types import ModuleType

from share_traces import FOLDER, Finder


def deny(module: ModuleType) -> None:
    """Let it say that OpenVINO is not installed."""
    module.has_openvino = lambda: False  # type: ignore[attr-defined]


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder("ppexport.runtime.backends.openvino", deny))
