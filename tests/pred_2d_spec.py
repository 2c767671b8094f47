"""The obvious, slow specification of pred_2d with metric max in sliding mode: loops over integers."""

from __future__ import annotations

import numpy as np


def pred_2d(image: np.ndarray, block: int, threshold: int) -> list[int]:
    """Kept token indices of a uint8 image [H, W, 3] in raster order."""
    rows, cols = image.shape[0] // block, image.shape[1] // block

    def token(r: int, c: int) -> np.ndarray:
        return image[r * block : (r + 1) * block, c * block : (c + 1) * block].astype(int)

    def match(a: np.ndarray, b: np.ndarray) -> bool:
        return int(abs(a - b).max()) <= threshold

    kept = []
    for r in range(rows):
        for c in range(cols):
            x = token(r, c)
            if r == 0 and c == 0:
                kept.append(0)
                continue
            if r == 0:
                prediction = token(r, c - 1)
            elif c == 0:
                prediction = token(r - 1, c)
            else:
                a, b, corner = token(r, c - 1), token(r - 1, c), token(r - 1, c - 1)
                prediction = b if match(corner, a) and not match(corner, b) else a
            if not match(x, prediction):
                kept.append(r * cols + c)
    return kept
