"""A picture of a selection: what is kept, and what each dropped token was predicted from."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .models.pruners.pixelprune import PREDICTORS
from .runtime.image import ImageLike, framed, read
from .runtime.prune import Selection

KEPT, BESIDE, ABOVE, OTHERWISE, BY_MEANING, AROUND = range(6)
TINTS = {BESIDE: (255, 0, 110), ABOVE: (30, 110, 255), OTHERWISE: (250, 150, 0)}
EDGE = (0, 200, 90)  # outline around what is kept
MEANING = (120, 120, 120)  # in the legend, for the colours of all groups
GAP = 14  # pixels between the first view and the others
GOLDEN_ANGLE = 0.381966  # of a full turn


def overlay(image: ImageLike, selection: Selection | Sequence[Selection]) -> Image.Image:
    """The image as the model sees it: dropped blocks faded under a tint, kept regions untouched in a green outline.

    The tint says what a block was predicted from. Where PruneSID chose, every block that the vision tower saw has the
    colour of its group, strong where it was dropped. A line underneath says what the colours mean and how much is kept.
    Of an image that is shown in several views, all: the first on the left, the others beside it where they lie.
    """
    views = [selection] if isinstance(selection, Selection) else list(selection)
    source = read(image)
    drawn = [_drawn(_pixels_of(source, view), view) for view in views]
    if len(views) == 1:
        return _with_legend(drawn[0][0], views, [drawn[0][1]])
    first = drawn[0][0]
    places = [(0, 0)]
    for view in views[1:]:
        assert view.view is not None
        places.append((first.width + GAP + view.view.box[1], view.view.box[0]))
    width = max(x + picture.width for (x, _), (picture, _) in zip(places, drawn, strict=True))
    height = max(y + picture.height for (_, y), (picture, _) in zip(places, drawn, strict=True))
    together = Image.new("RGB", (width, height), "white")
    for place, (picture, _) in zip(places, drawn, strict=True):
        together.paste(picture, place)
    return _with_legend(together, views, [where for _, where in drawn])


def kinds(image: ImageLike, selections: Sequence[Selection]) -> list[np.ndarray]:
    """Of each view of an image, what was done to its tokens and why (``sources``): uint8 [rows, cols]."""
    source = read(image)
    return [sources(_pixels_of(source, selection), selection) for selection in selections]


def _pixels_of(source: Image.Image, selection: Selection) -> np.ndarray:
    """What a selection was made of, uint8 [H, W, 3]."""
    if selection.frame is None or selection.view is None:
        return np.asarray(source.resize((selection.width, selection.height), Image.Resampling.BICUBIC))
    top, left, height, width = selection.view.box
    return framed(source, selection.frame)[top : top + height, left : left + width]


def _drawn(pixels: np.ndarray, selection: Selection) -> tuple[Image.Image, np.ndarray]:
    """The picture without its legend, and ``sources``."""
    where = sources(pixels, selection)
    block = selection.width // selection.cols
    large = np.repeat(np.repeat(where, block, axis=0), block, axis=1)
    gray = pixels.mean(axis=2, dtype=np.float32)[:, :, None]
    picture = pixels.astype(np.float32)
    for kind, tint in TINTS.items():
        picture = np.where((large == kind)[:, :, None], _faded(gray, tint), picture)
    if selection.groups is not None:
        picture = _by_group(picture, selection)
    made = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    _outline(ImageDraw.Draw(made), where == KEPT, block)
    return made, where


def sources(pixels: np.ndarray, selection: Selection) -> np.ndarray:
    """KEPT, or where each dropped token was predicted from: uint8 [rows, cols].

    ``pixels``: uint8 [H, W, 3], what the selection was made of. OTHERWISE where a method does not predict, a scan goes
    to the next row, or a token was dropped for another reason (it is as in the frame before, or over a budget). The
    selection's steps are gone through once more, one by one.
    """
    rows = selection.rows
    cols = selection.cols
    prune = selection.prune
    found = np.full(rows * cols, OTHERWISE, np.uint8)
    seen = selection.keep if selection.groups is None else selection.groups.seen
    found[seen] = KEPT
    found[np.setdiff1d(seen, selection.keep)] = BY_MEANING
    if selection.view is not None and selection.view.wanted is not None:
        whole = np.arange(rows * cols, dtype=np.int32)
        found[np.setdiff1d(whole, selection.view.rows_wanted(whole))] = AROUND
    if prune is None or prune.method not in PREDICTORS or len(seen) == selection.total:
        return found.reshape(rows, cols)
    block = selection.width // cols
    tokens = (
        pixels.reshape(rows, block, cols, block, 3).swapaxes(1, 2).reshape(rows * cols, -1).astype(np.int32)
    )
    limit = prune.threshold(block)
    stands_for = list(range(rows * cols))  # the token that a token is compared as

    def match(a: int, b: int) -> bool:
        difference = np.abs(tokens[a] - tokens[b])
        if prune.metric == "max":
            return int(difference.max()) <= limit
        return int((difference if prune.metric == "mae" else difference**2).sum()) <= limit

    like = lambda a, b: match(stands_for[a], stands_for[b])  # noqa: E731
    for index, before, kind in _steps(rows, cols, prune.method, like):
        if found[index] == OTHERWISE and match(index, stands_for[before]):
            found[index] = kind
            if prune.anchored:
                stands_for[index] = stands_for[before]
    return found.reshape(rows, cols)


def _steps(
    rows: int, cols: int, method: str, like: Callable[[int, int], bool]
) -> Iterator[tuple[int, int, int]]:
    """(token, what it is predicted from, where that lies) in the order of a method; ``like``: do two tokens match?"""
    for row in range(rows):
        back = method == "serpentine" and row % 2 == 1
        for col in reversed(range(cols)) if back else range(cols):
            index = row * cols + col
            left = index - 1
            above = index - cols
            corner = index - cols - 1
            if index == 0:
                continue
            if method == "pred_2d":
                up = col == 0 or (row > 0 and like(corner, left) and not like(corner, above))
                yield index, above if up else left, ABOVE if up else BESIDE
            elif method == "raster":
                yield index, left, BESIDE if col else OTHERWISE
            elif col == (cols - 1 if back else 0):
                yield index, above, ABOVE
            else:
                yield index, index + 1 if back else left, BESIDE


def _by_group(picture: np.ndarray, selection: Selection) -> np.ndarray:
    """float32 [H, W, 3] with the blocks that the tower saw in the colours of their groups."""
    groups = selection.groups
    assert groups is not None
    block = selection.width // selection.cols
    found = picture.copy()
    kept = set(selection.keep.tolist())
    for token, group in zip(groups.seen.tolist(), groups.group.tolist(), strict=True):
        row, col = divmod(token, selection.cols)
        at = np.s_[row * block : (row + 1) * block, col * block : (col + 1) * block]
        hue = group * GOLDEN_ANGLE % 1  # neighbours in number are far apart in colour
        tint = 255 * np.array(colorsys.hsv_to_rgb(hue, 0.9, 0.9), np.float32)
        share = 0.2 if token in kept else 0.65
        found[at] = (1 - share) * picture[at] + share * tint
    return found


def _outline(draw: ImageDraw.ImageDraw, grid: np.ndarray, block: int) -> None:
    """A line wherever a kept block touches a dropped one or the border."""
    width = max(2, block // 12)
    padded = np.pad(grid, 1)
    for row, col in np.argwhere(grid):
        x = col * block
        y = row * block
        right = x + block - 1
        bottom = y + block - 1
        if not padded[row, col + 1]:
            draw.line((x, y, right, y), EDGE, width)
        if not padded[row + 2, col + 1]:
            draw.line((x, bottom, right, bottom), EDGE, width)
        if not padded[row + 1, col]:
            draw.line((x, y, x, bottom), EDGE, width)
        if not padded[row + 1, col + 2]:
            draw.line((right, y, right, bottom), EDGE, width)


def _with_legend(
    picture: Image.Image, views: Sequence[Selection], grids: Sequence[np.ndarray]
) -> Image.Image:
    """The picture over a line (or more, where it is narrow) with each colour, its meaning and its tokens."""
    size = max(14, min(picture.height // 45, picture.width // 60))
    font = ImageFont.load_default(size)
    kept = sum(view.kept for view in views)
    total = sum(view.total for view in views)
    entries = [(EDGE, f"kept {kept} of {total} tokens ({kept / total:.1%})")]
    for kind in TINTS:
        if count := sum(int((where == kind).sum()) for where in grids):
            entries.append((TINTS[kind], f"dropped, {_label(kind, views[0])}: {count}"))
    grouped = [(view, view.groups) for view in views if view.groups is not None]
    if grouped:
        dropped = sum(len(groups.seen) - view.kept for view, groups in grouped)
        count = sum(len(np.unique(groups.group)) for _, groups in grouped)
        entries.append((MEANING, f"dropped, by meaning: {dropped} (a colour for each of {count} groups)"))
    widths = [int(size * 2.4 + font.getlength(label)) for _, label in entries]
    across = max(picture.width, max(widths) + size // 2)
    x = size // 2
    line = 0
    places: list[tuple[int, int]] = []
    for width in widths:
        if places and x + width > across:
            x = size // 2
            line = line + 1
        places.append((x, picture.height + size // 2 + line * 2 * size))
        x += width
    full = Image.new("RGB", (across, picture.height + 2 * size * (line + 1)), "white")
    full.paste(picture, (0, 0))
    draw = ImageDraw.Draw(full)
    for (colour, label), (x, y) in zip(entries, places, strict=True):
        shade = (
            colour
            if colour == EDGE
            else tuple(int(v) for v in _faded(np.array([[[200.0]]]), colour).reshape(3))
        )
        draw.rectangle((x, y, x + size, y + size), fill=shade, outline=colour, width=max(1, size // 8))
        draw.text((x + size * 1.4, y + size / 2), label, fill="black", font=font, anchor="lm")
    return full


def _faded(gray: np.ndarray, tint: tuple[int, int, int]) -> np.ndarray:
    """Gray values [..., 1] under a tint: [..., 3]."""
    return 0.25 * gray + 0.25 * 255 + 0.5 * np.array(tint, np.float32)


def _label(kind: int, selection: Selection) -> str:
    """What a tint means."""
    prune = selection.prune
    if kind == BESIDE:
        return "from beside" if prune is not None and prune.method == "serpentine" else "from the left"
    if kind == ABOVE:
        return "from above"
    if prune is not None and prune.method == "raster":
        return "from the row before"
    if prune is not None and prune.method == "pred_2d":
        return "over the budget" if prune.max_tokens is not None else "as before"
    return {"unique": "copies", "conncomp": "of their component"}.get(
        prune.method if prune else "", "at random"
    )
