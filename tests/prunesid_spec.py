"""PruneSID step by step in numpy: loops where the graph has matrices, an exact SVD where it iterates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def exact_components(x: np.ndarray, groups: int) -> np.ndarray:
    """Loadings of x [T, C] on the strongest components of sigmoid(x): float64 [T, groups], positive."""
    squashed = 1 / (1 + np.exp(-x.astype(np.float64)))
    centred = squashed - squashed.mean(1, keepdims=True)
    found = np.abs(np.linalg.svd(centred, full_matrices=False)[0][:, :groups])
    return np.pad(found, ((0, 0), (0, groups - found.shape[1])))


def iterated_components(
    x: np.ndarray, start: np.ndarray, groups: int, iterations: int = 6, rotations: int = 24, polish: int = 4
) -> np.ndarray:
    """The same by subspace iteration in float32: what the graph does, one operator after the other."""
    eye = np.eye(start.shape[1], dtype=np.float32)

    def orthonormal(Y: np.ndarray, quintic: int, cubic: int) -> np.ndarray:
        gram = Y.T @ Y
        size = np.sqrt(max((gram * gram).sum(), np.float32(1e-30)))
        M = gram / size
        Z = eye / np.sqrt(size)
        for k in range(quintic + cubic):
            N = 3.4445 * eye - 4.775 * M + 2.0315 * (M @ M) if k < quintic else 1.5 * eye - 0.5 * M
            N = N.astype(np.float32)
            Z = Z @ N
            M = (M @ N) @ N
        return Y @ Z

    def eigen(H: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        W = eye
        for _ in range(steps):
            d = np.diag(H)
            gap = d[None] - d[:, None]
            root = np.abs(gap) + np.sqrt(gap * gap + 4 * H * H) + np.float32(1e-20)
            tangent = 2 * H * np.where(gap < 0, -1, 1).astype(np.float32) / root * (1 - eye)
            skew = (tangent - tangent.T) / 2
            fourth = np.linalg.matrix_power(skew, 4)
            eighth = max((fourth * fourth).sum() / 2, np.float32(1e-30))
            J = eye + skew / max(np.sqrt(np.sqrt(np.sqrt(eighth))), np.float32(1))
            for _ in range(5):
                J = np.float32(1.5) * J - np.float32(0.5) * (J @ (J.T @ J))
            H = J.T @ (H @ J)
            W = W @ J
        return W, np.diag(H)

    squashed = (1 / (1 + np.exp(-x.astype(np.float32)))).astype(np.float32)
    A = squashed - squashed.mean(1, keepdims=True)
    Q = orthonormal(A @ start, 5, 3)
    for k in range(iterations):
        Q = orthonormal(A.T @ Q, 4, 3)
        Q = orthonormal(A @ Q, 4, 5 if k == iterations - 1 else 3)
    B = A.T @ Q
    Q = orthonormal(Q @ eigen(B.T @ B, rotations)[0], 0, 3)
    B = A.T @ Q
    W, values = eigen(B.T @ B, polish)
    return np.abs(Q @ W[:, np.argsort(-values, kind="stable")[:groups]])


def select(
    variant: str, x: np.ndarray, loadings: np.ndarray, budget: int, score: np.ndarray | None = None
) -> list[int]:
    """Kept tokens, group by group."""
    x = x.astype(np.float32)
    T = len(x)
    need = budget + 1 if variant == "llava" else budget
    groups = min(max(need // 4, 1 if variant == "llava" else 4), loadings.shape[1], budget)
    group = loadings[:, :groups].argmax(1)
    if score is None:
        score = loadings[:, :groups].max(1)
    unit = x / np.sqrt(np.maximum((x * x).sum(1, keepdims=True), np.float32(1e-24)))
    similar = unit @ unit.T
    if variant == "llava":
        pairs = similar.sum() - np.trace(similar)
        limit = need / 32 * (pairs / max(T * (T - 1), 1))
    else:
        limit = max(18 * need / T, 1) * np.triu(similar).sum() / T**2
    survivors: list[list[int]] = []
    others: list[list[int]] = []
    for g in range(groups):
        mine = sorted(np.flatnonzero(group == g).tolist(), key=lambda i: (-score[i], i))
        kept: list[int] = []
        for i in mine:
            if not any(similar[i, j] > limit for j in kept):
                kept.append(i)
        survivors.append(kept)
        others.append([i for i in mine if i not in kept])
    quotas = _quotas(
        [len(s) + len(o) for s, o in zip(survivors, others, strict=True)], survivors, budget, need
    )
    return [i for s, o, n in zip(survivors, others, quotas, strict=True) for i in (s + o)[:n]]


def _quotas(sizes: list[int], survivors: list[list[int]], budget: int, need: int) -> list[int]:
    m = [len(kept) for kept in survivors]
    lower = [min(1, n) for n in sizes]
    upper = [min(5 * math.ceil(need / 64), n, k) for n, k in zip(sizes, m, strict=True)]
    while sum(upper) < min(need, sum(sizes)):
        upper = [min(u + 1, n) for u, n in zip(upper, sizes, strict=True)]
    rest = max(0, budget - sum(lower))
    shares = np.round(np.cumsum(np.array(m, np.float32) / np.float32(sum(m))) * np.float32(rest))
    steps = np.diff(shares, prepend=0).astype(int).tolist()
    quotas = [min(d + low, u) for d, low, u in zip(steps, lower, upper, strict=True)]
    left = rest + sum(lower) - sum(quotas)
    for g in sorted(range(len(m)), key=lambda g: -m[g]):
        more = min(upper[g] - quotas[g], max(left, 0))
        quotas[g] += more
        left -= more
    return quotas


def pictures(count: int, T: int = 576, C: int = 1024) -> Iterator[np.ndarray]:
    """Features like those of a picture: objects on smooth ground, a few outliers. float32 [T, C]."""
    side = math.isqrt(T)
    row, col = np.divmod(np.arange(T), side)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((T, C)) * 0.35
        for _ in range(10):  # smooth fields
            wave = np.sin(row * rng.uniform(0.05, 0.5) + col * rng.uniform(0.05, 0.5) + rng.uniform(0, 6))
            x += wave[:, None] * rng.standard_normal(C) * 0.25
        for _ in range(24):  # objects
            y, z, h, w = rng.integers(side), rng.integers(side), rng.integers(2, 9), rng.integers(2, 9)
            inside = (abs(row - y) < h) & (abs(col - z) < w)
            x += inside[:, None] * rng.standard_normal(C) * rng.uniform(0.3, 1.2)
        x += rng.standard_normal(C) * 0.5
        x[rng.choice(T, 6, replace=False)] += rng.standard_normal((6, C)) * 2
        yield x.astype(np.float32)
