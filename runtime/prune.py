"""What is kept of an image, and the pruners that look at features; those that look at pixels are in selector.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..models.checks import integer
from ..models.errors import RequestError
from ..models.family import Frame, Kept, View, Views
from ..models.pruners import Pruner
from ..models.pruners.pixelprune import PixelPrune, prune_file
from ..models.pruners.prunesid import INFORMATION, PruneSID
from ..models.start_block import start_block
from .backends.session import Backend, Buffer, Session, run
from .vision import Seen


@dataclass(frozen=True)
class Dropped:
    """What one pruner did to an image."""

    pruner: str  # its name; of several that looked at the pixels together, all
    tokens: int  # that it dropped
    reason: str = ""  # why none, or why not as asked


@dataclass(frozen=True, eq=False)
class Groups:
    """What tokens the vision tower saw of an image, and into which semantic groups they fell."""

    seen: np.ndarray  # int32 [K], indices into the N tokens of the full grid, rising
    group: np.ndarray  # int32 [K], of each of them; 0 is that of the strongest component


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens are kept of one image, or of one view of an image that is shown in several."""

    # int32 [K], indices into the N tokens of the full grid; they rise, unless PruneSID was asked for another order
    keep: np.ndarray
    rows: int  # of the full grid, in merged tokens
    cols: int
    width: int  # of the resized image, in pixels
    height: int
    reason: str  # why nothing was pruned, or why not as asked; empty otherwise
    prune: PixelPrune | None  # as it was used: with the tau that max_tokens led to; None where it is off
    others: tuple[Pruner, ...] = ()  # further pruners that were used
    dropped: tuple[Dropped, ...] = ()  # by each pruner, in the order that they ran
    groups: Groups | None = None  # where PruneSID chose
    number: int = 0  # of the view, counted from 0 for each image
    frame: Frame | None = None  # what the view is cut from; None: the whole image, resized
    view: View | None = None  # where

    @property
    def total(self) -> int:
        """N, the tokens of the full grid; of a view, those that show the image and not what was put around it."""
        if self.view is None or self.view.wanted is None:
            return self.rows * self.cols
        return self.view.wanted[2] * self.view.wanted[3]

    @property
    def kept(self) -> int:
        """K, the tokens that are kept."""
        return len(self.keep)

    @property
    def share(self) -> float:
        """K / N."""
        return self.kept / self.total

    def as_kept(self) -> Kept:
        """As of an image that is a single view of any size."""
        return Kept(self.keep, Views.whole(self.height, self.width, self.width // self.cols))


def kept_of(
    keeps: Sequence[np.ndarray], shown: Views, grouped: bool = False, class_tokens: bool = False
) -> Kept:
    """What is kept of all views of an image, int32 [K] of each."""
    starts = np.cumsum([0, *(view.total for view in shown.views)])
    counted = [keep + start for keep, start in zip(keeps, starts, strict=False)]
    return Kept(np.concatenate(counted).astype(np.int32), shown, grouped, class_tokens)


def order_of(left: Sequence[Left]) -> tuple[bool, bool]:
    """Of all views of an image: do tokens stand in the order of groups, and do class tokens stand before them?"""
    return any(view.grouped for view in left), any(view.class_tokens for view in left)


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
                    f"{self.folder}: has no graph for the pruner {graph}, expected {file}; its model has not what that "
                    "looks at, or an older ppexport built it"
                )
            self._sessions[file] = self.backend.session(self.folder / file)
        return self._sessions[file]

    def settings(self, session: Session, given: Mapping[str, int | range]) -> dict[str, Buffer]:
        """Of ``given`` what a graph takes, on the backend: int32 [n] each."""
        return {
            name: self.backend.upload(np.atleast_1d(np.array(value, np.int32)))
            for name, value in given.items()
            if name in session.inputs
        }


@dataclass(frozen=True, eq=False)
class Left:
    """What pruners leave of one view."""

    features: Buffer  # [1 + L, K', D], after the class token where ``class_tokens`` says so
    rows: (
        np.ndarray
    )  # int32 [K'] without that, of the K; they rise, unless a pruner was asked for another order
    dropped: tuple[Dropped, ...]
    groups: Groups | None  # by row
    grouped: bool = False  # are they in the order of groups?
    class_tokens: bool = False


class FeaturePruners:
    """The graphs of a bundle that drop tokens behind the vision tower. ``block``: pixels per side of a merged token."""

    def __init__(self, backend: Backend, folder: Path, block: int):
        self.backend = backend
        self.block = block
        self.graphs = PruningGraphs(backend, folder)

    def prune(self, seen: Sequence[Seen], pruners: Sequence[Pruner]) -> list[Left]:
        """What all ``pruners`` leave of each view of an image, one after the other.

        Raises RequestError for more tokens than one takes, and for a budget that has not a token for each view.
        """
        left = [
            Left(view.features, np.arange(view.features.shape[1], dtype=np.int32), (), None) for view in seen
        ]
        for pruner in pruners:
            settings = self._for_views(pruner, seen, [len(view.rows) for view in left])
            grouped = isinstance(pruner, PruneSID) and pruner.order == "reference"
            with_class = isinstance(pruner, PruneSID) and pruner.class_tokens
            left = [
                self._one(view, of, own, grouped, with_class)
                for view, of, own in zip(left, seen, settings, strict=True)
            ]
        return left

    def load(self, pruners: Sequence[Pruner]) -> None:
        """Load every graph that these may run. Raises RequestError where the folder lacks one."""
        for pruner in pruners:
            if pruner.after == "vision":
                self.graphs.session(pruner.graph)
            if isinstance(pruner, PruneSID) and pruner.share == "information":
                self.graphs.session(INFORMATION)

    def information(self, view: Seen) -> float:
        """How little the tokens of a view resemble each other: 1 - their mean cosine."""
        session = self.graphs.session(INFORMATION)
        found = self.backend.zeros((1,), "float32")
        looked = {"features": view.features, **view.others}
        run(session, {name: looked[name] for name in session.inputs}, {"information": found})
        return float(self.backend.download(found)[0])

    def _for_views(self, pruner: Pruner, seen: Sequence[Seen], tokens: Sequence[int]) -> Sequence[Pruner]:
        """The settings for each view, with what the class token leaves of its budget."""
        if not isinstance(pruner, PruneSID):
            return [pruner] * len(seen)
        by_information = pruner.share == "information" and len(seen) > 1
        found = pruner.for_views(tokens, [self.information(view) for view in seen] if by_information else [])
        return [replace(own, max_tokens=own.max_tokens - own.class_tokens) for own in found]

    def _one(self, left: Left, seen: Seen, pruner: Pruner, grouped: bool, with_class: bool) -> Left:
        """What one more pruner leaves of a view."""
        tokens = len(left.rows)
        reason = pruner.idle(tokens)
        if reason:
            dropped = (*left.dropped, Dropped(pruner.name, 0, reason))
            features = self._with_class(left.features, tokens, seen) if with_class else left.features
            return replace(left, features=features, dropped=dropped, class_tokens=with_class, grouped=grouped)
        session = self.graphs.session(pruner.graph)
        if left.dropped and "hidden" in session.inputs:
            raise RequestError(
                f"{pruner.name} comes after {left.dropped[-1].pruner}, expected it to be the first"
            )
        looked = {"features": left.features, **seen.others}
        inputs = {name: looked[name] for name in session.inputs if name in looked}
        inputs |= self.graphs.settings(session, pruner.inputs(self.block))
        outputs = {name: self.backend.zeros((tokens,), "int32") for name in session.outputs}
        outputs["count"] = self.backend.zeros((1,), "int32")
        outputs["pruned"] = self.backend.zeros(left.features.shape, left.features.dtype)
        run(session, inputs, outputs)
        n = int(self.backend.download(outputs["count"])[0])
        order = self.backend.download(outputs["order"].rows(0, n)).copy()
        groups = left.groups
        if "group" in outputs:
            groups = Groups(left.rows, self.backend.download(outputs["group"]).copy())
        return Left(
            self._with_class(outputs["pruned"], n, seen if with_class else None),
            left.rows[order],
            (*left.dropped, Dropped(pruner.name, tokens - n)),
            groups,
            grouped,
            with_class,
        )

    def _with_class(self, features: Buffer, n: int, seen: Seen | None) -> Buffer:
        """The first ``n`` of features [1 + L, K, D], after the view's class token if one is given."""
        levels, _, width = features.shape
        first = seen.others["class_feature"] if seen is not None else None
        found = self.backend.zeros((levels, n + (first is not None), width), features.dtype)
        if first is not None:
            self.backend.copy_into(found, 0, first)
        self.backend.copy_into(found, found.shape[1] - n, features, n)
        return found


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Which features are kept, of any model."""

    keep: np.ndarray  # int32 [K], indices into the T tokens, in the order that was asked for
    group: np.ndarray  # int32 [T], the semantic group of each token; 0 is that of the strongest component

    @property
    def total(self) -> int:
        """T."""
        return len(self.group)

    @property
    def kept(self) -> int:
        """K."""
        return len(self.keep)


def select_tokens(
    features: np.ndarray, prune: PruneSID, score: np.ndarray | None = None, threads: int = 0
) -> TokenSelection:
    """What PruneSID would keep of features float [T, C], without a model.

    ``score`` float [T]: for the variant "llava", how important each token is (the attention that the class token pays
    it); "auto" is "llava" where it is given, else "qwen". ``threads``: 0 for one per core; what is kept does not depend
    on them. Raises RequestError.
    """
    if not isinstance(prune, PruneSID):
        raise RequestError(f"prune is {prune!r:.80}, expected ppexport.PruneSID(...)")
    x = _floats("features", features, 2)
    T, C = x.shape
    prune.idle(T)
    variant = ("qwen" if score is None else "llava") if prune.variant == "auto" else prune.variant
    prune = replace(prune, variant=variant)
    if (variant == "llava") != (score is not None):
        raise RequestError(
            f"variant {variant!r} {'takes no' if score is not None else 'needs a'} score for each token"
        )
    inputs = {"features": x[None], "start": start_block(C)}
    if score is not None:
        inputs["score"] = _floats("score", score, 1)
        if inputs["score"].shape != (T,):
            raise RequestError(f"score has shape {inputs['score'].shape}, expected [{T}], one for each token")
    graphs = _packaged(integer("threads", threads))
    session = graphs.session(f"prunesid.{variant}")
    backend = graphs.backend
    given = graphs.settings(session, prune.inputs(0))
    outputs = {name: backend.zeros((1 if name == "count" else T,), "int32") for name in session.outputs}
    run(session, {**given, **{name: backend.upload(value) for name, value in inputs.items()}}, outputs)
    order, count, group = (backend.download(outputs[name]).copy() for name in ("order", "count", "group"))
    return TokenSelection(order[: count[0]], group)


@functools.cache
def _packaged(threads: int) -> PruningGraphs:
    """The graphs on features that ship with the package, on the CPU."""
    from .backends.ort import OrtCpu

    return PruningGraphs(OrtCpu(threads), Path(__file__).parent / "selectors" / "features")


def _floats(name: str, value: np.ndarray, axes: int) -> np.ndarray:
    """As float32; raises RequestError for another number of axes, nothing at all, and values that are not finite."""
    expected = f"expected floats {'[T, C]' if axes == 2 else '[T]'}, at least one of each"
    try:
        found = np.asarray(value)
    except Exception as err:  # whatever an array-like of another package raises
        raise RequestError(f"{name} cannot be read as an array ({err}), {expected}") from err
    is_number = found.dtype.kind in "fiu" or found.dtype.name == "bfloat16"
    if found.ndim != axes or not found.size or not is_number:
        raise RequestError(f"{name} has dtype {found.dtype} and shape {found.shape}, {expected}")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(found, np.float32)
    if not np.isfinite(found).all():
        raise RequestError(f"{name} holds values that are not finite in float32, expected finite ones")
    return found
