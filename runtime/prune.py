"""What is kept of an image, and the pruners that look at features; those that look at pixels are in selector.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..models.checks import integer
from ..models.errors import RequestError
from ..models.family import Kept, View
from ..models.pruners import Pruner
from ..models.pruners.pixelprune import PixelPrune, prune_file
from ..models.pruners.prunesid import PruneSID
from ..models.start_block import start_block
from .backends.session import Backend, Buffer, Session, run


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
    """Which tokens of one image are kept."""

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
    """What pruners leave of features [1 + L, K, D]."""

    features: Buffer  # [1 + L, K', D]
    rows: np.ndarray  # int32 [K'], of the K; they rise, unless a pruner was asked for another order
    dropped: tuple[Dropped, ...]
    groups: Groups | None  # by row


class FeaturePruners:
    """The graphs of a bundle that drop tokens behind the vision tower. ``block``: pixels per side of a merged token."""

    def __init__(self, backend: Backend, folder: Path, block: int):
        self.backend = backend
        self.block = block
        self.graphs = PruningGraphs(backend, folder)

    def prune(self, features: Buffer, pruners: Sequence[Pruner]) -> Left:
        """features [1 + L, K, D] -> what all ``pruners`` leave of them, one after the other.

        Raises RequestError for more tokens than one takes.
        """
        rows = np.arange(features.shape[1], dtype=np.int32)
        dropped = []
        groups = None
        for pruner in pruners:
            reason = pruner.idle(len(rows))
            before = len(rows)
            if not reason:
                features, left, group = self._one(features, pruner)
                groups = groups if group is None else Groups(rows, group)
                rows = rows[left]
            dropped.append(Dropped(pruner.name, before - len(rows), reason))
        return Left(features, rows, tuple(dropped), groups)

    def _one(self, features: Buffer, pruner: Pruner) -> tuple[Buffer, np.ndarray, np.ndarray | None]:
        """What one pruner leaves: features, their rows, and the groups of all tokens where it makes some."""
        session = self.graphs.session(pruner.graph)
        levels, K, width = features.shape
        given = self.graphs.settings(session, pruner.inputs(self.block))
        outputs = {name: self.backend.zeros((K,), "int32") for name in session.outputs}
        outputs["count"] = self.backend.zeros((1,), "int32")
        outputs["pruned"] = self.backend.zeros(features.shape, features.dtype)
        run(session, {"features": features, **given}, outputs)
        n = int(self.backend.download(outputs["count"])[0])
        left = self.backend.zeros((levels, n, width), features.dtype)
        self.backend.copy_into(left, 0, outputs["pruned"], n)
        group = self.backend.download(outputs["group"]).copy() if "group" in outputs else None
        return left, self.backend.download(outputs["order"].rows(0, n)).copy(), group


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
