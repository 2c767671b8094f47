"""How to prune (Prune) and what is kept of an image (Selection); selector.py goes from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models.checks import integer, number
from ..models.config import MOST_SEED, PREDICTORS, PRUNE_METHODS, PRUNE_METRICS
from ..models.errors import RequestError
from ..models.family import Kept, View


@dataclass(frozen=True)
class Prune:
    """How to prune; a property of a request.

    Source: PixelPrune. tau is the distance up to which two tokens still count as equal, as a share of 255: 0 drops
    exact repetitions only. Raises RequestError for values out of range.
    """

    # "pred_2d": prediction from the left, upper and upper-left neighbour; "raster", "serpentine": from the token before
    # it in that scan; "unique": the first of all equal tokens, anywhere. Baselines to measure accuracy against, which
    # keep as many as pred_2d: "random", and "conncomp" (about as many): an even share of every connected component
    method: str = "pred_2d"
    metric: str = "max"  # distance: the largest difference of a byte, their mean ("mae") or root mean square ("rmse")
    tau: float = 0.0  # 0 ... 1
    anchored: bool = True  # compare with the reconstruction, so errors cannot add up; False: with the raw neighbour
    max_tokens: int | None = None  # of an image: raise tau to the smallest that keeps no more (selector.py)
    seed: int = 0  # of the baselines

    def __post_init__(self) -> None:
        plain = {"tau": number("tau", self.tau, "a number from 0 to 1", 0, 1)}
        plain["seed"] = integer("seed", self.seed, 0, MOST_SEED)
        if self.max_tokens is not None:
            plain["max_tokens"] = integer("max_tokens", self.max_tokens, 1)
        for name, value in plain.items():  # of numpy's types, too
            object.__setattr__(self, name, value)
        if not isinstance(self.anchored, bool):
            raise RequestError(f"anchored is {self.anchored!r}, expected True or False")
        if not isinstance(self.method, str) or self.method not in PRUNE_METHODS:
            raise RequestError(f"method is {self.method!r}, expected one of: {', '.join(PRUNE_METHODS)}")
        if not isinstance(self.metric, str) or self.metric not in PRUNE_METRICS:
            raise RequestError(f"metric is {self.metric!r}, expected one of: {', '.join(PRUNE_METRICS)}")
        if self.method == "unique" and (self.metric, self.tau, self.anchored) != ("max", 0, True):
            raise RequestError(
                f"method 'unique' has metric {self.metric!r}, tau {self.tau:g} and anchored {self.anchored}, expected "
                "'max', 0 and True: it drops copies only"
            )
        if self.max_tokens is not None and self.method not in PREDICTORS:
            raise RequestError(f"max_tokens goes with {', '.join(PREDICTORS)}, found method {self.method!r}")

    def threshold(self, block: int) -> int:
        """The largest distance that counts as equal, as the graphs take it (exporters/pruners/metrics.py).

        For tokens of ``block`` x ``block`` pixels: the largest difference of a byte, the sum of all differences, or the
        sum of their squares.
        """
        count, level = 3 * block**2, 255 * self.tau
        return int({"max": level, "mae": level * count, "rmse": level**2 * count}[self.metric] + 1e-6)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens of one image are kept."""

    keep: np.ndarray  # int32 [K], rising indices into the N tokens of the full grid
    rows: int  # of the full grid, in merged tokens
    cols: int
    width: int  # of the resized image, in pixels
    height: int
    reason: str  # why nothing was pruned, or why not as asked; empty otherwise
    prune: Prune | None  # as it was used: with the tau that max_tokens led to; None where pruning is off

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


def check_prune(prune: object, also: str = "") -> Prune | None:
    """``prune`` if it is a Prune or None; raises RequestError (``also``: what else the caller takes)."""
    if prune is not None and not isinstance(prune, Prune):
        raise RequestError(f"prune is {prune!r:.80}, expected ppexport.Prune(...), None (off){also}")
    return prune
