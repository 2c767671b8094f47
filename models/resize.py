"""Which size an image gets before a vision tower looks at it."""

from __future__ import annotations

import math

from .checks import integer
from .errors import ImageError, RequestError

MAX_ASPECT = 200  # as in transformers
MIN_SIDE = 2  # a 1 x 1 image is a tracking pixel or a failed capture, not a document
MAX_PIXELS = 100_000_000  # of any picture, decoded or resized


def smart_resize(height: int, width: int, block: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width, both multiples of ``block``, near the given ones, with min_pixels <= H * W <= max_pixels
    (more than max_pixels only where one block is already higher or wider than the picture may be).

    Source: transformers ``models/qwen2_vl/image_processing_pil_qwen2_vl.py``. Raises ImageError for a side under
    MIN_SIDE or an aspect ratio over MAX_ASPECT, RequestError for impossible limits.
    """
    integer("min_pixels", min_pixels, 1)
    integer("max_pixels", max_pixels, 1)
    if min_pixels > max_pixels or max_pixels < block * block:
        raise RequestError(
            f"min_pixels is {min_pixels} and max_pixels {max_pixels}, expected 0 < min_pixels <= max_pixels and "
            f"max_pixels of at least {block * block} (one {block} x {block} block)"
        )
    check_sides(height, width)
    H = round(height / block) * block
    W = round(width / block) * block
    if max_pixels < H * W:
        shrink = math.sqrt(height * width / max_pixels)
        H = max(block, math.floor(height / shrink / block) * block)
        W = max(block, math.floor(width / shrink / block) * block)
    elif min_pixels > H * W:
        grow = math.sqrt(min_pixels / (height * width))
        H = math.ceil(height * grow / block) * block
        W = math.ceil(width * grow / block) * block
    return within_limit(H, W)


def check_sides(height: int, width: int) -> None:
    """Raise ImageError for a side under MIN_SIDE or an aspect ratio over MAX_ASPECT."""
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"the image is {width} x {height} pixels, expected at least {MIN_SIDE} on each side")
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ImageError(
            f"the image is {width} x {height} pixels, an aspect ratio of {aspect:.0f}, "
            f"expected at most {MAX_ASPECT}; cut it into pieces"
        )


def within_limit(height: int, width: int) -> tuple[int, int]:
    """The same size; raises ImageError for more than MAX_PIXELS."""
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"the image would be resized to {width} x {height} pixels, expected at most {MAX_PIXELS} pixels"
        )
    return height, width
