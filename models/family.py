"""What differs between model families, and what the stages hand each other because of it. No torch.

A family of known architecture is one file that implements ``Family``; models/families.py lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from .config import ModelConfig, Preprocessing, Weight


@dataclass(frozen=True)
class View:
    """One run of the vision tower: a still image, or a tile of a larger one."""

    box: tuple[int, int, int, int]  # top, left, height, width in the resized picture, pixels
    grid: tuple[int, int]  # rows, columns in merged tokens
    time: int = 0  # temporal patch

    @property
    def total(self) -> int:
        """Merged tokens of the full grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Views:
    """How an image is shown to the vision tower."""

    height: int  # of the resized picture, in pixels
    width: int
    views: tuple[View, ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """What all pruners left of one image."""

    # int32 [K], indices into its N tokens, view after view; they rise unless a pruner after the tower orders otherwise
    keep: np.ndarray
    views: tuple[View, ...]

    @property
    def total(self) -> int:
        """N, the tokens of all full grids."""
        return sum(view.total for view in self.views)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the decoder takes it: dropped tokens are gone, kept ones have their positions in the full grid.

    A is the number of position axes (ModelConfig.axes).
    """

    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [A, S]
    image_of: np.ndarray  # int32 [S]: the image that a placeholder stands for, counted from 0; -1 for text
    feature_rows: (
        np.ndarray
    )  # int32 [S]: the row of the features that stands there, all images in a row; -1 for text
    next_position: int  # of the first generated token on every axis, as if nothing had been pruned
    full_length: int  # tokens before pruning

    @property
    def columns(self) -> np.ndarray:
        """All that a token's state depends on but the pixels of its image: int32 [2 + A, S]."""
        return np.vstack([self.ids, self.image_of, self.positions])

    def after(self, count: int) -> Prompt:
        """Without its first ``count`` tokens, which hold whole images only; rows count from the first image left."""
        rows = self.feature_rows[count:]
        first = rows[rows >= 0].min(initial=np.iinfo(np.int32).max)
        return replace(
            self,
            ids=self.ids[count:],
            positions=self.positions[:, count:],
            image_of=self.image_of[count:],
            feature_rows=np.where(rows >= 0, rows - first, -1).astype(np.int32),
        )


class Family(Protocol):
    """One kind of model, named by its Hugging Face ``model_type``."""

    model_type: str
    preprocessing: Preprocessing  # where a checkpoint has no image processor configuration
    chat_template: str  # where a checkpoint has a tokenizer and no chat template
    head: str  # name of the output head's weight in checkpoints

    def parse(self, raw: Mapping[str, Any], notices: list[str] | None = None) -> ModelConfig:
        """Read a ``config.json``; what is ignored of it is added to ``notices``.

        Raises CheckpointError for a key that is missing, or has a value that the graphs do not compute.
        """

    def weights(self, model: ModelConfig) -> dict[str, dict[str, Weight]]:
        """Graph ("vision", "language") -> initializer -> where it lies in the checkpoint."""

    def canonical_name(self, stored: str) -> str | None:
        """The name that ``weights`` has for a stored tensor; None for a buffer, which the graphs calculate."""

    def views(self, model: ModelConfig, height: int, width: int, limits: tuple[int, int]) -> Views:
        """How an image of that size is shown to the tower, with ``limits`` to its pixels: fewest, most.

        Raises ImageError for a size that the model does not take, RequestError for impossible limits.
        """

    def layout(self, model: ModelConfig, ids: np.ndarray, kept: Sequence[Kept]) -> Prompt:
        """Positions and feature rows of a prompt, ids int32 [S'], in which every image stands as its full grid.

        Raises RequestError if placeholders and images do not match.
        """

    def tower_inputs(self, model: ModelConfig, view: View, keep: np.ndarray) -> dict[str, np.ndarray]:
        """What the tower's graph takes besides ``image`` and ``keep`` int32 [K], by input."""
