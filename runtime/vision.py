"""Kept blocks of an image -> features, side by side for all views and images of a prompt.

Features are one tensor [1 + L, K, D]: the embeddings of the kept tokens, then the deepstack levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..models.config import ModelConfig
from .backends.session import Backend, Buffer, Session, run


@dataclass(frozen=True)
class Seen:
    """What the vision tower made of one view."""

    features: Buffer  # [1 + L, K, D]; of towers that leave out what was put around an image, U for K
    others: Mapping[str, Buffer]  # ModelConfig.other_outputs

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.features.nbytes + sum(buffer.nbytes for buffer in self.others.values())


class Vision:
    """The vision graph on a backend. ``dtype``: what it calculates in."""

    def __init__(self, backend: Backend, graph: Path, model: ModelConfig, dtype: str):
        self.backend = backend
        self.model = model
        self.dtype = dtype
        self.session: Session = backend.session(graph)

    def features(self, tokens: int) -> Buffer:
        """Memory for the features of ``tokens`` kept tokens: [1 + L, K, D], at least one (zero) token."""
        shape = (1 + self.model.levels, max(tokens, 1), self.model.text.width)
        return self.backend.zeros(shape, self.dtype)

    def encode(self, image: Buffer, keep: Buffer, others: Mapping[str, Buffer]) -> Seen:
        """image uint8 [H, W, 3], keep int32 [K] -> features and the other outputs. ``others``: Family.tower_inputs."""
        tokens = others.get("wanted", keep).shape[0]
        features = self.features(tokens)
        outputs = {}
        for output in self.model.other_outputs:
            shape = [tokens if n == "U" else int(n) for n in output.shape]
            dtype = self.dtype if output.dtype == "compute" else output.dtype
            outputs[output.name] = self.backend.zeros(shape, dtype)
        run(self.session, {"image": image, "keep": keep, **others}, {"features": features, **outputs})
        return Seen(features, outputs)

    def whole(self, seen: Sequence[Seen]) -> Buffer:
        """Features of all views of an image, and after them what ends its rows where the family has that."""
        newline = seen[0].others.get("newline")
        return self.join([*(view.features for view in seen), *([] if newline is None else [newline])])

    def join(self, features: Sequence[Buffer]) -> Buffer:
        """Features side by side: [1 + L, sum of K, D]; a single one as it is."""
        if len(features) == 1:
            return features[0]
        joined = self.features(sum(each.shape[1] for each in features))
        at = 0
        for each in features:
            self.backend.copy_into(joined, at, each)
            at += each.shape[1]
        return joined
