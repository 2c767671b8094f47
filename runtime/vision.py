"""Kept blocks of an image -> embeddings and deepstack levels, written side by side for all images of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .session import Backend, Buffer, Session, run


@dataclass(frozen=True)
class Features:
    """What the language model takes of the images of a prompt: views of one buffer [1 + L, K, D]."""

    embeds: Buffer  # [K, D]
    deepstack: Buffer | None  # [L, K, D]; None where the model has no deepstack levels


def features_of(buffer: Buffer) -> Features:
    """The parts of a feature buffer [1 + L, K, D], by name."""
    parts, K, D = buffer.shape
    return Features(buffer.rows(0, 1).reshape(K, D), buffer.rows(1, parts) if parts > 1 else None)


class Vision:
    """The vision graph on a backend. ``levels``: L, ``width``: D, ``dtype``: of the features."""

    def __init__(self, backend: Backend, graph: Path, levels: int, width: int, dtype: str):
        self.backend, self.levels, self.width, self.dtype = backend, levels, width, dtype
        self.session: Session = backend.session(graph)

    def features(self, tokens: int) -> Buffer:
        """Memory for the features of ``tokens`` kept tokens: [1 + L, K, D], at least one (zero) token."""
        return self.backend.zeros((1 + self.levels, max(tokens, 1), self.width), self.dtype)

    def encode(self, image: Buffer, keep: Buffer) -> Buffer:
        """image uint8 [H, W, 3], keep int32 [K] -> features [1 + L, K, D]."""
        features = self.features(keep.shape[0])
        _, K, D = features.shape
        names = ["embeds", *(f"deepstack_{level}" for level in range(self.levels))]
        outputs = {name: features.rows(i, i + 1).reshape(K, D) for i, name in enumerate(names)}
        run(self.session, {"image": image, "keep": keep}, outputs)
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
