"""What a request gives: tokens one by one, or pieces of text."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several
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


class Speech:
    """Tokens in, text out. It ends before the first of ``until``, strings that the text must not hold.

    With until = ["\\n\\n"] the pieces "a\\n" and "b" come out as "a" and "\\nb": what may be a beginning of it is held
    back.
    """

    def __init__(self, text: Text, stop: frozenset[int], until: Several[str] = ()):
        self.ended = False  # by one of ``until``
        self._stream = text.stream()
        self._stop = stop
        self._until = until
        self._held = ""

    def push(self, token: int) -> str:
        """The text that a token completes, possibly empty."""
        return self._said("" if token in self._stop else self._stream.push(token))

    def finish(self) -> str:
        """What is left at the end."""
        return "" if self.ended else self._said(self._stream.finish(), last=True)

    def _said(self, piece: str, last: bool = False) -> str:
        text = self._held + piece
        found = min((at for at in map(text.find, self._until) if at >= 0), default=len(text))
        begun = len(text) - max((_overlap(text, end) for end in self._until), default=0)
        if found < len(text) and (found <= begun or last):  # else what has begun before it may go on
            self.ended = True
            self._held = ""
            return text[:found]
        if last:
            return text
        self._held = text[begun:]
        return text[:begun]


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of ``text`` are a beginning of ``end``."""
    longest = min(len(text), len(end) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(end[:n])), 0)


class Answer(Iterator[str]):
    """Iterate for pieces of text as they are generated; ``stats`` is complete when the iteration ends."""

    def __init__(self, steps: Steps, speech: Speech, stats: Stats):
        self.stats = stats
        self._pieces = _decode(steps, speech, stats)
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


def _decode(steps: Steps, speech: Speech, stats: Stats) -> Iterator[str]:
    """Holds no Answer, so that a dropped one ends at once and gives its cache back."""
    for step in steps:
        piece = speech.push(step.token)
        if speech.ended:
            stats.finish = "stop"
            steps.close()
        if piece:
            yield piece
    if rest := speech.finish():
        yield rest
