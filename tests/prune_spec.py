"""The obvious, slow specification of pruning: loops over integers. What pruning graphs must equal."""

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


def select(
    image: np.ndarray, block: int, method: str, metric: str, threshold: int, anchored: bool
) -> list[int]:
    """Kept token indices of a uint8 image [H, W, 3] in raster order."""
    return sorted(anchors_of(image, block, method, metric, threshold, anchored)[0])


def anchors_of(
    image: np.ndarray, block: int, method: str, metric: str, threshold: int, anchored: bool
) -> tuple[set[int], dict[int, int]]:
    """The kept tokens, and for each token the one that a decoder puts in its place."""
    rows, cols = image.shape[0] // block, image.shape[1] // block

    def match(a: int, b: int) -> bool:
        return distance(metric, token(image, block, a), token(image, block, b)) <= threshold

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


def components(
    image: np.ndarray, block: int, metric: str, threshold: int, target: int, seed: int
) -> list[int]:
    """Kept token indices: the first of each connected component, and of the others an even share."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    total, first = rows * cols, {}
    for index in range(total):
        if index in first:
            continue
        first[index], open_ = index, [index]
        while open_:
            here = open_.pop()
            r, c = divmod(here, cols)
            for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                there = y * cols + x
                if not (0 <= y < rows and 0 <= x < cols) or there in first:
                    continue
                if distance(metric, token(image, block, here), token(image, block, there)) <= threshold:
                    first[there] = index
                    open_.append(there)
    count = len(set(first.values()))
    wanted, others = max(target - count, 0), total - count
    turn = lambda i: (i // cols * 1621087444 + i % cols * 1223722706 + seed * 889516852) % (2**31 - 1)  # noqa: E731
    return [i for i in range(total) if first[i] == i or turn(i) * others < wanted * (2**31 - 1)]


def frame(
    image: np.ndarray, reference: np.ndarray | None, block: int, metric: str, threshold: int, anchored: bool
) -> tuple[list[int], np.ndarray]:
    """What is kept of a frame, given what was shown before, and what is shown for it."""
    rows, cols = image.shape[0] // block, image.shape[1] // block
    kept, shown = [], image.copy()
    far = lambda a, b: distance(metric, a, b) > threshold  # noqa: E731
    for index in range(rows * cols):
        own, rebuilt = token(image, block, index), token(shown, block, index)
        if reference is not None and not far(own, token(reference, block, index)):
            if anchored:
                rebuilt[...] = token(reference, block, index)
            continue
        if index == 0:
            kept.append(0)
            continue
        match = lambda a, b: not far(token(shown, block, a), token(shown, block, b))  # noqa: E731
        repeated = token(shown, block, predict(match, *divmod(index, cols), cols))
        if far(own, repeated):
            kept.append(index)
        elif anchored:
            rebuilt[...] = repeated
    return kept, shown


def token(image: np.ndarray, block: int, index: int) -> np.ndarray:
    """The pixels of a token, as a view."""
    r, c = divmod(index, image.shape[1] // block)
    return image[r * block : (r + 1) * block, c * block : (c + 1) * block]
