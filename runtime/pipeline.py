"""The whole path: image -> prune -> vision -> language -> text. Read this file first."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..models import prune_place
from ..models.checks import integer
from ..models.dtype import BY_PRECISION
from ..models.errors import BackendError, BundleError, RequestError
from ..models.families import FAMILIES
from ..models.family import Views
from ..models.manifest import Manifest
from ..models.pruners import Pruner, listed, of_family, pruners_of
from .answer import Answer, Speech, Steps
from .backends.devices import open_stages
from .backends.stages import Stages
from .bundle import open_bundle
from .engine import TOGETHER, Engine
from .grammar import Grammars, SchemaLike
from .image import ImageLike, frames_of
from .language import Language
from .messages import PromptLike, images_of, with_images
from .prune import FeaturePruners, Groups, Left, Selection, kept_of, order_of
from .reuse import Reuse, digest
from .sampling import Sampling
from .selector import HostSelector, Selector
from .sequence import Picture, PruneLike, Request, Sequence, Shown
from .stats import Stats
from .text import Text
from .vision import Seen, Vision

LOG = logging.getLogger(__name__)
WORTH = 0.02  # pruning that would drop less than this share of an image's tokens is left out
REUSE = 1 << 30  # bytes for what past requests computed
AHEAD = 16  # tokens that a sequence may be ahead of its reader while others run with it


@dataclass(frozen=True)
class Encoded:
    """One image after the vision tower."""

    features: np.ndarray  # [1 + L, K, D], all views; where the family has one, what ends its rows comes last
    selections: tuple[Selection, ...]  # of each view

    @property
    def selection(self) -> Selection:
        """Of the only view, or the first."""
        return self.selections[0]

    @property
    def keep(self) -> np.ndarray:
        """Which tokens are kept, int32 [K], counted through all views."""
        starts = np.cumsum([0, *(selection.rows * selection.cols for selection in self.selections)])
        found = [each.keep + start for each, start in zip(self.selections, starts, strict=False)]
        return np.concatenate(found).astype(np.int32)

    @property
    def embeds(self) -> np.ndarray:
        """Their embeddings [K, D]."""
        return self.features[0]

    @property
    def deepstack(self) -> np.ndarray:
        """What the first language layers take besides, [L, K, D]."""
        return self.features[1:]


class Pipeline:
    """A loaded bundle. Several threads may use one; their requests run together (runtime/engine.py)."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        stages: Stages,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        reuse: int = REUSE,
        together: int = TOGETHER,
        context: int | None = None,
    ):
        model = manifest.model
        dtype = BY_PRECISION[manifest.compute].name
        self.directory = directory
        self.manifest = manifest
        self.stages = stages
        self.backend = stages.language.backend  # all stages have its memory
        self.family = FAMILIES[manifest.family]
        self.prune = of_family(
            pruners_of(manifest.prune), model.vision.class_token
        )  # of requests that do not say
        self.chosen = stages.chosen  # where it runs, and why there
        pre = manifest.preprocessing
        self.preprocessing = replace(
            pre,
            min_pixels=pre.min_pixels if min_pixels is None else min_pixels,
            max_pixels=pre.max_pixels if max_pixels is None else max_pixels,
        )
        most = min(manifest.context, self.backend.capacity or manifest.context)
        self.context = most if context is None else integer("context", context, 2, most)
        self.feature_pruners = FeaturePruners(stages.prune, directory, model.vision.block)
        self.load_pruners()
        self.selector = self._selector() if model.sees else None
        dialect = manifest.graphs["language"].dialect
        # first: loading the largest graph takes the most memory
        self.language = Language(self.backend, stages.language.graph, model, dtype, dialect)
        tower = stages.vision
        self.vision = Vision(tower.backend, tower.graph, model, dtype) if tower else None
        self.reuse = Reuse(reuse, self.backend.capacity is not None, self.backend.appends) if reuse else None
        self.engine = Engine(self.language, self.vision, self.reuse, self.context, together)
        self.text: Text | None = None
        if manifest.interface == "text":
            self.text = Text(directory, model.image_token, manifest.special_tokens)
        self.backend.settle()

    def _selector(self) -> Selector | HostSelector:
        """Where it was measured to be faster, on the host; there with onnxruntime only."""
        backend = self.backend
        block = self.manifest.model.vision.block
        if backend.gpu and prune_place.place(self.directory, backend.device, backend.gpu) == "host":
            try:
                selector = HostSelector(backend, block)
                self.chosen += "; pixels are pruned on the host, which was measured to be faster"
                return selector
            except BackendError as err:
                text = f"pixels are pruned on the device, though the host was measured to be faster: {err}"
                LOG.warning(text)
                backend.notes.append(text)
        return Selector(self.stages.prune, self.directory, block, self.manifest.graphs["prune"].dialect)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory on the device; the pipeline cannot be used afterwards. ``with load(...)`` does so."""
        self.engine.close()
        for backend in self.stages.backends:
            backend.close()

    def generate(
        self,
        prompt: PromptLike,
        images: ImageLike | Several[ImageLike] = (),
        prune: PruneLike = "default",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        until: Several[str] = (),
        schema: SchemaLike | None = None,
    ) -> Answer:
        """Answer a question about images; iterate over the result for text, then read its ``stats``.

        ``prompt``: a question, or chat messages; ``images``: those that the messages do not hold themselves
        (messages.py says how they go together); ``prune``: "default" is what the bundle says, None keeps everything;
        ``until``: strings, before the first of which the answer ends; ``schema``: a JSON schema, as an object or as
        text: the answer is JSON that matches it, as far as ``max_new_tokens`` reach. Images and prompt are checked
        before this returns. Raises ImageError, RequestError, and BundleError for a bundle that only takes token ids.
        """
        request = Request(
            prompt, images, prune, max_new_tokens, temperature, top_p, top_k, seed, until, schema
        )
        sequence = self.prepare(request)
        return self._answer(request, sequence, Steps(self.engine, sequence))

    def generate_batch(self, requests: Several[Request]) -> list[Answer]:
        """Answer several requests together, in the order of ``requests``; each answer is what it would be alone.

        All are checked before the first one runs. They run as long as any of the answers is read; ``text()`` of each
        waits for its end. Raises as ``generate``.
        """
        if isinstance(requests, (str, bytes, Request)) or not isinstance(requests, Iterable):
            raise RequestError(f"requests is {requests!r:.80}, expected a list of ppexport.Request(...)")
        requests = list(requests)
        sequences = [self.prepare(request, ahead=None) for request in requests]
        for sequence in sequences:
            self.engine.add(sequence)
        return [
            self._answer(request, sequence, Steps(self.engine, sequence, added=True))
            for request, sequence in zip(requests, sequences, strict=True)
        ]

    def generate_tokens(
        self,
        input_ids: Several[int] | np.ndarray,
        images: ImageLike | Several[ImageLike] = (),
        prune: PruneLike = "default",
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stats: Stats | None = None,
        stop: Collection[int] | None = None,
    ) -> Steps:
        """Generate from token ids [S] in which every image stands as N placeholders (its full grid).

        Yields one Step per token, the first from the prompt; the last may be a stop token (``stop``; None: those of the
        bundle). ``stats`` is filled if given. Raises ImageError, RequestError before the first step.
        """
        sequence = self.prepare_tokens(input_ids, images, prune, max_new_tokens, sampling, stats, stop)
        return Steps(self.engine, sequence)

    def encode(self, image: ImageLike, prune: PruneLike = "default") -> Encoded:
        """One image through prune and vision: which tokens are kept, and their features [1 + L, K, D]."""
        (picture,) = self._pictures([image], prune, Stats())
        return Encoded(self.backend.download(self.engine.features(picture)), picture.selections)

    def select(self, image: ImageLike, prune: PruneLike = "default") -> tuple[Selection, ...]:
        """What is kept of an image, of each view of it. The vision tower runs where a pruner looks at features."""
        (picture,) = self._pictures([image], prune, Stats())
        return picture.selections

    def prepare(self, request: Request, ahead: int | None = AHEAD, keeps_logits: bool = False) -> Sequence:
        """Stages image, prune and text: what ``Engine.add`` takes.

        ``ahead``: tokens that it may be ahead of its reader while others run; None: any number. ``keeps_logits``: with
        every token, its logits. Raises as ``generate``.
        """
        if self.text is None:
            raise BundleError(
                "this bundle has no tokenizer (its checkpoint had none), so it takes token ids only; "
                "use generate_tokens, or build it again with a tokenizer.json in the checkpoint"
            )
        if not isinstance(request, Request):
            raise RequestError(f"the request is {request!r:.80}, expected ppexport.Request(...)")
        stats = Stats()
        grammar = None if request.schema is None else self.grammars.grammar(request.schema)
        messages, shown = with_images(request.prompt, images_of(request.images))
        pictures = self._pictures(shown, request.prune, stats)
        with stats.stage("text"):
            ids = self.text.encode(messages, [picture.kept.shown.placeholders for picture in pictures])
        limit = request.max_new_tokens
        sequence = self._sequence(ids, pictures, request.sampling, limit, stats, None, ahead, keeps_logits)
        sequence.grammar = grammar
        return sequence

    def speech(self, request: Request) -> Speech:
        """What makes text of the tokens of a request's answer, once ``prepare`` has taken it."""
        assert self.text is not None
        return Speech(self.text, frozenset(self.manifest.stop_tokens), request.until)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """For answers by a schema; made when the first one is asked for. Raises BackendError without llguidance."""
        manifest = self.manifest
        return Grammars(self.directory / "tokenizer.json", manifest.model.text.vocab, manifest.stop_tokens)

    def prepare_tokens(
        self,
        input_ids: Several[int] | np.ndarray,
        images: ImageLike | Several[ImageLike] = (),
        prune: PruneLike = "default",
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stats: Stats | None = None,
        stop: Collection[int] | None = None,
        ahead: int | None = AHEAD,
        keeps_logits: bool = True,
    ) -> Sequence:
        """As ``prepare``, for what ``generate_tokens`` takes. ``keeps_logits``: with every token, its logits."""
        try:
            ids = np.asarray(input_ids)
        except ValueError as err:
            raise RequestError(f"input_ids is not a flat list ({err}), expected integers [S]") from err
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise RequestError(
                f"input_ids has dtype {ids.dtype} and shape {ids.shape}, expected integers [S], S > 0"
            )
        if stats is None:
            stats = Stats()
        elif not isinstance(stats, Stats) or stats.spans:
            raise RequestError("stats is not a fresh ppexport.Stats(), expected a new one for every request")
        if not isinstance(sampling, Sampling):
            raise RequestError(f"sampling is {sampling!r:.80}, expected ppexport.Sampling(...)")
        if stop is not None and not (isinstance(stop, Collection) and all(type(n) is int for n in stop)):
            raise RequestError(
                f"stop is {stop!r:.80}, expected a list of token ids, or None for those of the bundle"
            )
        pictures = self._pictures(images_of(images), prune, stats)
        return self._sequence(ids, pictures, sampling, max_new_tokens, stats, stop, ahead, keeps_logits)

    def pruners_of(self, prune: PruneLike) -> tuple[Pruner, ...]:
        """What a request's ``prune`` stands for. Raises RequestError."""
        if isinstance(prune, str) and prune == "default":
            return self.prune
        return of_family(listed(prune, " or 'default'"), self.manifest.model.vision.class_token)

    def load_pruners(self, prune: PruneLike = "default") -> None:
        """Load the graphs that prune features now, rather than with the first request that names them.

        Raises RequestError for what is no pruner, and where the bundle lacks a graph.
        """
        self.feature_pruners.load(self.pruners_of(prune))

    def information(self, image: ImageLike, prune: PruneLike = "default") -> float:
        """How little the tokens of an image resemble each other: 1 - their mean cosine, over its views the mean.

        Of the tokens that the pruners before the vision tower keep. What ``PruneSID(dynamic=True)`` shares budgets by.
        """
        before = [pruner for pruner in self.pruners_of(prune) if pruner.after == "image"]
        (picture,) = self._pictures([image], before, Stats())
        with self.engine.gate, self.engine.lock:
            found = [self.feature_pruners.information(view) for view in self.engine.seen(picture)]
        return float(np.mean(found))

    def pixels(self, image: ImageLike) -> tuple[list[np.ndarray], Views]:
        """The pictures that an image becomes, uint8 [H, W, 3], and how the model looks at them.

        Raises ImageError, RequestError.
        """
        model = self.manifest.model
        return frames_of(image, lambda h, w: self.family.views(model, self.preprocessing, h, w))

    def _answer(self, request: Request, sequence: Sequence, steps: Steps) -> Answer:
        return Answer(steps, self.speech(request), sequence.stats)

    def _pictures(self, images: Several[ImageLike], prune: PruneLike, stats: Stats) -> list[Picture]:
        """Stages image and prune: read, resize, upload, select."""
        pruners = self.pruners_of(prune)
        pictures = []
        for image in images:
            picture = self._picture(image, pruners, stats)
            later = [pruner for pruner in pruners if pruner.after == "vision"]
            if later:
                most = max(len(keep) for keep in picture.kept.by_view())
                later[0].idle(most)  # raises for too many, before the tower runs
            pictures.append(self._pruned_later(picture, later, stats) if later else picture)
            stats.images += pictures[-1].selections
        return pictures

    def _picture(self, image: ImageLike, pruners: Several[Pruner], stats: Stats) -> Picture:
        """Every view after the pruners that look at pixels."""
        model = self.manifest.model
        with stats.stage("image"):
            frames, shown_as = self.pixels(image)
        with stats.stage("prune"):
            shown = []
            selections = []
            seen = []  # by the tower
            assert self.selector is not None
            looks = self.selector.looks(frames, shown_as, pruners, WORTH)
            for i, (buffer, keep, selection) in enumerate(looks):
                selections.append(_of_view(selection, i, shown_as))
                if selections[-1].kept:
                    others = self.family.tower_inputs(model, shown_as.views[i], selection.keep)
                    given = {name: self.backend.upload(x) for name, x in others.items()}
                    shown.append(Shown(buffer, keep, given))
                    seen.append(selection.keep)
            kept = kept_of([selection.keep for selection in selections], shown_as)
        key = b""
        if self.reuse:
            with stats.stage("reuse"):
                key = digest(frames, [*seen, kept.keep])
        return Picture(tuple(shown), tuple(selections), kept, key)

    def _pruned_later(self, picture: Picture, pruners: Several[Pruner], stats: Stats) -> Picture:
        """Prune what the vision tower makes of an image: it runs now, since the prompt follows from what is kept."""
        with self.engine.gate, self.engine.lock:
            with stats.stage("vision"):
                seen = self.engine.seen(picture)
                self.backend.wait()
            with stats.stage("prune"):
                left = self.feature_pruners.prune(seen, pruners)
                assert self.vision is not None
                features = self.vision.whole(
                    [Seen(view.features, of.others) for view, of in zip(left, seen, strict=True)]
                )
        of_views = iter(left)
        selections = tuple(
            _pruned(selection, next(of_views), pruners) if selection.kept else selection
            for selection in picture.selections
        )
        kept = kept_of([selection.keep for selection in selections], picture.kept.shown, *order_of(left))
        key = hashlib.sha256(picture.digest + repr((pruners, kept.keep.tolist())).encode()).digest()
        return replace(
            picture,
            selections=selections,
            kept=kept,
            digest=key if picture.digest else b"",
            features=features,
        )

    def _sequence(
        self,
        ids: np.ndarray,
        pictures: list[Picture],
        sampling: Sampling,
        max_new_tokens: int,
        stats: Stats,
        stop: Collection[int] | None,
        ahead: int | None,
        keeps_logits: bool,
    ) -> Sequence:
        """Lay the prompt out, ids [S] of any integer type, and check that it fits."""
        integer("max_new_tokens", max_new_tokens, at_least=1)
        model = self.manifest.model
        if ids.min() < 0 or ids.max() >= model.text.vocab:
            raise RequestError(
                f"input_ids holds {ids.min()} ... {ids.max()}, expected 0 ... {model.text.vocab - 1}"
            )
        prompt = self.family.layout(model, ids.astype(np.int32), [picture.kept for picture in pictures])
        stats.prompt_tokens = len(prompt.ids)
        stats.prompt_tokens_full = prompt.full_length
        room = self.context - len(prompt.ids)
        if room < 1:
            limit = "the context that was asked for"
            if self.context == self.manifest.context:
                limit = "the model's context"
            elif self.context == self.backend.capacity:
                limit = "the engines' capacity"
            raise RequestError(
                f"the prompt takes {len(prompt.ids)} tokens, expected under {self.context} ({limit}); "
                "lower max_pixels, prune more or ask less"
            )
        return Sequence(
            prompt=prompt,
            pictures=tuple(pictures),
            sampling=sampling,
            stats=stats,
            limit=min(max_new_tokens, room),
            limited_by="length" if max_new_tokens <= room else "context",
            stop=frozenset(self.manifest.stop_tokens if stop is None else stop),
            ahead=ahead,
            keeps_logits=keeps_logits,
        )


def _of_view(selection: Selection, number: int, shown: Views) -> Selection:
    """Without the tokens that show what was put around the image, and where the view lies in it."""
    view = shown.views[number]
    keep = selection.keep[view.rows_wanted(selection.keep)]
    found = replace(selection, keep=keep, number=number, frame=shown.frames[view.frame], view=view)
    if view.wanted is not None and selection.dropped:
        first = selection.dropped[0]
        dropped = found.total - len(keep)
        reason = first.reason or ("" if dropped else "only what was put around the image could be dropped")
        found = replace(found, dropped=(replace(first, tokens=dropped, reason=reason),))
    return found


def _pruned(selection: Selection, left: Left, pruners: Several[Pruner]) -> Selection:
    """A view's selection after what pruners left of its features."""
    groups = left.groups
    return replace(
        selection,
        keep=selection.keep[left.rows],
        others=(*selection.others, *pruners),
        dropped=(*selection.dropped, *left.dropped),
        groups=groups and Groups(selection.keep[groups.seen], groups.group),
    )


def load(
    path: str | Path,
    device: str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    threads: int = 0,
    verify: bool = False,
    reuse: int = REUSE,
    together: int = TOGETHER,
    context: int | None = None,
) -> Pipeline:
    """Open a bundle on a device: "cpu" or "cuda" (ONNX Runtime), "openvino" or "openvino:GPU", "tensorrt",
    "tensorrt-rtx", or "auto": one whose engines it has, if they run here, else the CPU, where the vision tower runs on
    OpenVINO if that is installed and was measured to be faster. "vision=openvino,language=cpu" says it stage by stage.
    ``chosen`` of the result says which and why.

    ``min_pixels`` and ``max_pixels`` of resized images: None takes the bundle's own, or what its engines were compiled
    for. ``threads`` per graph on the CPU, 0 for one per core. ``verify`` checks the hashes of the large files and of
    the engines too, and compiles for OpenVINO anew. ``reuse``: bytes for what past requests computed, 0 for none: a
    question about the same images, or the next turn of a conversation, then runs only what is new (runtime/reuse.py).
    ``together``: requests that run at once; more wait for their turn. ``context``: tokens of prompt and answer
    together, None for as many as the model and its engines take. Raises BundleError, BackendError.
    """
    integer("reuse", reuse)
    integer("together", together, 1)
    integer("threads", threads, 0, 4 * (os.cpu_count() or 1))
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None:
            integer(name, value, 1)
    directory, manifest = open_bundle(path, verify)
    side = manifest.model.vision.side
    if not manifest.model.sees and (min_pixels is not None or max_pixels is not None):
        raise RequestError(
            f"limits of pixels are given, expected none: a {manifest.family} model takes text only"
        )
    if side and (min_pixels is not None or max_pixels is not None):
        raise RequestError(
            f"{'min' if max_pixels is None else 'max'}_pixels is given, expected neither: a {manifest.family} model "
            f"looks at views of {side} x {side} pixels"
        )
    begin = time.perf_counter()
    stages = open_stages(device, directory, manifest, threads, verify)
    limit = stages.language.backend.max_pixels or manifest.preprocessing.max_pixels
    max_pixels = min(limit, manifest.preprocessing.max_pixels) if max_pixels is None else max_pixels
    pipe = Pipeline(directory, manifest, stages, min_pixels, max_pixels, reuse, together, context)
    took = round((time.perf_counter() - begin) * 1e3, 3)
    LOG.info(
        "loaded", extra={"fields": {"bundle": str(directory), "device": pipe.chosen, "milliseconds": took}}
    )
    return pipe
