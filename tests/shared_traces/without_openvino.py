"""Commands that tests start find no OpenVINO, as the tests themselves: else each would measure its bundle."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from share_traces import FOLDER

MODULE = "ppexport.runtime.backends.openvino"


class Finder(MetaPathFinder):
    """Finds MODULE as it would be found without, and lets it say that nothing is installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_deny(module: ModuleType) -> None:
            run(module)
            module.has_openvino = lambda: False  # type: ignore[attr-defined]

        spec.loader.exec_module = run_and_deny  # type: ignore[method-assign]
        return spec


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder())
