"""Lets commands that tests start share what is traced with the tests (conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FOLDER = "TRACES_OF_THE_TESTS"  # the variable that names the folder
MODULE = "ppexport.exporters.graphs"


class Finder(MetaPathFinder):
    """Finds a module as it would be found without, and lets ``change`` change it once it is loaded."""

    def __init__(self, module: str, change: Callable[[ModuleType], None]):
        self.module = module
        self.change = change

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = Changing(spec.loader, self.change)
        return spec


class Changing(Loader):
    """Loads a module with another loader."""

    def __init__(self, loader: Loader, change: Callable[[ModuleType], None]):
        self.loader = loader
        self.change = change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See Loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        self.loader.exec_module(module)
        self.change(module)


def share(module: ModuleType) -> None:
    """Let it take what was traced already."""
    from traced import Traces

    traces = Traces(Path(os.environ[FOLDER]))
    for name in Traces.SHARED:
        setattr(module, name, traces.once(getattr(module, name)))


if FOLDER in os.environ:
    sys.meta_path.insert(0, Finder(MODULE, share))
