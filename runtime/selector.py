"""Image -> Selection: runs the pruning graphs (exporters/pruners/pixelprune.py, temporal.py) on a backend."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.checks import integer
from ..models.errors import RequestError
from ..models.family import Views
from ..models.pruners import Pruner, listed
from ..models.pruners.pixelprune import PREDICTORS, SELECTOR_BLOCKS, PixelPrune, graph_name
from .backends.session import Backend, Buffer, Session, run
from .image import MAX_PIXELS, MIN_PIXELS, ImageLike, cut, prepare, smart_resize
from .prune import Dropped, PruningGraphs, Selection

# values of tau that max_tokens chooses from: multiples of 1 / LEVELS
LEVELS = {"max": 255, "mae": 2040, "rmse": 2040}
NOTHING = dict.fromkeys(PREDICTORS, "no token repeats its neighbours")  # why all tokens are kept
NOTHING |= dict.fromkeys(
    ("random", "conncomp"), "no token repeats its neighbours, and pred_2d says how many to keep"
)
NOTHING["unique"] = "no token occurs twice"
# tau that max_tokens goes up to: beyond it, text of low contrast would be taken for its background
HIGHEST = 0.25


@dataclass(frozen=True)
class Found:
    """What a pruning graph says of an image."""

    order: Buffer  # int32 [N], the kept ones and then the dropped ones
    count: int
    prune: PixelPrune | None  # with the tau that was used
    distance: Buffer | None = None  # int32 [N], where tokens are predicted
    reason: str = ""


class Selector:
    """The pruning graphs of a folder on a backend.

    ``block``: pixels per side of a merged token; ``dialect``: what the graphs are written in (those of "ort" calculate
    on bytes, and come in two forms).
    """

    def __init__(self, backend: Backend, folder: Path, block: int, dialect: str = "ort"):
        self.backend = backend
        self.block = block
        self.graphs = PruningGraphs(backend, folder, backend.byte_max or dialect != "ort")
        self.session = self.graphs.session
        self.session(PixelPrune().graph)  # the usual one is loaded at once

    def select(
        self, image: Buffer, prune: Pruner | Sequence[Pruner] | None, worth: float = 0.0
    ) -> tuple[Buffer, Selection]:
        """image uint8 [H, W, 3] on the backend -> the keep indices there (int32 [K]) and what was decided.

        Of several pruners, what all of them keep is kept. Where less than the share ``worth`` of the tokens would be
        dropped, all are kept, and the selection says so. Raises RequestError for a ``prune`` that is none.
        """
        named = listed(prune)
        pruners = [pruner for pruner in named if pruner.after == "image"]
        total = self._total(image)
        if not pruners:
            reason = "" if named else "pruning is off"
            return self._selection(image, Found(self._all(total), total, None, reason=reason))
        pixel = next((pruner for pruner in pruners if isinstance(pruner, PixelPrune)), None)
        others = tuple(pruner for pruner in pruners if not isinstance(pruner, PixelPrune))
        found = Found(self._all(total), total, None)
        if pixel is not None:
            found = self._choose(image, pixel)
        if others:
            found = self._both(image, found, others)
        dropped = total - found.count
        fits = pixel is None or pixel.max_tokens is None or total <= pixel.max_tokens
        if not dropped:
            reason = NOTHING[pixel.method] if pixel is not None and not others else "nothing could be dropped"
            found = replace(found, reason=reason)
        elif dropped < worth * total and fits:
            reason = f"only {dropped} of {total} tokens could be dropped, which saves nothing"
            found = replace(found, order=self._all(total), count=total, reason=reason)
        return self._selection(image, found, others)

    def looks(
        self,
        frames: Sequence[np.ndarray],
        shown: Views,
        prune: Pruner | Sequence[Pruner] | None,
        worth: float = 0.0,
    ) -> list[tuple[Buffer, Buffer, Selection]]:
        """``select`` for every view of an image: its pixels and its keep indices on the backend, and what was decided.

        ``keep`` of a selection holds what the tower sees, padding of the view included. Raises RequestError for
        max_tokens where there are several views.
        """
        for pruner in listed(prune):
            if isinstance(pruner, PixelPrune) and pruner.max_tokens is not None and len(shown.views) > 1:
                raise RequestError(
                    f"max_tokens of PixelPrune (--max-tokens) is {pruner.max_tokens}, expected none for an image in "
                    f"{len(shown.views)} views; PruneSID (--prunesid) shares a budget among them"
                )
        found = []
        for view in shown.views:
            pixels = self.backend.upload(cut(frames, view))
            found.append((pixels, *self.select(pixels, prune, worth)))
        return found

    def _both(self, image: Buffer, found: Found, others: Sequence[Pruner]) -> Found:
        """What is kept already and by all the others."""
        total = self._total(image)
        kept = np.zeros(total, bool)
        kept[self.backend.download(found.order)[: found.count]] = True
        for pruner in others:
            order, count = self._run(image, self.session(pruner.graph), pruner.inputs(self.block))[:2]
            left = np.zeros(total, bool)
            left[self.backend.download(order)[:count]] = True
            kept &= left
        kept[0] = True  # a prompt needs one
        return replace(
            found, order=self._order(total, np.flatnonzero(kept)), count=int(kept.sum()), distance=None
        )

    def frames(self, images: Iterable[Buffer], prune: PixelPrune) -> Iterator[Selection]:
        """Frames of one recording, uint8 [H, W, 3] of one size -> what is kept of each (exporters/pruners/temporal.py).

        The first one is an image like any other; of the others, tokens that are what they were before are dropped too,
        in a frame that stands still all of them. Raises RequestError for a method other than pred_2d and for a budget.
        """
        if prune.method != "pred_2d" or prune.max_tokens is not None:
            found = (
                f"method {prune.method!r}" if prune.max_tokens is None else f"max_tokens {prune.max_tokens}"
            )
            raise RequestError(f"frames are predicted by pred_2d with a fixed tau, found {found}")
        return self._frames(images, prune)

    def _frames(self, images: Iterable[Buffer], prune: PixelPrune) -> Iterator[Selection]:
        session = self.session(graph_name("temporal", prune.metric))
        reference = None
        for image in images:
            order = self._numbers(self._total(image))
            count = self._numbers(1)
            shown = self.backend.zeros(image.shape, "uint8")
            values = {
                "threshold": prune.threshold(self.block),
                "anchored": prune.anchored,
                "first": reference is None,
            }
            inputs = {"image": image, "reference": image if reference is None else reference}
            inputs |= self.graphs.settings(session, values)
            run(session, inputs, {"order": order, "count": count, "shown": shown})
            found = Found(order, self._read(count), prune)
            reference = shown
            if found.count == self._total(image):
                found = replace(found, reason=NOTHING["pred_2d"])
            yield self._selection(image, found)[1]

    def _choose(self, image: Buffer, prune: PixelPrune) -> Found:
        """Run the graph, for the baselines after that of pred_2d, which says how many to keep."""
        if prune.method not in ("random", "conncomp"):
            return self._fit(image, prune) if prune.max_tokens else self._predict(image, prune)
        count = self._predict(image, replace(prune, method="pred_2d")).count
        if prune.method == "conncomp":
            return self._predict(image, prune, target=count)
        total = self._total(image)
        others = 1 + np.random.default_rng(prune.seed).choice(total - 1, count - 1, replace=False)
        return Found(self._order(total, np.concatenate([[0], others])), count, prune)

    def _fit(self, image: Buffer, prune: PixelPrune) -> Found:
        """With the smallest tau from ``prune.tau`` on that keeps at most ``max_tokens``, by bisection.

        That is exact where a larger tau never keeps more, which drifting pictures can break by a few tokens. If HIGHEST
        keeps too many: the tokens that lie farthest from what predicts them at ``prune.tau``.
        """
        assert prune.max_tokens is not None
        most = prune.max_tokens
        steps = LEVELS[prune.metric]
        at = lambda level: self._predict(image, replace(prune, tau=level / steps))  # noqa: E731
        first = self._predict(image, prune)
        if first.count <= most:
            return first
        highest = max(prune.tau, HIGHEST)
        low = int(prune.tau * steps)
        high = int(highest * steps)  # keeps too many, fits
        best = at(high) if high > low else first
        if best.count > most:
            assert first.distance is not None
            reason = f"tau {highest:g} would keep {best.count} tokens, expected at most {most}; kept are the {most} "
            reason += "that differ most from their prediction"
            distance = self.backend.download(first.distance).astype(np.int64)
            distance[0] = np.iinfo(np.int64).max  # the first token is predicted from nothing
            kept = np.argsort(-distance, kind="stable")[:most]
            return Found(self._order(self._total(image), kept), most, prune, reason=reason)
        while high - low > 1:
            middle = (low + high) // 2
            tried = at(middle)
            if tried.count <= most:
                high = middle
                best = tried
            else:
                low = middle
        return best

    def _predict(self, image: Buffer, prune: PixelPrune, target: int = 0) -> Found:
        inputs = {**prune.inputs(self.block), "target": target}
        order, count, outputs = self._run(image, self.session(prune.graph), inputs)
        return Found(order, count, prune, outputs.get("distance"))

    def _run(
        self, image: Buffer, session: Session, given: Mapping[str, int | range]
    ) -> tuple[Buffer, int, dict[str, Buffer]]:
        """Order, count and all outputs of a graph; of ``given``, what it takes."""
        total = self._total(image)
        inputs = self.graphs.settings(session, given)
        outputs = {name: self._numbers(1 if name == "count" else total) for name in session.outputs}
        run(session, {"image": image, **inputs}, outputs)
        return outputs["order"], self._read(outputs["count"]), outputs

    def _selection(
        self, image: Buffer, found: Found, others: tuple[Pruner, ...] = ()
    ) -> tuple[Buffer, Selection]:
        used = [pruner.name for pruner in (found.prune, *others) if pruner is not None]
        total = self._total(image)
        dropped = (Dropped(", ".join(used), total - found.count, found.reason),) if used else ()
        keep = found.order.rows(0, found.count)
        host = self.backend.download(keep).copy()
        host.flags.writeable = False
        height, width, _ = image.shape
        rows = height // self.block
        cols = width // self.block
        return keep, Selection(host, rows, cols, width, height, found.reason, found.prune, others, dropped)

    def _total(self, image: Buffer) -> int:
        height, width, _ = image.shape
        return (height // self.block) * (width // self.block)

    def _all(self, total: int) -> Buffer:
        return self.backend.upload(np.arange(total, dtype=np.int32))

    def _order(self, total: int, kept: np.ndarray) -> Buffer:
        """The kept indices and then the others, both rising."""
        dropped = np.ones(total, bool)
        dropped[kept] = False
        return self.backend.upload(np.argsort(dropped, kind="stable").astype(np.int32))

    def _numbers(self, count: int) -> Buffer:
        return self.backend.zeros((count,), "int32")

    def _read(self, counter: Buffer) -> int:
        return int(self.backend.download(counter)[0])


class HostSelector:
    """Prunes on the host for a pipeline on another device, with any method: what it gives is brought to ``backend``."""

    def __init__(self, backend: Backend, block: int):
        self.backend = backend
        self.on_host = packaged_selector(block)

    def looks(
        self,
        frames: Sequence[np.ndarray],
        shown: Views,
        prune: Pruner | Sequence[Pruner] | None,
        worth: float = 0.0,
    ) -> list[tuple[Buffer, Buffer, Selection]]:
        """As Selector.looks."""
        found = []
        for pixels, _, selection in self.on_host.looks(frames, shown, prune, worth):
            image = self.backend.upload(self.on_host.backend.download(pixels))
            found.append((image, self.backend.upload(selection.keep), selection))
        return found


@functools.lru_cache(maxsize=len(SELECTOR_BLOCKS))
def packaged_selector(block: int) -> Selector:
    """The selector that ships with the package, on the CPU. Raises RequestError for a block size without one."""
    from .backends.ort import OrtCpu

    if block not in SELECTOR_BLOCKS:
        raise RequestError(
            f"patch * merge is {block}, expected one of: {', '.join(map(str, SELECTOR_BLOCKS))}"
        )
    return Selector(OrtCpu(), Path(__file__).parent / "selectors" / str(block), block)


def select(
    image: ImageLike,
    prune: Pruner | Sequence[Pruner] | None = PixelPrune(),  # noqa: B008 (frozen)
    patch: int = 16,
    merge: int = 2,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Selection:
    """What would be kept of an image, without a model.

    ``image``: a path, the bytes of a file, a PIL image or a uint8 array [H, W, 3]; it is resized as for a model with
    these patch and merge sizes and pixel limits (defaults: Qwen3-VL). Raises ImageError, RequestError.
    """
    later = [pruner.name for pruner in listed(prune) if pruner.after != "image"]
    if later:
        raise RequestError(
            f"select looks at pixels, found {', '.join(later)}, which looks at features; use select_tokens for it"
        )
    selector = packaged_selector(integer("patch", patch, 1) * integer("merge", merge, 1))
    pixels = prepare(image, selector.block, min_pixels, max_pixels)
    return selector.select(selector.backend.upload(pixels), prune)[1]


def select_frames(
    frames: Iterable[ImageLike],
    prune: PixelPrune = PixelPrune(),  # noqa: B008 (frozen)
    patch: int = 16,
    merge: int = 2,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Selection]:
    """What would be kept of each frame of a recording: tokens that are what they were in the frame before go too.

    Arguments as for ``select``; frames are taken one by one. ``keep`` of a frame that stands still is empty. Raises
    ImageError, and RequestError for frames of several sizes, and for a ``prune`` that is not pred_2d with a fixed tau.
    """
    if not isinstance(prune, PixelPrune):
        raise RequestError(f"prune is {prune!r:.80}, expected ppexport.PixelPrune(...)")
    if isinstance(frames, (str, bytes, os.PathLike, Image.Image)) or not isinstance(frames, Iterable):
        raise RequestError(f"frames is a {type(frames).__name__}, expected a list of images")
    selector = packaged_selector(integer("patch", patch, 1) * integer("merge", merge, 1))
    # the limits, before any frame
    smart_resize(selector.block, selector.block, selector.block, min_pixels, max_pixels)

    def prepared() -> Iterator[Buffer]:
        first: tuple[int, ...] | None = None
        for i, frame in enumerate(frames, 1):
            pixels = prepare(frame, selector.block, min_pixels, max_pixels)
            first = first or pixels.shape
            if pixels.shape != first:
                raise RequestError(
                    f"frame {i} has {pixels.shape[1]} x {pixels.shape[0]} pixels after resizing, expected "
                    f"{first[1]} x {first[0]} like the first one"
                )
            yield selector.backend.upload(pixels)

    return selector.frames(prepared(), prune)
