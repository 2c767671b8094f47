"""Which merged tokens of an image are kept: the request (Prune), the graph that decides, the result (Selection)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.checks import integer, number
from ..models.config import PRUNE_METHODS, PRUNE_METRICS, SELECTOR_BLOCKS, prune_file
from ..models.errors import RequestError
from .image import ImageLike, prepare
from .session import Backend, Buffer, Session, run

METHODS = (*PRUNE_METHODS, "random")


@dataclass(frozen=True)
class Prune:
    """How to prune; a property of a request.

    Source: PixelPrune. tau is the distance up to which two tokens still count as equal, as a share of 255: 0 drops
    exact repetitions only. Raises RequestError for values out of range.
    """

    # "pred_2d": prediction from the left, upper and upper-left neighbour; "raster", "serpentine": from the token before
    # it in that scan; "unique": the first of all equal tokens, anywhere; "random": as many as pred_2d
    method: str = "pred_2d"
    metric: str = "max"  # distance: the largest difference of a byte, their mean ("mae") or root mean square ("rmse")
    tau: float = 0.0  # 0 ... 1
    anchored: bool = True  # compare with the reconstruction, so errors cannot add up; False: with the raw neighbour
    seed: int = 0  # of method "random", a baseline to measure accuracy against

    def __post_init__(self) -> None:
        number("tau", self.tau, "a number from 0 to 1", 0, 1)
        integer("seed", self.seed)
        if not isinstance(self.anchored, bool):
            raise RequestError(f"anchored is {self.anchored!r}, expected True or False")
        if self.method not in METHODS:
            raise RequestError(f"method is {self.method!r}, expected one of: {', '.join(METHODS)}")
        if self.metric not in PRUNE_METRICS:
            raise RequestError(f"metric is {self.metric!r}, expected one of: {', '.join(PRUNE_METRICS)}")
        if self.method == "unique" and (self.metric, self.tau) != ("max", 0):
            raise RequestError(
                f"method 'unique' has metric {self.metric!r} and tau {self.tau}, expected 'max' and 0: it drops copies"
            )

    def threshold(self, block: int) -> int:
        """The largest distance that counts as equal, as the graphs take it (exporters/metrics.py).

        For tokens of ``block`` x ``block`` pixels: the largest difference of a byte, the sum of all differences, or the
        sum of their squares.
        """
        count, level = 3 * block**2, 255 * self.tau
        return int({"max": level, "mae": level * count, "rmse": level**2 * count}[self.metric] + 1e-6)


@dataclass(frozen=True)
class Selection:
    """Which tokens of one image are kept."""

    keep: np.ndarray  # int32 [K], rising indices into the N tokens of the full grid
    rows: int  # of the full grid, in merged tokens
    cols: int
    width: int  # of the resized image, in pixels
    height: int
    reason: str  # why nothing was pruned; empty where something was

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


def check_prune(prune: object, also: str = "") -> Prune | None:
    """``prune`` if it is a Prune or None; raises RequestError (``also``: what else the caller takes)."""
    if prune is not None and not isinstance(prune, Prune):
        raise RequestError(f"prune is {prune!r:.80}, expected ppexport.Prune(...), None (off){also}")
    return prune


class Selector:
    """The pruning graphs of a folder on a backend. ``block``: pixels per side of a merged token."""

    def __init__(self, backend: Backend, folder: Path, block: int):
        self.backend, self.folder, self.block = backend, folder, block
        self._sessions: dict[str, Session] = {}
        self.session("pred_2d", "max")  # the usual one is loaded at once

    def session(self, method: str, metric: str) -> Session:
        """The graph of a method and a metric, loaded when it is first asked for."""
        file = prune_file(method, metric)
        if file not in self._sessions:
            self._sessions[file] = self.backend.session(self.folder / file)
        return self._sessions[file]

    def select(self, image: Buffer, prune: Prune | None, worth: float = 0.0) -> tuple[Buffer, Selection]:
        """image uint8 [H, W, 3] on the backend -> the keep indices there (int32 [K]) and what was decided.

        Where less than the share ``worth`` of the tokens would be dropped, all are kept, and the selection says so.
        """
        height, width, _ = image.shape
        rows, cols = height // self.block, width // self.block
        total = rows * cols
        if prune is None:
            order, count, reason = self._all(total), total, "pruning is off"
        else:
            order, count = self._predict(image, prune, total)
            reason = "no token repeats its neighbours" if count == total else ""
            if 0 < total - count < worth * total:
                reason = f"only {total - count} of {total} tokens repeat their neighbours, which saves nothing"
                order, count = self._all(total), total
        keep = order.rows(0, count)
        host = self.backend.download(keep).copy()
        host.flags.writeable = False
        return keep, Selection(host, rows, cols, width, height, reason)

    def _all(self, total: int) -> Buffer:
        return self.backend.upload(np.arange(total, dtype=np.int32))

    def _predict(self, image: Buffer, prune: Prune, total: int) -> tuple[Buffer, int]:
        """Run the graph: order int32 [N] on the backend and the count."""
        order, counter = self.backend.zeros((total,), "int32"), self.backend.zeros((1,), "int32")
        session = self.session("pred_2d" if prune.method == "random" else prune.method, prune.metric)
        threshold, anchored = (
            self.backend.upload(np.array([n], np.int32)) for n in (prune.threshold(self.block), prune.anchored)
        )
        inputs = {"image": image, "threshold": threshold, "anchored": anchored}
        run(session, {name: inputs[name] for name in session.inputs}, {"order": order, "count": counter})
        count = int(self.backend.download(counter)[0])
        if prune.method == "random":
            order = self.backend.upload(_random_order(total, count, prune.seed))
        return order, count


def _random_order(total: int, count: int, seed: int) -> np.ndarray:
    """Token 0 and count - 1 others drawn without replacement, rising: int32 [count]."""
    others = 1 + np.random.default_rng(seed).choice(total - 1, count - 1, replace=False)
    return np.sort(np.concatenate([[0], others])).astype(np.int32)


@functools.lru_cache(maxsize=len(SELECTOR_BLOCKS))
def packaged_selector(block: int) -> Selector:
    """The selector that ships with the package, on the CPU. Raises RequestError for a block size without one."""
    from .ort import OrtCpu

    if block not in SELECTOR_BLOCKS:
        raise RequestError(f"patch * merge is {block}, expected one of: {', '.join(map(str, SELECTOR_BLOCKS))}")
    return Selector(OrtCpu(), Path(__file__).parent / "selectors" / str(block), block)


def select(
    image: ImageLike,
    prune: Prune | None = Prune(),
    patch: int = 16,
    merge: int = 2,
    min_pixels: int = 65536,
    max_pixels: int = 16777216,
) -> Selection:
    """What would be kept of an image, without a model.

    ``image``: a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3]; it is resized as for a model with
    these patch and merge sizes and pixel limits (defaults: Qwen3-VL). Raises ImageError, RequestError.
    """
    check_prune(prune)
    selector = packaged_selector(integer("patch", patch, 1) * integer("merge", merge, 1))
    pixels = prepare(image, selector.block, min_pixels, max_pixels)
    return selector.select(selector.backend.upload(pixels), prune)[1]
