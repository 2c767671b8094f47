"""Kept blocks of an image -> features, side by side for all images of a prompt.

Features are one tensor [1 + L, K, D]: the embeddings of the kept tokens, then the deepstack levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .backends.session import Backend, Buffer, Session, run


class Vision:
    """The vision graph on a backend. ``levels``: L, ``width``: D, ``dtype``: of the features."""

    def __init__(self, backend: Backend, graph: Path, levels: int, width: int, dtype: str):
        self.backend = backend
        self.levels = levels
        self.width = width
        self.dtype = dtype
        self.session: Session = backend.session(graph)

    def features(self, tokens: int) -> Buffer:
        """Memory for the features of ``tokens`` kept tokens: [1 + L, K, D], at least one (zero) token."""
        return self.backend.zeros((1 + self.levels, max(tokens, 1), self.width), self.dtype)

    def encode(self, image: Buffer, keep: Buffer, others: Mapping[str, Buffer]) -> Buffer:
        """image uint8 [H, W, 3], keep int32 [K] -> features [1 + L, K, D]. ``others``: see Family.tower_inputs."""
        features = self.features(keep.shape[0])
        run(self.session, {"image": image, "keep": keep, **others}, {"features": features})
        return features

    def join(self, features: Sequence[Buffer]) -> Buffer:
        """Features of several images side by side: [1 + L, sum of K, D]; a single one as it is."""
        if len(features) == 1:
            return features[0]
        joined = self.features(sum(each.shape[1] for each in features))
        at = 0
        for each in features:
            self.backend.copy_into(joined, at, each)
            at += each.shape[1]
        return joined
