"""``ppexport plan``: optimization profiles for a user's own images, from what pruning keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .models import profiles
from .models.errors import RequestError
from .models.profiles import Profile, Profiles
from .models.pruners import Pruner, listed, pruners_of
from .models.pruners.pixelprune import PixelPrune
from .runtime.bundle import open_bundle
from .runtime.prune import Selection
from .runtime.selector import select

PruneLike = Pruner | Sequence[Pruner] | None
APART = 1.5  # a further bucket pays where it is at least this much larger than the one before


@dataclass(frozen=True)
class Plan:
    """Profiles, and what they were made from."""

    profiles: Profiles
    kept: tuple[int, ...]  # kept tokens of each image
    total: tuple[int, ...]  # tokens of each image's full grid
    served: tuple[float, ...]  # share of the images that each vision profile is the first to hold


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Select on every image and place the sizes of the engines.

    Sizes from 1 to those of the largest image are covered even where nothing of it could be pruned; what differs is
    where the engines are fastest. ``text_tokens``: of the longest question; ``compiled``: the graph that the
    engines prune with. Raises ImageError, RequestError (also for
    a method that engines do not have).
    """
    pruners = listed(prune)
    for pruner in pruners:
        if pruner.graph != compiled:
            raise RequestError(
                f"engines prune with {compiled} only, found {pruner.graph}; plan with a bundle that prunes so"
            )
    selections = []
    for i, image in enumerate(images):
        selections.append(select(image, pruners, patch, merge, min_pixels, max_pixels))
        progress(i + 1, len(images))
    kept = tuple(s.kept for s in selections)
    largest = max(s.total for s in selections)
    if largest + text_tokens > capacity:
        raise RequestError(
            f"an unpruned image of {largest} tokens and {text_tokens} of text do not fit a capacity of {capacity}; "
            f"expected at least {largest + text_tokens}, or a lower max_pixels"
        )
    sides: Profile = {
        "H": _sides(selections, "height", patch * merge),
        "W": _sides(selections, "width", patch * merge),
    }
    edges = bucket_edges(kept, largest)
    vision = []
    prefill = []
    served = []
    left = sorted(kept)
    for edge in edges:
        inside = [n for n in left if n <= edge]
        left = left[len(inside) :]
        usual = int(np.median(inside)) if inside else edge
        vision.append({**sides, "K": (1, usual, edge)})
        longest = edge + text_tokens if edge != edges[-1] else capacity
        images_of_prompt = edge if edge != edges[-1] else capacity
        prefill.append({"S": (1, min(usual + 64, longest), longest), "K": (1, usual, images_of_prompt)})
        served.append(len(inside) / len(kept))
    sizes = Profiles(profiles.SCHEMA, max_pixels, capacity, ({**sides},), tuple(vision), tuple(prefill))
    return Plan(sizes, kept, tuple(s.total for s in selections), tuple(served))


def as_bundle(
    bundle: str | Path, prune: PruneLike | Literal["default"], sizes: dict[str, Any]
) -> tuple[PruneLike, dict[str, Any]]:
    """How a bundle prunes and resizes: pruners, and the arguments of ``plan`` that ``sizes`` does not give.

    Raises BundleError.
    """
    _, manifest = open_bundle(bundle)
    vision = manifest.model.vision
    own = {
        "patch": vision.patch,
        "merge": vision.merge,
        "min_pixels": manifest.preprocessing.min_pixels,
        "max_pixels": min(profiles.MAX_PIXELS["standard"], manifest.preprocessing.max_pixels),
        "compiled": manifest.graphs["prune"].file.removesuffix(".onnx"),
    }
    return pruners_of(manifest.prune) if prune == "default" else prune, {**own, **sizes}


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
    for profile, served in zip(made.profiles.vision, made.served, strict=True):
        _, usual, most = profile["K"]
        lines.append(
            f"bucket  up to {most} kept tokens, fastest at {usual}: serves {served:.0%} of the images"
        )
    return lines


def _sides(selections: Sequence[Selection], name: str, block: int) -> tuple[int, int, int]:
    values = sorted(getattr(s, name) for s in selections)
    return block, values[len(values) // 2], values[-1]
