"""How tokens are drawn: against a full sort, for every setting, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import ppexport
from ppexport.runtime.sampling import Ranking, Sampling


def by_full_sort(sampling: Sampling, logits: np.ndarray, rng: np.random.Generator) -> int:
    """The specification: sort all tokens, cut, draw."""
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    best_first = logits[order].astype(np.float64)
    p = np.exp((best_first - best_first[0]) / sampling.temperature)
    p /= p.sum()
    count = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
    p = p[:count] / p[:count].sum()
    return int(order[rng.choice(len(p), p=p)])


def peaked(rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(0, 2, 5000)
    logits[rng.integers(0, 5000, 5)] += 12
    return logits


LOGITS = {
    "normal": lambda rng: rng.normal(0, 3, 5000),
    "peaked": peaked,
    "few values": lambda rng: rng.integers(0, 6, 3000),
    "all equal": lambda rng: np.zeros(500),
    "masked": lambda rng: np.where(rng.random(3000) < 0.9, -np.inf, rng.normal(0, 3, 3000)),
    "outlier": lambda rng: np.concatenate([rng.normal(0, 3, 3000), [-1e9]]),
    "one": lambda rng: np.zeros(1),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (40, 1.0), (0, 0.9), (0, 0.01), (40, 0.5), (9999, 1)]
)
def test_draws_equal_a_full_sort(kind: str, temperature: float, top_k: int, top_p: float) -> None:
    made = np.random.default_rng(1)
    for seed in range(20):
        logits = LOGITS[kind](made).astype(np.float32)
        sampling = Sampling(temperature, top_p, top_k, seed)
        ours, expected = sampling.rng(), sampling.rng()
        for _ in range(5):
            assert sampling.choose(logits, ours) == by_full_sort(sampling, logits, expected)


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 1e6])
def test_the_coldest_and_the_hottest(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
    sampling = Sampling(temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token = sampling.choose(logits, sampling.rng())
    assert token == logits.argmax() or temperature > 1
    with pytest.raises(
        ppexport.RequestError, match=r"temperature is 1e\+308, expected 0 \(greedy\) to 1e\+06"
    ):
        Sampling(1e308)


def test_only_one_bucket_is_sorted() -> None:
    """At the vocabulary of Qwen3-VL: that is what takes 0.5 ms, and a full sort 12."""
    logits = np.random.default_rng(0).normal(0, 3, 151936).astype(np.float32)
    sizes = np.bincount(Ranking(logits, 1.0).bucket_of)
    assert sizes.max() < len(logits) / 500


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_the_run(bad: float, temperature: float) -> None:
    logits = np.zeros(10, np.float32)
    logits[3] = bad
    sampling = Sampling(temperature)
    with pytest.raises(
        ppexport.BackendError, match=r"computed (nan|inf) as the logit of token 3, expected a finite"
    ):
        sampling.choose(logits, sampling.rng())


def test_logits_that_are_all_masked_end_the_run() -> None:
    with pytest.raises(ppexport.BackendError, match="computed -inf as the logit of token 0"):
        Sampling().choose(np.full(10, -np.inf, np.float32), Sampling().rng())
