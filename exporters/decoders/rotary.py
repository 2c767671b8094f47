"""Rotary positions of decoders: on any number of axes, in blocks of frequencies or by turns, of a head or a part of it.

Source: transformers ``modeling_rope_utils`` and the ``apply_*_rotary_pos_emb`` of its models.
"""

from __future__ import annotations

import math

import numpy as np

from ...models.config import Rope


def axis_frequencies(rope: Rope) -> np.ndarray:
    """Angle per position of each pair of turned values, in the row of the axis that it turns with.

    Float32 [A, width / 2]; the other rows are zero, so that the angles are a sum over the axes. With sections (2, 1, 1)
    the rows hold frequencies 0 1, 2 and 3; interleaved, 0 3, 1 and 2: every axis but the first takes its turn as long
    as it has frequencies left, and the first gets the others.
    """
    axes = len(rope.sections)
    if rope.interleaved:
        axis = np.zeros(rope.width // 2, np.int64)
        for a in range(1, axes):
            axis[a : axes * rope.sections[a] : axes] = a
    else:
        axis = np.repeat(np.arange(axes), rope.sections)
    return np.where(axis == np.arange(axes)[:, None], _frequencies(rope), 0).astype(np.float32)


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by."""
    return 1.0 if rope.yarn is None else rope.yarn.attention_factor


def _frequencies(rope: Rope) -> np.ndarray:
    """Angle per position of each pair, whatever its axis: float32 [width / 2].

    With YaRN, frequencies that turn fewer than ``beta_slow`` times within the context of the training are divided by
    ``factor``, those that turn more than ``beta_fast`` times stay, and a linear ramp lies between. Source: transformers
    ``modeling_rope_utils._compute_yarn_parameters``.
    """
    pairs = np.arange(rope.width // 2, dtype=np.float32)
    inv_freq = 1.0 / rope.theta ** (pairs * 2 / rope.width)
    yarn = rope.yarn
    if yarn is None:
        return inv_freq

    def pair_that_turns(times: float, context: int = yarn.original_context) -> float:
        return rope.width * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = pair_that_turns(yarn.beta_fast)
    high = pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, rope.width - 1)
    high = high + 0.001 if high == low else high
    stretched = np.clip((pairs - low) / (high - low), 0, 1)
    return inv_freq / yarn.factor * stretched + inv_freq * (1 - stretched)
