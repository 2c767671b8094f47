"""What a request gives: tokens one by one, or pieces of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .stats import Stats
from .text import Text

if TYPE_CHECKING:
    from .engine import Engine
    from .sequence import Sequence


@dataclass(frozen=True)
class Step:
    """One generated token."""

    token: int
    logits: np.ndarray  # float32 [V], what it was chosen from


class Steps(Iterator[Step]):
    """Iterate for the tokens of a sequence; it runs when it is read, and ends when this is closed or dropped."""

    def __init__(self, engine: Engine, sequence: Sequence, added: bool = False):
        self._engine = engine
        self._sequence = sequence
        self._added = added
        self._closed = False

    def __next__(self) -> Step:
        if self._closed:
            raise StopIteration
        if not self._added:
            self._added = True
            self._engine.add(self._sequence)
        try:
            step = self._engine.next(self._sequence)
        except BaseException:
            self.close()
            raise
        if step is None:
            self.close()
            raise StopIteration
        return step

    def close(self) -> None:
        """Nobody wants more of it."""
        if not self._closed:
            self._closed = True
            if self._added:
                self._engine.cancel(self._sequence)

    def __del__(self) -> None:
        self.close()


class Answer(Iterator[str]):
    """Iterate for pieces of text as they are generated; ``stats`` is complete when the iteration ends."""

    def __init__(self, steps: Iterator[Step], text: Text, stats: Stats, stop: frozenset[int]):
        self.stats = stats
        self._pieces = _decode(steps, text, stop)
        self._text: list[str] = []
        self._error: Exception | None = None

    def __next__(self) -> str:
        if self._error is not None:
            raise self._error  # an answer that failed is never taken for one that ended
        try:
            piece = next(self._pieces)
        except StopIteration:
            raise
        except Exception as err:
            self._error = err
            raise
        self._text.append(piece)
        return piece

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Generate to the end and return the whole answer."""
        for _ in self:
            pass
        return "".join(self._text)


def _decode(steps: Iterator[Step], text: Text, stop: frozenset[int]) -> Iterator[str]:
    """Holds no Answer, so that a dropped one ends at once and gives its cache back."""
    stream = text.stream()
    for step in steps:
        piece = "" if step.token in stop else stream.push(step.token)
        if piece:
            yield piece
    if rest := stream.finish():
        yield rest
