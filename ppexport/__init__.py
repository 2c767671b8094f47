"""ppexport: vision-language models, exported with pruning inside, run without torch.

    pipe = ppexport.load("my.bundle")
    for piece in (answer := pipe.generate("What is the total?", images=["screenshot.png"])):
        print(piece, end="")
    print(answer.stats)

Everything is imported when it is first used, so ``import ppexport`` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a clone the folder of this package shadows an installed one, and holds none of the folders that setup.cfg maps into
# it: they lie beside it.
if not (_FOLDER := Path(__file__).resolve().parent).joinpath("models").is_dir():
    __path__.append(str(_FOLDER.parent))

from .models.version import __version__

if TYPE_CHECKING:
    from .build_bundle import build
    from .models.errors import (
        BackendError,
        BundleError,
        CheckpointError,
        ImageError,
        PpexportError,
        RequestError,
        SpaceError,
    )
    from .models.pruners.pixelprune import PixelPrune
    from .models.pruners.prunesid import PruneSID
    from .runtime.answer import Answer, Step
    from .runtime.pipeline import Encoded, Pipeline, load
    from .runtime.prune import Dropped, Selection, TokenSelection, select_tokens
    from .runtime.sampling import Sampling
    from .runtime.selector import select, select_frames
    from .runtime.sequence import Request
    from .runtime.stats import Stats

_WHERE = {
    "build_bundle": ("build",),
    "runtime.answer": ("Answer", "Step"),
    "runtime.pipeline": ("Encoded", "Pipeline", "load"),
    "models.pruners.pixelprune": ("PixelPrune",),
    "models.pruners.prunesid": ("PruneSID",),
    "runtime.prune": ("Dropped", "Selection", "TokenSelection", "select_tokens"),
    "runtime.selector": ("select", "select_frames"),
    "runtime.stats": ("Stats",),
    "runtime.sampling": ("Sampling",),
    "runtime.sequence": ("Request",),
    "models.errors": (
        "BackendError",
        "BundleError",
        "CheckpointError",
        "ImageError",
        "PpexportError",
        "RequestError",
        "SpaceError",
    ),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Answer",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "Dropped",
    "Encoded",
    "ImageError",
    "Pipeline",
    "PixelPrune",
    "PpexportError",
    "PruneSID",
    "Request",
    "RequestError",
    "Sampling",
    "Selection",
    "SpaceError",
    "Stats",
    "Step",
    "TokenSelection",
    "__version__",
    "build",
    "load",
    "select",
    "select_frames",
    "select_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'ppexport' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
