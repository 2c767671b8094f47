"""The obvious, slow specification of pruning: loops over integers. What the graphs of exporters/prune.py must equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np


def distance(metric: str, a: np.ndarray, b: np.ndarray) -> int:
    """In the unit of the threshold: largest difference, sum of differences, sum of their squares."""
    difference = abs(a.astype(np.int64) - b.astype(np.int64))
    if metric == "max":
        return int(difference.max())
    return int(difference.sum() if metric == "mae" else (difference**2).sum())


def select(image: np.ndarray, block: int, method: str, metric: str, threshold: int, anchored: bool) -> list[int]:
    """Kept token indices of a uint8 image [H, W, 3] in raster order."""
    return sorted(anchors_of(image, block, method, metric, threshold, anchored)[0])


def anchors_of(
    image: np.ndarray, block: int, method: str, metric: str, threshold: int, anchored: bool
) -> tuple[set[int], dict[int, int]]:
    """The kept tokens, and for each token the one that a decoder puts in its place."""
    rows, cols = image.shape[0] // block, image.shape[1] // block

    def token(index: int) -> np.ndarray:
        r, c = divmod(index, cols)
        return image[r * block : (r + 1) * block, c * block : (c + 1) * block]

    def match(a: int, b: int) -> bool:
        return distance(metric, token(a), token(b)) <= threshold

    kept, anchor = {0}, {0: 0}
    for index, before in visit(method, rows, cols):
        seen: Callable[[int], int] = anchor.__getitem__ if anchored else (lambda i: i)
        prediction = before(lambda a, b, seen=seen: match(seen(a), seen(b)))
        if match(index, seen(prediction)):
            anchor[index] = anchor[prediction]
        else:
            kept.add(index)
            anchor[index] = index
    return kept, anchor


def visit(method: str, rows: int, cols: int) -> list[tuple[int, Callable[[Callable[[int, int], bool]], int]]]:
    """The tokens after the first in the order of a method, each with its prediction given a comparison."""
    if method == "pred_2d":
        grid = [(r, c) for r in range(rows) for c in range(cols)][1:]
        return [(r * cols + c, lambda match, r=r, c=c: predict(match, r, c, cols)) for r, c in grid]
    order = []
    for r in range(rows):
        line = [r * cols + c for c in range(cols)]
        order += line[::-1] if method == "serpentine" and r % 2 else line
    return [(after, lambda match, before=before: before) for before, after in itertools.pairwise(order)]


def predict(match: Callable[[int, int], bool], r: int, c: int, cols: int) -> int:
    """The neighbour that pred_2d predicts a token from."""
    left, above, corner = r * cols + c - 1, (r - 1) * cols + c, (r - 1) * cols + c - 1
    if r == 0:
        return left
    if c == 0:
        return above
    return above if match(corner, left) and not match(corner, above) else left
