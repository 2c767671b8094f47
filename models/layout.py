"""Where tokens stand: positions and feature rows of a prompt, settled when it is known what is kept of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import RequestError
from .family import Kept, Placed, Prompt

Place = Callable[[Kept], Placed]


def lay_out(ids: np.ndarray, image_token: int, kept: Sequence[Kept], axes: int, place: Place) -> Prompt:
    """Put what is left of every image where its placeholders stand; text counts on by one on all axes.

    ids int32 [S'], every image as a run of placeholders. ``place`` says what stands there instead, and how far the text
    after it moves on. With one axis, placeholder 9 and an image of which two tokens are left, at 0 and 0 and followed
    by a text at 1, [5, 9, 9, 9, 6] becomes [5, 9, 9, 6] at 0, 1, 1, 2. Raises RequestError if placeholders and images
    do not match.
    """
    runs = [image.shown.placeholders for image in kept]
    starts = _image_starts(ids == image_token, runs)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []  # ids, positions, rows, image
    first_rows = []
    done = 0
    position = 0
    row = 0

    def text(end: int) -> None:
        nonlocal position
        n = end - done
        at = np.broadcast_to(position + np.arange(n), (axes, n))
        parts.append((ids[done:end], at, np.full(n, -1), -1))
        position += n

    for number, (start, image) in enumerate(zip(starts, kept, strict=True)):
        text(start)
        placed = place(image)
        n = len(placed.rows)
        parts.append((np.full(n, image_token), position + placed.positions, row + placed.rows, number))
        first_rows.append(row)
        position += placed.advance
        row += placed.count if n else 0
        done = start + image.shown.placeholders
    text(len(ids))
    image_of = np.concatenate([np.full(len(part[0]), part[3]) for part in parts])
    return Prompt(
        ids=np.concatenate([part[0] for part in parts]).astype(np.int32),
        positions=np.concatenate([part[1] for part in parts], axis=1).astype(np.int32),
        image_of=image_of.astype(np.int32),
        feature_rows=np.concatenate([part[2] for part in parts]).astype(np.int32),
        first_rows=np.array(first_rows, np.int32),
        next_position=position,
        full_length=len(ids),
    )


def on_grid(image: Kept) -> Placed:
    """Positions of Qwen's multimodal rotary embedding: (0, row, column); text goes on after the longer side.

    Kept tokens have those of the full grid. Source: transformers ``get_rope_index`` of models/qwen3_vl.
    """
    (view,) = image.shown.views
    rows, columns = view.grid
    row, column = np.divmod(image.keep, columns)
    n = len(image.keep)
    return Placed(np.arange(n), np.stack([np.zeros(n, int), row, column]), max(rows, columns), n)


def one_after_the_other(rows: np.ndarray, count: int) -> Placed:
    """Positions that count on as for text: rows int32 [n] of ``count`` stand at 0 ... n - 1."""
    n = len(rows)
    return Placed(rows, np.arange(n)[None], n, count)


def _image_starts(is_image: np.ndarray, totals: Sequence[int]) -> list[int]:
    """Where each image's placeholders start; each image's are consecutive. Raises RequestError if they do not match."""
    where = np.flatnonzero(is_image)
    ends = np.cumsum(totals, dtype=np.int64)
    matches = len(where) == sum(totals) and all(
        where[end - 1] - where[end - total] == total - 1 for end, total in zip(ends, totals, strict=True)
    )
    if not matches:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_image, [False]]).astype(np.int8)))
        raise RequestError(
            f"the prompt has image placeholders in runs of {(edges[1::2] - edges[::2]).tolist()} tokens, expected "
            f"{list(totals)} (of {len(totals)} whole images)"
        )
    return [int(where[end - total]) for end, total in zip(ends, totals, strict=True)]
