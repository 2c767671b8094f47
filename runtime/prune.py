"""What is kept of an image, and the pruners that look at features; those that look at pixels are in selector.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.errors import RequestError
from ..models.family import Kept, View
from ..models.pruners import Pruner
from ..models.pruners.pixelprune import PixelPrune, prune_file
from .backends.session import Backend, Buffer, Session, run


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens of one image are kept."""

    keep: np.ndarray  # int32 [K], rising indices into the N tokens of the full grid
    rows: int  # of the full grid, in merged tokens
    cols: int
    width: int  # of the resized image, in pixels
    height: int
    reason: str  # why nothing was pruned, or why not as asked; empty otherwise
    prune: PixelPrune | None  # as it was used: with the tau that max_tokens led to; None where it is off
    others: tuple[Pruner, ...] = ()  # further pruners that were used

    @property
    def total(self) -> int:
        """N, the tokens of the full grid."""
        return self.rows * self.cols

    @property
    def kept(self) -> int:
        """K, the tokens that are kept."""
        return len(self.keep)

    @property
    def share(self) -> float:
        """K / N."""
        return self.kept / self.total

    def as_kept(self) -> Kept:
        """As of an image that is a single view."""
        return kept_of([self], (View((0, 0, self.height, self.width), (self.rows, self.cols)),))


def kept_of(selections: Sequence[Selection], views: tuple[View, ...]) -> Kept:
    """What is kept of all views of an image."""
    starts = np.cumsum([0, *(view.total for view in views)])
    keeps = [selection.keep + start for selection, start in zip(selections, starts, strict=False)]
    return Kept(np.concatenate(keeps).astype(np.int32), views)


def check_graph(path: Path, name: str) -> None:
    """Raise RequestError where a bundle lacks the graph of a pruner."""
    if not path.is_file():
        raise RequestError(
            f"{path.parent}: has no graph for the pruner {name}, expected {path.name}; build the bundle again with a "
            "ppexport that knows the pruner"
        )


class FeaturePruners:
    """The graphs of a bundle that drop tokens behind the vision tower. ``block``: pixels per side of a merged token."""

    def __init__(self, backend: Backend, folder: Path, block: int):
        self.backend = backend
        self.folder = folder
        self.block = block
        self._sessions: dict[str, Session] = {}

    def prune(self, features: Buffer, pruners: Sequence[Pruner]) -> tuple[Buffer, np.ndarray]:
        """features [1 + L, K, D] -> those that all ``pruners``, one after the other, leave, and their rows, int32 [K'].

        The rows rise.
        """
        rows = np.arange(features.shape[1], dtype=np.int32)
        for pruner in pruners:
            features, left = self._one(features, pruner)
            rows = rows[left]
        return features, rows

    def _one(self, features: Buffer, pruner: Pruner) -> tuple[Buffer, np.ndarray]:
        file = prune_file(pruner.graph)
        if file not in self._sessions:
            check_graph(self.folder / file, pruner.graph)
            self._sessions[file] = self.backend.session(self.folder / file)
        session = self._sessions[file]
        levels, K, width = features.shape
        given = {
            name: self._scalar(n) for name, n in pruner.inputs(self.block).items() if name in session.inputs
        }
        order = self.backend.zeros((K,), "int32")
        count = self.backend.zeros((1,), "int32")
        pruned = self.backend.zeros(features.shape, features.dtype)
        run(session, {"features": features, **given}, {"order": order, "count": count, "pruned": pruned})
        n = int(self.backend.download(count)[0])
        left = self.backend.zeros((levels, n, width), features.dtype)
        self.backend.copy_into(left, 0, pruned, n)
        return left, self.backend.download(order.rows(0, n)).copy()

    def _scalar(self, value: int) -> Buffer:
        return self.backend.upload(np.array([value], np.int32))
