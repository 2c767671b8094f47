"""Prompt and image features -> tokens: positions, prefill, decode with the cache in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..models.config import TextConfig
from ..models.errors import RequestError
from .backends.session import Backend, Binding, Buffer, Session
from .cache import FORMS, Cache
from .prune import Selection

STEP = 256  # tokens that a cache has room for at least, beyond what is known to be needed


@dataclass(frozen=True)
class Prompt:
    """A prompt as the decoder takes it: dropped tokens are gone, kept ones have their positions in the full grid."""

    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [3, S]: temporal, height, width
    image_of: np.ndarray  # int32 [S]: the image that a placeholder stands for, counted from 0; -1 for text
    feature_rows: np.ndarray  # int32 [S]: the row of the features that stands there, all images in a row; -1 for text
    next_position: int  # of the first generated token, as if nothing had been pruned
    full_length: int  # tokens before pruning

    @property
    def columns(self) -> np.ndarray:
        """All that a token's cache entry depends on but the pixels of its image: int32 [5, S]."""
        return np.vstack([self.ids, self.image_of, self.positions])

    def after(self, count: int) -> Prompt:
        """Without its first ``count`` tokens, which hold whole images only; rows count from the first image left."""
        rows = self.feature_rows[count:]
        first = rows[rows >= 0].min(initial=np.iinfo(np.int32).max)
        return replace(
            self,
            ids=self.ids[count:],
            positions=self.positions[:, count:],
            image_of=self.image_of[count:],
            feature_rows=np.where(rows >= 0, rows - first, -1).astype(np.int32),
        )


def build_prompt(input_ids: np.ndarray, image_token: int, selections: Sequence[Selection]) -> Prompt:
    """Compute multimodal rotary positions over the full grids, then drop the placeholders of dropped tokens.

    input_ids int32 [S'], every image as a run of its N placeholders. Text after an image goes on at the largest
    position so far + 1 (as transformers' ``get_rope_index``). Raises RequestError if runs and images do not match.
    """
    starts = _image_starts(input_ids == image_token, [selection.total for selection in selections])
    S = len(input_ids)
    positions = np.empty((3, S), np.int32)
    keep, image_of = np.ones(S, bool), np.full(S, -1, np.int32)
    done, position = 0, 0
    for image, (start, selection) in enumerate(zip(starts, selections, strict=True)):
        length = selection.total
        positions[:, done:start] = position + np.arange(start - done)
        position += start - done
        row, col = np.divmod(np.arange(length), selection.cols)
        positions[:, start : start + length] = position + np.stack([np.zeros(length, int), row, col])
        position += max(selection.rows, selection.cols)
        image_of[start : start + length] = image
        keep[start : start + length] = False
        keep[start + selection.keep] = True
        done = start + length
    positions[:, done:] = position + np.arange(S - done)
    next_position = position + S - done
    image_of = image_of[keep]
    rows = np.where(image_of >= 0, np.cumsum(image_of >= 0) - 1, -1).astype(np.int32)
    return Prompt(input_ids[keep].astype(np.int32), positions[:, keep], image_of, rows, next_position, S)


def _image_starts(is_image: np.ndarray, totals: Sequence[int]) -> list[int]:
    """Where each image's placeholders start; each image's are consecutive. Raises RequestError if they do not match."""
    where = np.flatnonzero(is_image)
    ends = np.cumsum(totals, dtype=np.int64)
    matches = len(where) == sum(totals) and all(
        where[end - 1] - where[end - total] == total - 1 for end, total in zip(ends, totals, strict=True)
    )
    if not matches:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_image, [False]]).astype(np.int8)))
        raise RequestError(
            f"the prompt has image placeholders in runs of {(edges[1::2] - edges[::2]).tolist()} tokens, expected "
            f"{list(totals)} (the full grids of {len(totals)} images)"
        )
    return [int(where[end - total]) for end, total in zip(ends, totals, strict=True)]


class Language:
    """The decoder graph on a backend."""

    def __init__(
        self,
        backend: Backend,
        graph: Path,
        config: TextConfig,
        levels: int,
        dtype: str,
        dialect: str,
    ):
        self.backend, self.config, self.dtype = backend, config, dtype
        self.session: Session = backend.session(graph)
        self.cache_form = FORMS[dialect]
        self.no_features = backend.zeros((1 + levels, 1, config.width), dtype)  # of a run without images

    def start(self, tokens: int) -> Decoding:
        """A new sequence with room for ``tokens`` tokens, and more as it gets longer."""
        return Decoding(self, tokens)


class Decoding:
    """One sequence in progress: its caches, which tokens they hold, and its binding."""

    def __init__(self, language: Language, tokens: int):
        self.language, self.backend, self.length = language, language.backend, 0
        self.capacity = language.backend.capacity or tokens
        c = language.config
        self.binding: Binding = language.session.binding()
        self.cache: Cache = language.cache_form(self.backend, self.binding, c, language.dtype, self.capacity)
        self.logits = self.backend.zeros((1, 1, c.vocab), "float32")
        self.binding.output("logits", self.logits)
        self.inputs: dict[str, Buffer] = {}  # of a run, kept for the next one of the same length
        self._held: list[np.ndarray] = []

    @property
    def held(self) -> np.ndarray:
        """What the cache entries were computed from: int32 [5, length], as Prompt.columns."""
        self._held = [np.concatenate([np.empty((5, 0), np.int32), *self._held], axis=1)[:, : self.length]]
        return self._held[0]

    def rewind(self, length: int) -> None:
        """Go on after the first ``length`` tokens; the entries behind them are written anew."""
        self._held, self.length = [self.held[:, :length]], length

    def prefill(self, prompt: Prompt, features: Buffer) -> np.ndarray:
        """Run the prompt, or what is left of it; ``features`` [1 + L, K, D] of the images in there.

        Returns the logits float32 [V] after its last token (valid until the next call).
        """
        self.binding.input("features", features)
        try:
            return self._run(prompt.columns, prompt.feature_rows)
        finally:
            self.binding.input("features", self.language.no_features)

    def decode(self, token: int, position: int) -> np.ndarray:
        """Run one more token, which is text, at ``position`` (all three axes); returns logits as ``prefill`` does."""
        return self._run(np.array([[token], [-1], *[[position]] * 3], np.int32), np.array([-1], np.int32))

    def _run(self, columns: np.ndarray, feature_rows: np.ndarray) -> np.ndarray:
        S = columns.shape[1]
        if self.length + S > self.capacity:
            self._grow(self.length + S)
        values = {
            "input_ids": columns[:1],
            "feature_rows": feature_rows[None],
            "position_ids": columns[2:].reshape(3, 1, S),
            "start": np.array([self.length], np.int32),
            "logits_at": np.array([[S - 1]], np.int32),
        }
        if self.inputs and self.inputs["input_ids"].shape[1] == S:
            for name, value in values.items():
                self.backend.write(self.inputs[name], value)
        else:
            self.inputs = {name: self.backend.upload(value) for name, value in values.items()}
            for name, buffer in self.inputs.items():
                self.binding.input(name, buffer)
        self.cache.before(self.length, S)
        self.binding.run()
        self.cache.after(self.length, S)
        self._held.append(columns.copy())  # the inputs are written anew
        self.length += S
        return self.backend.download(self.logits).reshape(-1)

    def _grow(self, tokens: int) -> None:
        """Room for ``tokens`` tokens and some more, so that entries are seldom moved."""
        if self.backend.capacity:
            raise RequestError(f"{tokens} tokens, expected at most {self.capacity} (the cache's capacity)")
        capacity = max(tokens, min(tokens + max(STEP, tokens // 4), self.language.config.context))
        self.cache.grow(capacity)
        self.capacity = capacity
