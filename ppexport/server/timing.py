"""How long the first token of a picture will take, from how long those of past requests took."""

from __future__ import annotations

from collections import deque

import numpy as np

from ..runtime.stats import Stats

REMEMBERED = 64  # requests


class Timing:
    """Milliseconds of a stage against the tokens that it ran, of the last requests."""

    def __init__(self) -> None:
        self._vision: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._prefill: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def add(self, stats: Stats) -> None:
        """Remember a request."""
        ms = stats.milliseconds
        if stats.kept and not stats.reused_tokens and "vision" in ms:
            self._vision.append((stats.kept, ms["vision"]))
        if "prefill" in ms:
            self._prefill.append((stats.prompt_tokens - stats.reused_tokens, ms["prefill"]))

    def first_token(self, kept: int, text: int) -> float | None:
        """For so many kept tokens of a picture and so many of text; None before any picture has been seen."""
        if not self._vision:
            return None
        return predicted(list(self._vision), kept) + predicted(list(self._prefill), kept + text)


def predicted(known: list[tuple[int, float]], tokens: int) -> float:
    """A line through what is known, least squares; through the origin where all have about as many tokens.

    From 100 tokens in 60 ms and 300 in 160 ms, 200 take 110 ms.
    """
    counts, ms = np.array(known, float).T
    if counts.max() < 1.2 * counts.min():
        return float(np.median(ms / np.maximum(counts, 1)) * tokens)
    slope, base = np.polyfit(counts, ms, 1)
    return float(max(base + slope * tokens, ms.min() * min(1.0, tokens / counts.max())))
