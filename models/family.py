"""What differs between model families, and what the stages hand each other because of it. No torch.

A family of known architecture is one file that implements ``Family``; models/families.py lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from .config import ModelConfig, Preprocessing, Weight
from .pruners import Pruner

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Frame:
    """A picture that views are cut from, and how an image becomes it."""

    height: int  # that the image is resized to, in pixels
    width: int
    box: Box | None = None  # what of that is the picture, black where it lies outside; None: all
    square: bool = False  # before it is resized, the image is put into the middle of a square
    fill: tuple[int, int, int] = (0, 0, 0)  # of that colour


@dataclass(frozen=True)
class View:
    """One run of the vision tower: a still image, or a tile of a larger one."""

    box: Box  # in its frame, in pixels
    grid: tuple[int, int]  # rows, columns in merged tokens
    time: int = 0  # temporal patch
    frame: int = 0
    wanted: Box | None = (
        None  # the tokens of the grid that show the image, and not what was put around it; None: all
    )

    @property
    def total(self) -> int:
        """Merged tokens of the full grid."""
        return self.grid[0] * self.grid[1]

    def rows_wanted(self, keep: np.ndarray) -> np.ndarray:
        """Which of the tokens ``keep`` int32 [K] show the image: int32 [U], indices into ``keep``."""
        if self.wanted is None:
            return np.arange(len(keep), dtype=np.int32)
        top, left, height, width = self.wanted
        row, column = np.divmod(keep, self.grid[1])
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        return np.flatnonzero(inside).astype(np.int32)


@dataclass(frozen=True)
class Views:
    """How an image is shown to the vision tower, and how long it is in a prompt."""

    frames: tuple[Frame, ...]
    views: tuple[View, ...]
    placeholders: int  # in a prompt, before anything is pruned

    @classmethod
    def whole(cls, height: int, width: int, block: int) -> Views:
        """The image resized to these multiples of ``block`` pixels, as one view."""
        view = View((0, 0, height, width), (height // block, width // block))
        return cls((Frame(height, width),), (view,), view.total)

    @property
    def total(self) -> int:
        """N, the merged tokens of all full grids."""
        return sum(view.total for view in self.views)


@dataclass(frozen=True, eq=False)
class Kept:
    """What all pruners left of one image."""

    # int32 [K], indices into its N tokens, view after view; within a view they rise, unless ``grouped``
    keep: np.ndarray
    shown: Views
    grouped: bool = False  # within a view, they are in the order of a pruner's groups
    class_tokens: bool = False  # the class token of every view that keeps anything goes before its others

    def by_view(self) -> list[np.ndarray]:
        """``keep`` of each view, counted from its beginning."""
        ends = np.cumsum([view.total for view in self.shown.views])
        starts = ends - [view.total for view in self.shown.views]
        return [
            self.keep[(self.keep >= start) & (self.keep < end)] - start
            for start, end in zip(starts, ends, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Placed:
    """Where what is left of an image stands in a prompt."""

    rows: np.ndarray  # int32 [n]: the row of the image's features that stands at each of its places
    positions: np.ndarray  # int32 [A, n], counted from its beginning
    advance: int  # how far the text after it moves on
    count: int  # rows of the image's features


@dataclass(frozen=True)
class Prompt:
    """A prompt as the decoder takes it: dropped tokens are gone, kept ones stand where the family puts them.

    A is the number of position axes (ModelConfig.axes).
    """

    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [A, S]
    image_of: np.ndarray  # int32 [S]: the image that a placeholder stands for, counted from 0; -1 for text
    feature_rows: (
        np.ndarray
    )  # int32 [S]: the row of the features that stands there, all images in a row; -1 for text
    first_rows: np.ndarray  # int32 [images]: the first row of the features of each
    next_position: int  # of the first generated token on every axis
    full_length: int  # tokens before pruning

    @property
    def columns(self) -> np.ndarray:
        """All that a token's state depends on but the pixels of its image: int32 [2 + A, S]."""
        return np.vstack([self.ids, self.image_of, self.positions])

    def after(self, count: int) -> Prompt:
        """Without its first ``count`` tokens, which hold whole images only; rows count from the first image left."""
        rows = self.feature_rows[count:]
        left = self.image_of[count:]
        first = self.first_rows[left[left >= 0].min()] if (left >= 0).any() else 0
        return replace(
            self,
            ids=self.ids[count:],
            positions=self.positions[:, count:],
            image_of=self.image_of[count:],
            feature_rows=np.where(rows >= 0, rows - first, -1).astype(np.int32),
            first_rows=self.first_rows - first,
        )


class Family(Protocol):
    """One kind of model, named by its Hugging Face ``model_type``."""

    model_type: str
    preprocessing: Preprocessing  # where a checkpoint has no image processor configuration
    chat_template: str  # where a checkpoint has a tokenizer and no chat template
    head: str  # name of the output head's weight in checkpoints
    prune: tuple[Pruner, ...]  # of bundles whose builder does not say

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """Read a ``config.json``; what is ignored of it is added to ``notices``.

        Raises CheckpointError for a key that is missing, or has a value that the graphs do not compute.
        """

    def weights(self, model: ModelConfig) -> dict[str, dict[str, Weight]]:
        """Graph ("vision", "language") -> initializer -> where it lies in the checkpoint."""

    def canonical_name(self, stored: str) -> str | None:
        """The name that ``weights`` has for a stored tensor; None for a buffer, which the graphs calculate."""

    def unused(self, model: ModelConfig, name: str) -> bool:
        """Is this a tensor of the checkpoint, by its present name, that nothing here computes with?"""

    def views(self, model: ModelConfig, pre: Preprocessing, height: int, width: int) -> Views:
        """How an image of that size is shown to the tower.

        Raises ImageError for a size that the model does not take, RequestError for impossible limits to its pixels.
        """

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        """Positions and feature rows of a prompt, ids int32 [S'], in which every image has all its placeholders.

        Raises RequestError if placeholders and images do not match.
        """

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """What the tower's graph takes besides ``image`` and ``keep`` int32 [K], by input."""
