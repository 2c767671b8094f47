"""Lets commands that tests start share what is traced with the tests (conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FOLDER = "TRACES_OF_THE_TESTS"  # the variable that names the folder
MODULE = "ppexport.exporters.graphs"


class Finder(MetaPathFinder):
    """Finds MODULE as it would be found without, and lets it share what it traces."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = Sharing(spec.loader)
        return spec


class Sharing(Loader):
    """Loads the module with another loader."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See Loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        self.loader.exec_module(module)
        from traced import Traces

        traces = Traces(Path(os.environ[FOLDER]))
        for name in Traces.SHARED:
            setattr(module, name, traces.once(getattr(module, name)))


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder())
