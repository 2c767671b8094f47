"""``ppexport inspect``: what would be pruned of an image, as numbers and as a picture. No model is needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .models.errors import ImageError
from .runtime.image import ImageLike, read
from .runtime.prune import Prune, Selection

DROPPED = (255, 0, 110)  # tint of what is dropped
EDGE = (0, 200, 90)  # outline around what is kept


def mode_of(prune: Prune) -> str:
    """ "anchored" or "sliding"."""
    return "anchored" if prune.anchored else "sliding"


def as_json(selection: Selection, prune: Prune) -> dict[str, object]:
    """The selection and the setting it was made with, as plain JSON types."""
    return {
        "prune": {"method": prune.method, "metric": prune.metric, "tau": prune.tau, "mode": mode_of(prune)},
        "width": selection.width,
        "height": selection.height,
        "grid": {"rows": selection.rows, "cols": selection.cols},
        "tokens": selection.total,
        "kept": selection.kept,
        "share": round(selection.share, 6),
        "reason": selection.reason,
        "keep": selection.keep.tolist(),
    }


def overlay(image: ImageLike, selection: Selection) -> Image.Image:
    """The image as the model sees it: dropped blocks faded under a tint, kept regions untouched in a green outline.

    A line underneath says what the colours mean and how much is kept.
    """
    source = read(image).resize((selection.width, selection.height), Image.Resampling.BICUBIC)
    kept = np.zeros(selection.total, bool)
    kept[selection.keep] = True
    grid = kept.reshape(selection.rows, selection.cols)
    block = selection.width // selection.cols
    pixels = np.asarray(source).astype(np.float32)
    mask = np.repeat(np.repeat(~grid, block, axis=0), block, axis=1)[:, :, None]
    gray = pixels.mean(axis=2, keepdims=True)
    faded = 0.25 * gray + 0.25 * 255 + 0.5 * np.array(DROPPED, np.float32)
    picture = Image.fromarray(np.where(mask, faded, pixels).clip(0, 255).astype(np.uint8))
    _outline(ImageDraw.Draw(picture), grid, block)
    return _with_legend(picture, selection)


def write_overlay(image: ImageLike, selection: Selection, path: str | Path) -> None:
    """Draw and save the overlay; the format follows the file name. Raises ImageError if it cannot be written.

    It is drawn into a file beside ``path`` and renamed, so an existing file is replaced whole or not at all.
    """
    target = check_overlay(path, image)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    try:
        overlay(image, selection).save(partial)
        partial.replace(target)
    except (OSError, ValueError) as err:
        partial.unlink(missing_ok=True)
        raise ImageError(f"{path}: the overlay cannot be written: {err}") from err


def check_overlay(path: str | Path, image: ImageLike) -> Path:
    """The path if an overlay of ``image`` can be written there; raises ImageError before any work is done."""
    target = Path(path)
    if target.suffix.lower() not in Image.registered_extensions():
        raise ImageError(f"{path}: the overlay cannot be written, expected a name that ends in .png or .jpg")
    if target.is_dir() or not target.parent.is_dir():
        raise ImageError(f"{path}: the overlay cannot be written, expected a file in an existing directory")
    if isinstance(image, (str, os.PathLike)) and target.exists() and target.samefile(image):
        raise ImageError(f"{path}: is the image itself, expected another name for the overlay")
    return target


def _outline(draw: ImageDraw.ImageDraw, grid: np.ndarray, block: int) -> None:
    """A line wherever a kept block touches a dropped one or the border."""
    width = max(2, block // 12)
    padded = np.pad(grid, 1)
    for row, col in np.argwhere(grid):
        x, y = col * block, row * block
        right, bottom = x + block - 1, y + block - 1
        if not padded[row, col + 1]:
            draw.line((x, y, right, y), EDGE, width)
        if not padded[row + 2, col + 1]:
            draw.line((x, bottom, right, bottom), EDGE, width)
        if not padded[row + 1, col]:
            draw.line((x, y, x, bottom), EDGE, width)
        if not padded[row + 1, col + 2]:
            draw.line((right, y, right, bottom), EDGE, width)


def _with_legend(picture: Image.Image, selection: Selection) -> Image.Image:
    size = max(14, picture.height // 45)
    font = ImageFont.load_default(size)
    full = Image.new("RGB", (picture.width, picture.height + 2 * size), "white")
    full.paste(picture, (0, 0))
    draw = ImageDraw.Draw(full)
    x, y = size // 2, picture.height + size // 2
    text = f"kept {selection.kept} of {selection.total} tokens ({selection.share:.1%})"
    for colour, label in ((EDGE, text), (DROPPED, f"dropped {selection.total - selection.kept}")):
        draw.rectangle((x, y, x + size, y + size), fill=colour)
        draw.text((x + size * 1.4, y + size / 2), label, fill="black", font=font, anchor="lm")
        x += int(size * 2.4 + draw.textlength(label, font=font))
    return full
