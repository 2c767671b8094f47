"""Where tokens stand: positions and feature rows of a prompt, settled when it is known what is kept of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import RequestError
from .family import Kept, Prompt

Place = Callable[[Kept], tuple[np.ndarray, int]]


def lay_out(ids: np.ndarray, image_token: int, kept: Sequence[Kept], axes: int, place: Place) -> Prompt:
    """Give every token of the full grids its position, then take what is kept, images in the order of their ``keep``.

    ids int32 [S'], every image as a run of its N placeholders. Text counts on by one on all axes. ``place`` says where
    the tokens of an image stand, int32 [axes, N] counted from its beginning, and how far the text after it moves on.
    With one axis, placeholder 9 and an image of two tokens that ``place`` puts at 0 and 0 and gives one position,
    [5, 9, 9, 6] stands at 0, 1, 1, 2. Raises RequestError if placeholders and images do not match.
    """
    starts = _image_starts(ids == image_token, [image.total for image in kept])
    S = len(ids)
    positions = np.empty((axes, S), np.int32)
    image_of = np.full(S, -1, np.int32)
    taken = []
    done = 0
    position = 0
    for number, (start, image) in enumerate(zip(starts, kept, strict=True)):
        end = start + image.total
        positions[:, done:start] = position + np.arange(start - done)
        position += start - done
        within, advance = place(image)
        positions[:, start:end] = position + within
        position += advance
        image_of[start:end] = number
        taken += [np.arange(done, start), start + image.keep]
        done = end
    positions[:, done:] = position + np.arange(S - done)
    next_position = position + S - done
    kept_tokens = np.concatenate([*taken, np.arange(done, S)])
    image_of = image_of[kept_tokens]
    rows = np.where(image_of >= 0, np.cumsum(image_of >= 0) - 1, -1).astype(np.int32)
    return Prompt(
        ids[kept_tokens].astype(np.int32), positions[:, kept_tokens], image_of, rows, next_position, S
    )


def on_grid(image: Kept) -> tuple[np.ndarray, int]:
    """Positions of Qwen's multimodal rotary embedding: (0, row, column); text goes on after the longer side.

    Source: transformers ``get_rope_index`` of models/qwen3_vl.
    """
    (view,) = image.views
    rows, columns = view.grid
    row, column = np.divmod(np.arange(view.total), columns)
    return np.stack([np.zeros(view.total, int), row, column]), max(rows, columns)


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
            f"{list(totals)} (the full grids of {len(totals)} images)"
        )
    return [int(where[end - total]) for end, total in zip(ends, totals, strict=True)]
