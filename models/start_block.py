"""Where PruneSID's search for components starts."""

from __future__ import annotations

import functools

import numpy as np

from .pruners.prunesid import MOST_DIRECTIONS


@functools.lru_cache(maxsize=4)
def start_block(width: int) -> np.ndarray:
    """Directions of features with so many values: float32 [width, MOST_DIRECTIONS] in -1 ... 1.

    Scrambled indices (the finalizer of SplitMix64, Steele et al. 2014): the same on every machine and forever.
    """
    bits = np.arange(width * MOST_DIRECTIONS, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    found = ((bits >> np.uint64(40)).astype(np.float64) / (1 << 23) - 1).astype(np.float32)
    found.flags.writeable = False
    return found.reshape(width, MOST_DIRECTIONS)
