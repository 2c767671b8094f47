"""Percentiles, bootstrap intervals, and what became of a metric between two measurements."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
ERROR_RESAMPLES = 100  # for a standard error, which needs fewer than a quantile
BLOCKS = 12
FEWEST = 6  # with fewer, Student's quantile and its expansion say nothing
QUANTILE = {"p10": 0.1, "median": 0.5, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def statistic(values: np.ndarray, name: str, axis: int = -1) -> np.ndarray:
    """The "mean", "median", "p90" ... along an axis."""
    if name == "mean":
        return np.asarray(np.mean(values, axis=axis))
    return np.asarray(np.quantile(values, QUANTILE[name], axis=axis))


def interval(groups: Sequence[np.ndarray], name: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """A statistic of all values together, and its 95 % interval.

    ``groups``: what was measured together (a round), which is resampled as a whole: neighbours in time resemble each
    other. With one group there is nothing to resample but its values.
    """
    if len(groups) == 1:
        groups = [groups[0][i : i + 1] for i in range(len(groups[0]))]
    value = float(statistic(np.concatenate(groups), name))
    found = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        found.append(statistic(np.concatenate([groups[i] for i in drawn]), name))
    low, high = np.quantile(found, [0.025, 0.975])
    return value, float(low), float(high)


def ratio(
    base: np.ndarray, new: np.ndarray, name: str, confidence: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """How many times as long the new values take: the ratio and its interval.

    base, new [rounds, items]: each item is compared with itself, and the ratio is the geometric mean over the items, so
    that a workload of small and large images has one answer. A machine is slow or fast for many rounds in a row, so
    each measurement is cut into BLOCKS of consecutive rounds, and the standard error comes from resampling those. The
    interval is Student's, since blocks are few and confidence is high.
    """
    value = float(np.exp(np.log(statistic(new, name, 0) / statistic(base, name, 0)).mean()))
    variances = []
    counts = []
    for values in (base, new):
        count = min(BLOCKS, len(values))
        size = len(values) // count
        blocks = values[len(values) - count * size :].reshape(count, size, -1)
        chosen = rng.integers(count, size=(ERROR_RESAMPLES, count))
        drawn = blocks[chosen].reshape(ERROR_RESAMPLES, count * size, -1)
        logs = np.log(statistic(drawn, name, 1)).mean(1)
        # resampling n values underestimates their spread by (n - 1) / n
        variances.append(float(logs.var()) * count / max(1, count - 1))
        counts.append(count)
    if min(counts) < FEWEST:
        return value, 0.0, float("inf")
    total = sum(variances)
    degrees = total**2 / max(
        sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True)), 1e-300
    )  # Welch
    spread = _student(confidence, max(1.0, degrees)) * total**0.5
    return value, value * float(np.exp(-spread)), value * float(np.exp(spread))


def _student(confidence: float, degrees: float) -> float:
    """Two-sided quantile of Student's t: the normal one and two terms of its expansion (Fisher and Cornish)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
