"""The whole path: image -> prune -> vision -> language -> text. Read this file first."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..models.checks import integer
from ..models.errors import BundleError, RequestError
from ..models.manifest import Manifest
from .answer import Answer, Step
from .backends.devices import open_device
from .backends.session import Backend, Buffer
from .bundle import open_bundle
from .image import ImageLike, prepare
from .language import STEP, Language, build_prompt
from .messages import PromptLike, images_of, with_images
from .prune import Prune, Selection, check_prune
from .reuse import Digests, Reuse, digest
from .sampling import Sampling
from .selector import Selector
from .stats import Stats, log_request
from .text import Text
from .vision import Vision

LOG = logging.getLogger(__name__)
WORTH = 0.02  # pruning that would drop less than this share of an image's tokens is left out
REUSE = 1 << 30  # bytes for what past requests computed
PruneLike = Prune | Literal["default"] | None


@dataclass(frozen=True)
class Encoded:
    """One image after the vision tower."""

    features: np.ndarray  # [1 + L, K, D]
    selection: Selection

    @property
    def keep(self) -> np.ndarray:
        """Which tokens are kept, int32 [K]."""
        return self.selection.keep

    @property
    def embeds(self) -> np.ndarray:
        """Their embeddings [K, D]."""
        return self.features[0]

    @property
    def deepstack(self) -> np.ndarray:
        """What the first language layers take besides, [L, K, D]."""
        return self.features[1:]


@dataclass(frozen=True)
class Prepared:
    """The images of a request on the backend, and which of their tokens are kept."""

    images: tuple[Buffer, ...]  # uint8 [H, W, 3] each
    keeps: tuple[Buffer, ...]  # int32 [K] each
    selections: tuple[Selection, ...]
    digests: Digests  # of each image and its kept tokens; empty where nothing is reused


class Pipeline:
    """A loaded bundle. A cache serves one request at a time, so several threads may use one pipeline."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        backend: Backend,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        chosen: str = "",
        reuse: int = REUSE,
    ):
        model, dtype = manifest.model, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[manifest.compute]
        graphs = {name: directory / graph.file for name, graph in manifest.graphs.items()}
        self.manifest, self.backend = manifest, backend
        p = manifest.prune
        self.prune = Prune(p.method, p.metric, p.tau, p.anchored)  # of requests that do not say
        self.chosen = chosen  # where it runs, and why there
        self.min_pixels = manifest.preprocessing.min_pixels if min_pixels is None else min_pixels
        self.max_pixels = manifest.preprocessing.max_pixels if max_pixels is None else max_pixels
        self.selector = Selector(backend, directory, model.vision.block, manifest.graphs["prune"].dialect)
        dialect = manifest.graphs["language"].dialect
        self.language = Language(  # first: loading the largest graph takes the most memory
            backend, graphs["language"], model.text, len(model.vision.deepstack), dtype, dialect
        )
        self.vision = Vision(backend, graphs["vision"], len(model.vision.deepstack), model.text.width, dtype)
        self.reuse = Reuse(reuse, backend.capacity is not None, backend.appends) if reuse else None
        self.context = min(manifest.context, backend.capacity or manifest.context)
        self.text = Text(directory, model.image_token) if manifest.interface == "text" else None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory on the device; the pipeline cannot be used afterwards. ``with load(...)`` does so."""
        if self.reuse:
            self.reuse.close()
        self.backend.close()

    def generate(
        self,
        prompt: PromptLike,
        images: ImageLike | Sequence[ImageLike] = (),
        prune: PruneLike = "default",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Answer:
        """Answer a question about images; iterate over the result for text, then read its ``stats``.

        ``prompt``: a question, or chat messages; ``images``: those that the messages do not hold themselves
        (messages.py says how they go together); ``prune``: "default" is what the bundle says, None keeps everything.
        Images and prompt are checked before this returns. Raises ImageError, RequestError, and BundleError for a bundle
        that only takes token ids.
        """
        if self.text is None:
            raise BundleError(
                "this bundle has no tokenizer (its checkpoint had none), so it takes token ids only; "
                "use generate_tokens, or build it again with a tokenizer.json in the checkpoint"
            )
        stats, sampling = Stats(), Sampling(temperature, top_p, top_k, seed)
        integer("max_new_tokens", max_new_tokens, at_least=1)
        messages, shown = with_images(prompt, images_of(images))
        prepared = self._prepare(shown, prune, stats)
        with stats.stage("text"):
            ids = self.text.encode(messages, [s.total for s in prepared.selections])
        steps = self._steps(ids, prepared, sampling, max_new_tokens, stats)
        return Answer(steps, self.text, stats, frozenset(self.manifest.stop_tokens))

    def generate_tokens(
        self,
        input_ids: Sequence[int] | np.ndarray,
        images: ImageLike | Sequence[ImageLike] = (),
        prune: PruneLike = "default",
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stats: Stats | None = None,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """Generate from token ids [S] in which every image stands as N placeholders (its full grid).

        Yields one Step per token, the first from the prompt; the last may be a stop token (``stop``; None: those of the
        bundle). ``stats`` is filled if given. Raises ImageError, RequestError before the first step.
        """
        try:
            ids = np.asarray(input_ids)
        except ValueError as err:
            raise RequestError(f"input_ids is not a flat list ({err}), expected integers [S]") from err
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise RequestError(f"input_ids has dtype {ids.dtype} and shape {ids.shape}, expected integers [S], S > 0")
        if stats is None:
            stats = Stats()
        elif not isinstance(stats, Stats) or stats.spans:
            raise RequestError("stats is not a fresh ppexport.Stats(), expected a new one for every request")
        if not isinstance(sampling, Sampling):
            raise RequestError(f"sampling is {sampling!r:.80}, expected ppexport.Sampling(...)")
        prepared = self._prepare(images_of(images), prune, stats)
        return self._steps(ids.astype(np.int32), prepared, sampling, max_new_tokens, stats, stop)

    def encode(self, image: ImageLike, prune: PruneLike = "default") -> Encoded:
        """One image through prune and vision: which tokens are kept, and their features [1 + L, K, D]."""
        prepared = self._prepare([image], prune, Stats())
        features = self.backend.download(self.vision.encode(prepared.images[0], prepared.keeps[0]))
        return Encoded(features, prepared.selections[0])

    def _prepare(self, images: Sequence[ImageLike], prune: PruneLike, stats: Stats) -> Prepared:
        """Stages image and prune: read, resize, upload, select."""
        setting = self._prune(prune)
        buffers, keeps, selections, digests = [], [], [], []
        for image in images:
            with stats.stage("image"):
                pixels = prepare(image, self.selector.block, self.min_pixels, self.max_pixels)
                buffers.append(self.backend.upload(pixels))
            with stats.stage("prune"):
                keep, selection = self.selector.select(buffers[-1], setting, WORTH)
            keeps.append(keep)
            selections.append(selection)
            if self.reuse:
                with stats.stage("reuse"):
                    digests.append(digest(pixels, selection.keep))
        stats.images = tuple(selections)
        return Prepared(tuple(buffers), tuple(keeps), stats.images, tuple(digests))

    def _prune(self, prune: PruneLike) -> Prune | None:
        if isinstance(prune, str) and prune == "default":
            return self.prune
        return check_prune(prune, " or 'default'")

    def _encode(self, prepared: Prepared, first: int) -> Buffer:
        """Stage vision: features of the images from ``first`` on, on the backend; computed where they are not kept."""
        found = []
        for i in range(first, len(prepared.images)):
            features = self.reuse.features(prepared.digests[i]) if self.reuse else None
            if features is None:
                features = self.vision.encode(prepared.images[i], prepared.keeps[i])
                if self.reuse:
                    self.reuse.keep_features(prepared.digests[i], features)
            found.append(features)
        self.backend.wait()
        return self.vision.join(found) if found else self.language.no_features

    def _steps(
        self,
        ids: np.ndarray,
        prepared: Prepared,
        sampling: Sampling,
        max_new_tokens: int,
        stats: Stats,
        stop: Collection[int] | None = None,
    ) -> Iterator[Step]:
        """Check that the request fits, then (lazily) run vision, prefill and decode."""
        integer("max_new_tokens", max_new_tokens, at_least=1)
        vocab = self.manifest.model.text.vocab
        if ids.min() < 0 or ids.max() >= vocab:
            raise RequestError(f"input_ids holds {ids.min()} ... {ids.max()}, expected 0 ... {vocab - 1}")
        prompt = build_prompt(ids, self.manifest.model.image_token, prepared.selections)
        stats.prompt_tokens, stats.prompt_tokens_full = len(prompt.ids), prompt.full_length
        room = self.context - len(prompt.ids)
        if room < 1:
            limit = "the model's context" if self.context == self.manifest.context else "the engines' capacity"
            raise RequestError(
                f"the prompt takes {len(prompt.ids)} tokens, expected under {self.context} ({limit}); "
                "lower max_pixels, prune more or ask less"
            )

        def steps() -> Iterator[Step]:
            limit = min(max_new_tokens, room)
            decoding, known = self.reuse.take(prompt, prepared.digests) if self.reuse else (None, 0)
            stats.reused_tokens = known
            with stats.stage("vision"):
                features = self._encode(prepared, int(prompt.image_of[:known].max(initial=-1)) + 1)
            with stats.stage("prefill"):
                if decoding is None:
                    decoding = self.language.start(len(prompt.ids) + min(limit - 1, STEP))
                decoding.rewind(known)
                logits = decoding.prefill(prompt.after(known), features)
            rng, ends, whole = sampling.rng(), set(self.manifest.stop_tokens if stop is None else stop), True
            try:
                for i in range(limit):
                    token = sampling.choose(logits, rng)
                    stats.generated_tokens = i + 1
                    finish = "" if i + 1 < limit else "length" if limit == max_new_tokens else "context"
                    stats.finish = "stop" if token in ends else finish
                    yield Step(token, logits.copy())
                    if token in ends or i + 1 == limit:
                        return
                    with stats.stage("decode"):
                        logits = decoding.decode(token, prompt.next_position + i)
            except GeneratorExit:  # nobody wants more of the answer
                raise
            except BaseException:
                whole = False  # its cache may have grown in part
                raise
            finally:
                if self.reuse and whole:
                    self.reuse.keep(decoding, prepared.digests)
                log_request(stats)

        return steps()


def load(
    path: str | Path,
    device: str = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    threads: int = 0,
    verify: bool = False,
    reuse: int = REUSE,
) -> Pipeline:
    """Open a bundle on a device: "cpu" or "cuda" (ONNX Runtime), "tensorrt", "tensorrt-rtx", or "auto": one whose
    engines it has, if they run here, else the CPU. ``chosen`` of the result says which and why.

    ``min_pixels`` and ``max_pixels`` of resized images: None takes the bundle's own, or what its engines were compiled
    for. ``threads`` per graph on the CPU, 0 for one per core. ``verify`` checks the hashes of the large files and of
    the engines too. ``reuse``: bytes for what past requests computed, 0 for none: a question about the same images, or
    the next turn of a conversation, then runs only what is new (runtime/reuse.py). Raises BundleError, BackendError.
    """
    integer("reuse", reuse)
    integer("threads", threads, 0, 4 * (os.cpu_count() or 1))
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None:
            integer(name, value, 1)
    directory, manifest = open_bundle(path, verify)
    begin = time.perf_counter()
    backend, chosen = open_device(device, directory, manifest, threads, verify)
    limit = backend.max_pixels or manifest.preprocessing.max_pixels
    max_pixels = min(limit, manifest.preprocessing.max_pixels) if max_pixels is None else max_pixels
    pipe = Pipeline(directory, manifest, backend, min_pixels, max_pixels, chosen, reuse)
    took = round((time.perf_counter() - begin) * 1e3, 3)
    LOG.info("loaded", extra={"fields": {"bundle": str(directory), "device": chosen, "milliseconds": took}})
    return pipe
