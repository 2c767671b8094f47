"""How the next token is chosen from its logits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..models.checks import integer, number
from ..models.errors import BackendError

BUCKETS = 4096  # that tokens are sorted into by their logits
FEW = 64  # buckets that a search for the first tokens begins with
HOTTEST = 1e6  # temperature, at which all tokens are alike
NEGLIGIBLE = 100.0  # temperatures below the best logit from which on a token is never drawn: exp(-100)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely one (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0  # smallest set of tokens that holds this much probability
    top_k: int = 0  # at most this many tokens; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        number("temperature", self.temperature, f"0 (greedy) to {HOTTEST:g}", 0, HOTTEST)
        number("top_p", self.top_p, "more than 0 and at most 1", 0, 1, above_low=True)
        integer("top_k", self.top_k)
        integer("seed", self.seed)

    def rng(self) -> np.random.Generator:
        """A generator that repeats itself for the same seed."""
        return np.random.default_rng(self.seed)

    def choose(self, logits: np.ndarray, rng: np.random.Generator) -> int:
        """A token from logits float32 [V].

        Tokens are ranked by falling logit, equal ones by rising number. ``top_k`` keeps the first ranks, ``top_p`` the
        first of those that together hold that share of their probability; one uniform number from ``rng`` then falls
        into the cumulated probability of what is left. Raises BackendError if the best logit is not a finite number.
        """
        best = int(logits.argmax())  # of a NaN, if there is one
        if not math.isfinite(logits[best]):
            raise BackendError(
                f"the model computed {logits[best]} as the logit of token {best}, expected a finite number: its "
                "weights are damaged, or a graph in 16 bits overflowed; try 'ppexport verify', or build it with "
                "--precision bf16 or fp32"
            )
        if self.temperature == 0:
            return best
        ranking = Ranking(logits, self.temperature)
        if self.top_k and self.top_k < len(logits):
            tokens = ranking.first(self.top_k)
            cumulated = np.cumsum(np.exp(ranking.below[tokens]))
            total = cumulated[-1]
            if self.top_p < 1:
                total = cumulated[np.searchsorted(cumulated, self.top_p * total, "left")]
            rank = int(np.searchsorted(cumulated, rng.random() * total, "right"))
            return int(tokens[min(rank, len(tokens) - 1)])
        total = ranking.total
        if self.top_p < 1:
            total = ranking.at_mass(self.top_p * total, "left")[1]
        return ranking.at_mass(rng.random() * total, "right")[0]


class Ranking:
    """Tokens in the order of their probability, without sorting all of them: ten times as fast at V = 151936.

    Tokens are put into buckets by how far their logit lies below the best one, and only the bucket that a question
    falls into is sorted. With logits 5, 1, 4.9, 0 and buckets one wide, bucket 0 holds tokens 0 and 2, bucket 4 token
    1, bucket 5 token 3; the token at 60 % of the probability lies in bucket 0, so 1 and 3 are never compared.
    """

    def __init__(self, logits: np.ndarray, temperature: float):
        self.logits = logits
        self.below = logits.astype(np.float64)
        self.below -= self.below.max()
        with np.errstate(over="ignore"):  # infinitely far below
            self.below /= temperature  # [V], how far below the best one, in temperatures
        near = np.maximum(self.below, -NEGLIGIBLE)  # the last bucket holds all that is farther
        near *= -BUCKETS / (-near.min() or 1.0)
        self.bucket_of = near.astype(np.intp)  # [V]

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Probabilities but for their sum, [V]."""
        return np.exp(self.below)

    @functools.cached_property
    def total(self) -> float:
        """The sum of all weights."""
        return float(self.weights.sum())

    @functools.cached_property
    def mass_until(self) -> np.ndarray:
        """The weight of all buckets before each, [BUCKETS + 2]."""
        return np.concatenate([[0.0], np.cumsum(np.bincount(self.bucket_of, self.weights, BUCKETS + 1))])

    def first(self, count: int) -> np.ndarray:
        """The first ``count`` tokens, the best first; count is at most V."""
        limit = FEW
        while len(inside := np.flatnonzero(self.bucket_of < limit)) < count:
            limit *= 4
        return self._best_first(inside)[:count]

    def at_mass(self, mass: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """The first token at which the cumulated weight reaches ("left") or exceeds ("right") ``mass``.

        Also returns the weight up to and with it.
        """
        bucket = int(np.searchsorted(self.mass_until[1:], mass, side))
        if bucket > BUCKETS or self.mass_until[bucket] == self.mass_until[bucket + 1]:
            bucket = int(
                np.flatnonzero(np.diff(self.mass_until))[-1]
            )  # rounding: the last one that weighs anything
        inside = self._best_first(np.flatnonzero(self.bucket_of == bucket))
        cumulated = self.mass_until[bucket] + np.cumsum(self.weights[inside])
        rank = min(int(np.searchsorted(cumulated, mass, side)), len(inside) - 1)
        return int(inside[rank]), float(cumulated[rank])

    def _best_first(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens (rising) by falling logit, equal ones by rising number."""
        return tokens[np.argsort(-self.logits[tokens], kind="stable")]
