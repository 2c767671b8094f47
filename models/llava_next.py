"""LLaVA-NeXT (Hugging Face ``model_type`` "llava_next"): an image is shown whole and in tiles.

Source: transformers ``models/llava_next`` and ``image_processing_utils.select_best_resolution``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .attention_decoder import Table, is_tied
from .config import ModelConfig, Preprocessing, VisionConfig, Weight
from .family import Frame, Kept, Placed, View, Views
from .hfconfig import Reader
from .layout import one_after_the_other
from .llava import PREPROCESSING, Llava
from .resize import check_sides

NEWLINE = "model.image_newline"


class LlavaNext(Llava):
    """What it does not say is as in LLaVA-1.5."""

    model_type = "llava_next"
    preprocessing = replace(PREPROCESSING, shortest_edge=0)

    def is_tied(self, top: Reader, text: Mapping[str, Any]) -> bool:
        """Is the output head the embedding table?"""
        return is_tied(top, text)

    def pinpoints(self, top: Reader) -> tuple[tuple[int, int], ...]:
        """Height and width of every grid of tiles that an image may be shown in, in pixels."""
        default = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        found = top.get("image_grid_pinpoints", list, default)
        return pairs(top, found)

    def vision_weights(self, c: VisionConfig) -> Table:
        """See llava.Llava."""
        return {**super().vision_weights(c), "row_end": Weight(NEWLINE, (c.out_width,))}

    def views(self, model: ModelConfig, pre: Preprocessing, height: int, width: int) -> Views:
        """See family.Family: the whole image, then the tiles of a larger picture of it, row after row."""
        check_sides(height, width)
        c = model.vision
        side = c.side
        grid = side // c.patch
        best = best_grid(height, width, c.pinpoints)
        H, W = fitted(height, width, *best)
        tiles = Frame(H, W, (-((best[0] - H) // 2), -((best[1] - W) // 2), *best))
        top, left, rows, columns = unpadded(height, width, best[0] // c.patch, best[1] // c.patch)
        views = [View((0, 0, side, side), (grid, grid))]
        for y in range(0, best[0], side):
            for x in range(0, best[1], side):
                first = max(top - y // c.patch, 0), max(left - x // c.patch, 0)
                end = min(top + rows - y // c.patch, grid), min(left + columns - x // c.patch, grid)
                wanted = (*first, end[0] - first[0], end[1] - first[1])
                if min(wanted[2:]) > 0:
                    views.append(View((y, x, side, side), (grid, grid), frame=1, wanted=wanted))
        return Views((Frame(side, side), tiles), tuple(views), grid * grid + rows * (columns + 1))

    def place(self, image: Kept) -> Placed:
        """The whole image, then the tiles as one picture, row after row, each with a row's end if it keeps anything.

        In the order of groups: view after view, without ends of rows. The last row of the features is the row's end.
        """
        keeps = image.by_view()
        own = [len(keep) + (image.class_tokens and len(keep) > 0) for keep in keeps]
        count = sum(own) + 1
        if image.grouped:
            return one_after_the_other(np.arange(sum(own)), count)
        grid = image.shown.views[0].grid[1]
        at = np.cumsum([0, *own])
        found = [np.arange(len(keeps[0]))]
        tokens = []  # row of the whole picture, column of it, row of the features
        for view, keep, begin in zip(image.shown.views[1:], keeps[1:], at[1:], strict=False):
            row, column = np.divmod(keep, grid)
            patch = view.box[2] // grid
            rows = begin + np.arange(len(keep))
            tokens.append(np.stack([row + view.box[0] // patch, column + view.box[1] // patch, rows]))
        if len(keeps) == 1:  # so narrow that rows of tiles have an end and nothing else
            found.append(np.full(image.shown.placeholders - grid * grid, count - 1))
        if tokens:
            row, column, rows = np.concatenate(tokens, axis=1)
            ends = np.unique(row)
            row = np.concatenate([row, ends])
            column = np.concatenate([column, np.full(len(ends), np.iinfo(np.int32).max)])
            rows = np.concatenate([rows, np.full(len(ends), count - 1)])
            found.append(rows[np.lexsort((column, row))])
        return one_after_the_other(np.concatenate(found), count)


def pairs(r: Reader, found: list[Any]) -> tuple[tuple[int, int], ...]:
    """Heights and widths as a configuration lists them. Raises CheckpointError for anything else."""
    for pair in found:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
            r.fail(f"image_grid_pinpoints holds {pair!r:.80}, expected pairs of a height and a width")
    if not found:
        r.fail("image_grid_pinpoints is empty, expected at least one height and width")
    return tuple((pair[0], pair[1]) for pair in found)


def best_grid(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size in which most of the image's own pixels are left; of several, the smallest, and then the first."""

    def quality(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        left = min(int(width * scale) * int(height * scale), width * height)
        return left, left - size[0] * size[1]

    return max(pinpoints, key=quality)


def fitted(height: int, width: int, most_height: int, most_width: int) -> tuple[int, int]:
    """The largest size of the same shape within limits.

    Source: transformers ``image_processing_utils.get_patch_output_size``.
    """
    scale_w = most_width / width
    scale_h = most_height / height
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), most_height), most_width
    return most_height, min(math.ceil(width * scale_h), most_width)


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Which of so many rows and columns of tokens show an image of that size: top, left, height, width.

    Source: transformers ``models/llava_next/modeling_llava_next.unpad_image``.
    """
    if width / height > columns / rows:
        around = (rows - int(round(height * (columns / width), 7))) // 2
        return around, 0, rows - 2 * around, columns
    around = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, around, rows, columns - 2 * around


LLAVA_NEXT = LlavaNext()
