"""Optimization profiles: which sizes the engines of a bundle are made for. A file that a user may edit.

``ppexport plan`` writes one from a user's images, ``ppexport build --profiles`` reads it. Axes: models/config.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checks import integer
from .config import ModelConfig, VisionConfig
from .errors import RequestError
from .files import write_text
from .pruners.prunesid import MOST_DIRECTIONS, MOST_TOKENS
from .strict import StrictError, from_json, to_json

SCHEMA = 2
Range = tuple[int, int, int]  # smallest, the one to be fastest at, largest
Profile = dict[str, Range]  # axis -> sizes

# Where nothing else is asked for: what a 2B model leaves room for on a device with 8 GB. Attention of the plain dialect
# holds the scores of all pairs of patches or tokens, so that its sizes are smaller.
MAX_PIXELS = {"standard": 2_097_152, "plain": 1_048_576}
CAPACITY = {"standard": 4096, "plain": 2048}
MEANING = {
    "H": "height in pixels",
    "W": "width in pixels",
    "K": "kept image tokens",
    "G": "windows with kept tokens",
    "U": "kept tokens of the image itself",
    "S": "tokens of the prompt",
    "B": "sequences",
    "P": "positions with logits",
    "M": "tokens in the cache",
    "E": "entries of the cache that are looked at",
    "p": "directions of features",
}
IMAGES = "--max-pixels or --profiles ('ppexport plan' makes a file for given images)"
FLAG = {
    **dict.fromkeys("HWKGUp", IMAGES),
    "S": "--capacity or --profiles",
    "M": "--capacity",
    "E": "--capacity",
}
MOST_SIDE = 1 << 17
MOST_PIXELS = 100_000_000
# Axes of each graph that a profile gives. M (cache capacity) is set once for all profiles, B (batch) is 1, and G
# (windows of a tower that has some) and U (what a view shows of its image) follow from the others; so do K and p of
# graphs that prune features.
AXES = {"prune": ("H", "W"), "vision": ("H", "W", "K"), "prefill": ("S", "K"), "decode": ()}


@dataclass(frozen=True)
class Profiles:
    """Sizes for every graph. One engine holds all profiles of its graph; a request uses the first that it fits."""

    schema: int
    max_pixels: int  # larger images are shrunk to this, unless a request says otherwise
    capacity: int  # M: tokens of prompt and answer together that fit the cache of one sequence
    prune: tuple[Profile, ...]
    vision: tuple[Profile, ...]
    prefill: tuple[Profile, ...]
    information: float | None = (
        None  # what the images have on average, for PruneSID(dynamic=True, information=...)
    )


def defaults(model: ModelConfig, context: int, max_pixels: int, capacity: int) -> Profiles:
    """Profiles for images of up to ``max_pixels`` with sides up to 4 : 1, nothing known of what they show.

    Raises RequestError for a capacity or image size that no request could use.
    """
    block = model.vision.block
    tokens = max_pixels // block**2
    if tokens < 1:
        raise RequestError(f"max_pixels is {max_pixels}, expected at least one token of {block} x {block}")
    _check_capacity(capacity, context)
    usual, longest = (block * max(1, round(math.sqrt(n))) for n in (tokens, 4 * tokens))
    side = model.vision.side
    sides = (side, side, side) if side else (block, usual, longest)
    kept = (1, max(1, tokens // 3), tokens)
    prompt = (1, min(kept[1] + 64, capacity), capacity)
    images = (1, min(kept[1], capacity), capacity) if model.sees else (1, 1, 1)  # of all images of a prompt
    return Profiles(
        SCHEMA,
        max_pixels,
        capacity,
        prune=({"H": sides, "W": sides},),
        vision=({"H": sides, "W": sides, "K": kept},),
        prefill=({"S": prompt, "K": images},),
    )


def _check_capacity(capacity: int, context: int) -> None:
    if not 2 <= capacity <= context:
        raise RequestError(f"capacity is {capacity}, expected 2 to {context} (the model's context)")


def check(profiles: Profiles, model: ModelConfig, context: int) -> Profiles:
    """The same profiles; raises RequestError naming the first value that the engines could not be built for."""
    block = model.vision.block
    if profiles.schema != SCHEMA:
        raise RequestError(f"schema is {profiles.schema}, expected {SCHEMA}")
    _check_capacity(profiles.capacity, context)
    integer("max_pixels", profiles.max_pixels, block**2, MOST_PIXELS)
    for graph in ("prune", "vision", "prefill"):
        listed: tuple[Profile, ...] = getattr(profiles, graph)
        if not listed:
            raise RequestError(f"{graph} has no profile, expected at least one")
        for i, profile in enumerate(listed):
            name = f"{graph}[{i}]"
            if sorted(profile) != sorted(AXES[graph]):
                raise RequestError(f"{name} has the axes {sorted(profile)}, expected {sorted(AXES[graph])}")
            for axis, sizes in profile.items():
                step = block if axis in "HW" else 1
                low, best, high = sizes
                if not step <= low <= best <= high <= MOST_SIDE or any(n % step for n in sizes):
                    multiples = f" multiples of {step}" if step > 1 else ""
                    raise RequestError(
                        f"{name}.{axis} is {list(sizes)}, expected rising{multiples} up to {MOST_SIDE}: min, opt, max"
                    )
            for axis in ("S", "K") if graph == "prefill" else ():
                if profile[axis][2] > profiles.capacity:
                    raise RequestError(
                        f"{name}.{axis} goes to {profile[axis][2]}, expected at most {profiles.capacity} (capacity)"
                    )
            if graph in ("prune", "vision"):
                _check_side(profile, name, model.vision.side)
            if graph == "vision" and profile["K"][2] > (
                most := profile["H"][2] * profile["W"][2] // block**2
            ):
                raise RequestError(
                    f"{name}.K goes to {profile['K'][2]}, expected at most {most}, what H and W hold"
                )
    return profiles


def _check_side(profile: Profile, name: str, side: int) -> None:
    """Raise RequestError for other sizes than those of a model with views of one size."""
    for axis in "HW" if side else "":
        if tuple(profile[axis]) != (side, side, side):
            raise RequestError(
                f"{name}.{axis} is {list(profile[axis])}, expected {[side] * 3}: the model looks at views of {side} x "
                f"{side} pixels"
            )


def engine_profiles(
    profiles: Profiles, model: ModelConfig, graph: str, dialect: str, int4: bool = False
) -> list[Profile]:
    """The profiles of one engine, with every dynamic axis: "language" gets the prefill ones, then one for decode.

    ``graph``: as engine_record.compiled_graphs names it; ``int4``: are the decoder's layers and its head?
    """
    if graph not in ("prune", "vision", "language"):
        return [_of_features(profile["K"]) for profile in profiles.vision]
    if graph != "language":
        found = [dict(p) for p in getattr(profiles, graph)]
        for profile in found if graph == "vision" else ():
            for axis in further_axes(model.vision):
                profile[axis] = profile["K"] if axis == "U" else _windows(profiles, profile, model.vision)
        return found
    capacity = profiles.capacity
    # where it is always one row that is multiplied, an engine holds weights in 16 bits once more, laid out otherwise,
    # and expands those in int8
    row = (1, 1, 1) if int4 else (1, 1, 2)
    common = {"B": (1, 1, 1), "P": row}
    start = common.copy()
    used = common.copy()
    if dialect == "plain":  # the used part of the cache; where caches are updated in place M is fixed
        # most prompts begin with an empty one, what follows another question does not
        start["M"], used["M"] = (1, 1, capacity), (1, max(1, capacity // 2), capacity)
    else:
        used["E"] = (1, max(1, capacity // 2), capacity)
    decode = {"S": row, "K": (1, 1, 1), **used}
    prefill = [{**p, **start} for p in profiles.prefill]
    if dialect == "standard":
        for profile in prefill:
            profile["E"] = (1, profile["S"][1], capacity)
    return [*prefill, decode]


def _of_features(kept: Range) -> Profile:
    """For a graph that prunes the features of so many tokens, by as many directions as its budget asks for."""
    low, best, high = (min(n, MOST_TOKENS) for n in kept)
    return {"K": (low, best, high), "p": (1, MOST_DIRECTIONS, MOST_DIRECTIONS)}


def engine_axes(graph: str, model: ModelConfig) -> tuple[str, ...]:
    """The dynamic axes of an engine, by its name (engine_record.compiled_graphs)."""
    if graph == "language":
        return (*AXES["prefill"], "B", "P", "M", "E")
    if graph == "vision":
        return (*AXES["vision"], *further_axes(model.vision))
    return AXES.get(graph, ("K", "p"))


def further_axes(c: VisionConfig) -> str:
    """Axes of the vision graph besides those of AXES; their sizes follow from the others."""
    return ("G" if c.window else "") + ("U" if c.class_token else "")


def most_windows(profiles: Profiles, c: VisionConfig) -> int:
    """The largest number of windows with kept tokens; 0 for towers without windows."""
    return max(_windows(profiles, profile, c)[2] for profile in profiles.vision) if c.window else 0


def _windows(profiles: Profiles, profile: Profile, c: VisionConfig) -> Range:
    """How many windows keep tokens: no more than there are tokens kept, nor than a picture of that size has windows.

    A grid of r x c tokens has at most (r / side + 1) * (c / side + 1) windows, most of them where it is long and thin.
    """
    tokens = profiles.max_pixels // c.block**2

    def most(size: int) -> int:
        rows, columns = (profile[axis][size] // c.block for axis in "HW")
        longest = max(rows, columns)
        in_all = -(-rows // c.window) * -(-columns // c.window)
        thin = int(tokens / c.window**2 + (longest + tokens / longest) / c.window) + 1
        return min(profile["K"][size], in_all, thin)

    return 1, most(1), most(2)


def writable(path: str | Path) -> Path:
    """The path if a profile file can be written there; raises RequestError, also for a file of another kind."""
    target = Path(path)
    if not str(path) or target.is_dir() or not target.absolute().parent.is_dir():
        raise RequestError(
            f"{path}: cannot be written, expected the name of a profile file in an existing directory"
        )
    if target.exists():
        try:
            read(target)
        except RequestError as err:
            raise RequestError(f"{path}: exists and is not a profile file, expected another name") from err
    return target


def write(profiles: Profiles, path: Path) -> None:
    """Write a profile file. Raises SpaceError."""
    write_text(path, json.dumps(to_json(profiles), indent=1) + "\n")


def read(path: str | Path) -> Profiles:
    """Read a profile file; raises RequestError that names what does not fit."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return from_json(Profiles, data)
    except StrictError as err:
        raise RequestError(f"{path}: {err}") from err
    except (OSError, ValueError, RecursionError) as err:
        raise RequestError(
            f"{path}: cannot be read as a profile file: {err}; 'ppexport plan' writes one"
        ) from err


def fitting(listed: list[Profile], sizes: Mapping[str, int]) -> int | None:
    """The first profile that holds all ``sizes`` (axis -> size), or None."""
    for i, profile in enumerate(listed):
        if all(profile[axis][0] <= n <= profile[axis][2] for axis, n in sizes.items()):
            return i
    return None


def outside(listed: list[Profile], sizes: Mapping[str, int], graph: str) -> str:
    """Which axis of ``sizes`` lies outside every profile, for an error: "K is 900, the engine takes 1 to 512"."""
    for axis, n in sizes.items():
        ranges = [profile[axis] for profile in listed]
        if not any(low <= n <= high for low, _, high in ranges):
            spans = ", ".join(sorted({f"{low} to {high}" for low, _, high in ranges}))
            flag = FLAG["S"] if graph == "language" and axis == "K" else FLAG[axis]
            return f"{axis} ({MEANING[axis]}) is {n}, the engine takes {spans}; build it again with {flag}"
    together = ", ".join(f"{axis} {n}" for axis, n in sizes.items())
    return f"no profile of the engine takes {together} together; build it again with other --profiles"
