"""Assertions that hold for every pruning setting and every model."""

from __future__ import annotations

import numpy as np

from ppexport import Selection


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected magnitude."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_selection(selection: Selection) -> None:
    """Kept indices are sorted, unique, in range, and start with token 0."""
    keep = selection.keep
    assert keep.dtype == np.int32
    assert keep[0] == 0
    assert (np.diff(keep) > 0).all()
    assert keep[-1] < selection.total


def check_order(order: np.ndarray, count: np.ndarray, total: int) -> None:
    """``order`` is a permutation: kept indices rising, then dropped indices rising; 1 <= count <= N."""
    K = int(count[0])
    assert 1 <= K <= total
    assert sorted(order.tolist()) == list(range(total))
    assert (np.diff(order[:K]) > 0).all()
    assert (np.diff(order[K:]) > 0).all()
