"""``ppexport plan``: optimization profiles for a user's own images, from what pruning keeps of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .models import profiles, prune_place
from .models.checks import integer
from .models.errors import RequestError
from .models.families import FAMILIES
from .models.family import View, Views
from .models.profiles import Profile, Profiles
from .models.prune_place import Measured
from .models.pruners import Pruner, listed, pruners_of
from .models.pruners.pixelprune import PixelPrune
from .models.resize import smart_resize
from .runtime.bundle import check_takes_images, open_bundle
from .runtime.image import frames_of
from .runtime.pipeline import load
from .runtime.selector import HostSelector, Selector, packaged_selector

PruneLike = Pruner | Sequence[Pruner] | None
TURNS = 5  # of each place, for an image that is measured
APART = 1.5  # a further bucket pays where it is at least this much larger than the one before


@dataclass(frozen=True)
class Plan:
    """Profiles, and what they were made from."""

    profiles: Profiles
    kept: tuple[int, ...]  # kept tokens of each image
    total: tuple[int, ...]  # tokens of each image before pruning
    served: tuple[float, ...]  # share of the views that each vision profile is the first to hold


def plan(
    images: Sequence[str],
    prune: PruneLike,
    patch: int = 16,
    merge: int = 2,
    min_pixels: int = 65536,
    max_pixels: int = profiles.MAX_PIXELS["standard"],
    capacity: int = profiles.CAPACITY["standard"],
    text_tokens: int = 256,
    compiled: str = PixelPrune().graph,
    views_of: Callable[[int, int], Views] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Select on every image and place the sizes of the engines.

    Sizes from 1 to those of the largest image are covered even where nothing of it could be pruned; what differs is
    where the engines are fastest. ``text_tokens``: of the longest question; ``compiled``: the graph that the engines
    prune with; ``views_of``: how a model shows images of a height and width (None: whole, by ``patch``, ``merge`` and
    the limits). Raises ImageError, RequestError (also for a method that engines do not have).
    """
    pruners = listed(prune)
    for pruner in pruners:
        if pruner.graph != compiled:
            raise RequestError(
                f"engines prune with {compiled} only, found {pruner.graph}; plan with a bundle that prunes so"
            )
    selector = packaged_selector(integer("patch", patch, 1) * integer("merge", merge, 1))
    block = selector.block

    def whole(height: int, width: int) -> Views:
        return Views.whole(*smart_resize(height, width, block, min_pixels, max_pixels), block)

    looked: list[tuple[View, int]] = []  # each view, and how many tokens of it are kept
    kept = []
    total = []
    for i, image in enumerate(images):
        frames, shown = frames_of(image, views_of or whole)
        found = [selection for *_, selection in selector.looks(frames, shown, pruners)]
        looked += [(view, each.kept) for view, each in zip(shown.views, found, strict=True)]
        wanted = [len(view.rows_wanted(each.keep)) for view, each in zip(shown.views, found, strict=True)]
        beside = shown.placeholders - sum(len(v.rows_wanted(np.arange(v.total))) for v in shown.views)
        kept.append(sum(wanted) + beside)  # ends of rows are there as long as anything of theirs is
        total.append(shown.placeholders)
        progress(i + 1, len(images))
    largest = max(total)
    if largest + text_tokens > capacity:
        raise RequestError(
            f"an unpruned image of {largest} tokens and {text_tokens} of text do not fit a capacity of {capacity}; "
            f"expected at least {largest + text_tokens}, or a lower max_pixels"
        )
    sides: Profile = {
        "H": _sides([view.box[2] for view, _ in looked], block, views_of is not None),
        "W": _sides([view.box[3] for view, _ in looked], block, views_of is not None),
    }
    vision = []
    served = []
    of_views = [n for _, n in looked]
    for edge, usual, share in _buckets(of_views, max(view.total for view, _ in looked)):
        vision.append({**sides, "K": (1, usual, edge)})
        served.append(share)
    prefill = []
    edges = _buckets(kept, largest)
    for edge, usual, _ in edges:
        longest = edge + text_tokens if edge != edges[-1][0] else capacity
        images_of_prompt = edge if edge != edges[-1][0] else capacity
        prefill.append({"S": (1, min(usual + 64, longest), longest), "K": (1, usual, images_of_prompt)})
    sizes = Profiles(profiles.SCHEMA, max_pixels, capacity, ({**sides},), tuple(vision), tuple(prefill))
    return Plan(sizes, tuple(kept), tuple(total), tuple(served))


def _buckets(kept: Sequence[int], largest: int) -> list[tuple[int, int, float]]:
    """Of each bucket: how many tokens it holds, the usual number, which share of all it is the first to hold."""
    found = []
    left = sorted(kept)
    for edge in bucket_edges(kept, largest):
        inside = [n for n in left if n <= edge]
        left = left[len(inside) :]
        found.append((edge, int(np.median(inside)) if inside else edge, len(inside) / len(kept)))
    return found


def as_bundle(
    bundle: str | Path, prune: PruneLike | Literal["default"], sizes: dict[str, Any]
) -> tuple[PruneLike, dict[str, Any]]:
    """How a bundle prunes pixels and resizes: pruners, and the arguments of ``plan`` that ``sizes`` does not give.

    Raises BundleError.
    """
    _, manifest = open_bundle(bundle)
    check_takes_images(bundle, manifest, "sizes of engines follow from images")
    vision = manifest.model.vision
    family = FAMILIES[manifest.family]
    dialect = manifest.graphs["language"].dialect
    dialect = dialect if dialect in profiles.CAPACITY else "standard"
    own = {
        "patch": vision.patch,
        "merge": vision.merge,
        "min_pixels": manifest.preprocessing.min_pixels,
        "max_pixels": min(profiles.MAX_PIXELS[dialect], manifest.preprocessing.max_pixels),
        "capacity": min(profiles.CAPACITY[dialect], manifest.context),
        "compiled": manifest.graphs["prune"].file.removesuffix(".onnx"),
    }
    if vision.side:
        if {"patch", "merge", "min_pixels", "max_pixels"} & set(sizes):
            raise RequestError(
                f"sizes of images are given, expected none: a {manifest.family} model looks at views of {vision.side} "
                f"x {vision.side} pixels"
            )
        own["views_of"] = partial(family.views, manifest.model, manifest.preprocessing)
    found = pruners_of(manifest.prune) if prune == "default" else listed(prune)
    return [pruner for pruner in found if pruner.after == "image"], {**own, **sizes}


def bucket_edges(kept: Sequence[int], largest: int) -> list[int]:
    """Largest kept count of each bucket: about the median and the ninth decile if they lie apart, then ``largest``."""
    edges: list[int] = []
    for share in (50, 90):
        edge = (
            -(-int(np.percentile(kept, share, method="higher")) * 9 // 8 // 16) * 16
        )  # an eighth above, in sixteens
        if edge * APART <= largest and (not edges or edge >= edges[-1] * APART):
            edges.append(edge)
    return [*edges, largest]


def report(made: Plan) -> list[str]:
    """The distribution of kept tokens and what each bucket serves, for a person."""
    kept = np.array(made.kept)
    p10, p50, p90 = (int(np.percentile(kept, q)) for q in (10, 50, 90))
    share = kept.sum() / sum(made.total)
    lines = [
        f"{len(kept)} images: kept tokens p10 {p10}, p50 {p50}, p90 {p90}, max {kept.max()} ({share:.1%} of all)"
    ]
    counts, bounds = np.histogram(kept, bins=min(8, len(set(made.kept))))
    for count, low, high in zip(counts, bounds, bounds[1:], strict=False):
        lines.append(
            f"  {int(low):>6} to {int(high):<6} {'#' * round(40 * count / counts.max()):<40} {count}"
        )
    what = "images" if max(made.total) <= made.profiles.vision[-1]["K"][2] else "views"
    for profile, served in zip(made.profiles.vision, made.served, strict=True):
        _, usual, most = profile["K"]
        lines.append(
            f"bucket  up to {most} kept tokens, fastest at {usual}: serves {served:.0%} of the {what}"
        )
    return lines


def _sides(found: Sequence[int], block: int, one_size: bool) -> tuple[int, int, int]:
    values = sorted(found)
    return values[0] if one_size else block, values[len(values) // 2], values[-1]


def information(
    bundle: str | Path,
    images: Sequence[str],
    prune: PruneLike | Literal["default"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """How little the tokens of the images resemble each other on average, by the bundle's own vision tower.

    What budgets of ``PruneSID(dynamic=True)`` are shares of. Raises BundleError, ImageError, RequestError.
    """
    found = []
    with load(bundle, "cpu", reuse=0) as pipe:
        for i, image in enumerate(images):
            found.append(pipe.information(image, prune))
            progress(i + 1, len(images))
    return float(np.mean(found))


def measure(
    bundle: str | Path,
    device: str,
    images: Sequence[str],
    prune: PruneLike | Literal["default"] = "default",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """How long pixels take to be pruned on the device and on the host, for these images; kept in the bundle.

    From pixels in the host's memory to pixels and indices on the device, in turns; the bundle prunes where it is faster
    from then on. Raises BackendError, BundleError, ImageError, RequestError, SpaceError.
    """
    with load(bundle, device, reuse=0) as pipe:
        check_takes_images(bundle, pipe.manifest, "pruning is what is measured")
        backend = pipe.backend
        if not backend.gpu:
            raise RequestError(
                f"device is {device!r}, expected cuda, tensorrt or tensorrt-rtx: a CPU is the host"
            )
        graphs = pipe.manifest.graphs
        block = pipe.manifest.model.vision.block
        places: dict[str, Selector | HostSelector] = {
            "device": Selector(backend, pipe.directory, block, graphs["prune"].dialect),
            "host": HostSelector(backend, block),
        }
        pruners = [pruner for pruner in pipe.pruners_of(prune) if pruner.after == "image"]
        if not pruners:
            raise RequestError("the images are not pruned by their pixels, expected a pruner to measure")
        found: dict[str, list[float]] = {place: [] for place in places}
        for i, image in enumerate(images):
            frames, shown = pipe.pixels(image)
            times: dict[str, list[float]] = {place: [] for place in places}
            for turn in range(1 + TURNS):  # the first one is not counted
                for place, selector in places.items():
                    backend.wait()
                    begin = time.perf_counter()
                    selector.looks(frames, shown, pruners)
                    backend.wait()
                    if turn:
                        times[place].append((time.perf_counter() - begin) * 1e3)
            for place, taken in times.items():
                found[place].append(float(np.median(taken)))
            progress(i + 1, len(images))
        made = Measured(
            backend.device,
            backend.gpu,
            len(images),
            round(float(np.median(found["device"])), 3),
            round(float(np.median(found["host"])), 3),
        )
        prune_place.keep(pipe.directory, made)
    return made
