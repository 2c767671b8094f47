"""What is kept of an image, and the pruners that look at features; those that look at pixels are in selector.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class PruningGraphs:
    """The graphs of a folder that prune, each loaded when it is first asked for. ``byte_max``: see prune_file."""

    def __init__(self, backend: Backend, folder: Path, byte_max: bool = True):
        self.backend = backend
        self.folder = folder
        self.byte_max = byte_max
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """A graph by its name (Pruner.graph). Raises RequestError where the folder lacks it."""
        file = prune_file(graph, self.byte_max)
        if file not in self._sessions:
            if not (self.folder / file).is_file():
                raise RequestError(
                    f"{self.folder}: has no graph for the pruner {graph}, expected {file}; build the bundle again with "
                    "a ppexport that knows the pruner"
                )
            self._sessions[file] = self.backend.session(self.folder / file)
        return self._sessions[file]

    def settings(self, session: Session, given: Mapping[str, int]) -> dict[str, Buffer]:
        """Of ``given`` what a graph takes, on the backend: int32 [1] each."""
        return {
            name: self.backend.upload(np.array([value], np.int32))
            for name, value in given.items()
            if name in session.inputs
        }


class FeaturePruners:
    """The graphs of a bundle that drop tokens behind the vision tower. ``block``: pixels per side of a merged token."""

    def __init__(self, backend: Backend, folder: Path, block: int):
        self.backend = backend
        self.block = block
        self.graphs = PruningGraphs(backend, folder)

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
        session = self.graphs.session(pruner.graph)
        levels, K, width = features.shape
        given = self.graphs.settings(session, pruner.inputs(self.block))
        order = self.backend.zeros((K,), "int32")
        count = self.backend.zeros((1,), "int32")
        pruned = self.backend.zeros(features.shape, features.dtype)
        run(session, {"features": features, **given}, {"order": order, "count": count, "pruned": pruned})
        n = int(self.backend.download(count)[0])
        left = self.backend.zeros((levels, n, width), features.dtype)
        self.backend.copy_into(left, 0, pruned, n)
        return left, self.backend.download(order.rows(0, n)).copy()
