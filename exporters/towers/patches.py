"""The pixels of kept tokens, which is all that a tower reads of an image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...models.config import Preprocessing, VisionConfig


def kept_patches(
    image: Tensor, row: Tensor, col: Tensor, cols: int, c: VisionConfig, cast_to: torch.dtype | None = None
) -> Tensor:
    """Pixels of the kept blocks, patch by patch: float32 [T, patch * patch * 3], 0..255.

    image uint8 [H, W, 3]; row, col int32 [K], their places in a grid with ``cols`` columns. The image is a table of
    segments, one per pixel row of a block: block * 3 bytes each, contiguous. ``cast_to``: the dtype to read it in, for
    dialects that gather no bytes.
    """
    if cast_to is not None:  # 0 ... 255 is exact in 16 bits
        image = image.to(cast_to)
    segments = image.reshape(-1, c.block * c.channels)
    line = torch.arange(c.block, device=image.device, dtype=torch.int32)
    index = (row.unsqueeze(1) * c.block + line) * cols + col.unsqueeze(1)
    kept = segments.index_select(0, index.reshape(-1))
    kept = kept.reshape(-1, c.merge, c.patch, c.merge, c.patch * c.channels).transpose(2, 3)
    return kept.reshape(-1, c.patch * c.patch * c.channels).float()


def pixel_constants(c: VisionConfig, pre: Preprocessing) -> dict[str, np.ndarray]:
    """Scale and shift of a patch's pixels, mean and std folded: float32 [patch * patch * 3] each."""
    mean = np.array(pre.mean)
    std = np.array(pre.std)
    return {
        "scale": np.tile(1 / (255 * std), c.patch * c.patch).astype(np.float32),
        "shift": np.tile(-mean / std, c.patch * c.patch).astype(np.float32),
    }
