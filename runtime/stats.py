"""What a request did and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from .prune import Selection

LOG = logging.getLogger(__name__)


class Span(NamedTuple):
    """One run of a stage, in seconds of ``time.perf_counter``."""

    stage: str  # image, prune, reuse, text, vision, prefill, decode (one for each token but the first)
    begin: float
    end: float

    @property
    def milliseconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin) * 1e3


@dataclass
class Stats:
    """What a request did and how long it took. Grows while the request runs."""

    images: tuple[Selection, ...] = ()  # of each image, or each view of one that is shown in several
    spans: list[Span] = field(default_factory=list)
    prompt_tokens: int = 0  # after pruning
    prompt_tokens_full: int = 0  # before pruning
    reused_tokens: int = 0  # of the prompt, whose cache entries an earlier request had computed
    generated_tokens: int = 0
    # "stop" (by itself, or as it was asked to), "length" (max_new_tokens) or "context" (the model's limit)
    finish: str = ""
    notes: list[str] = field(default_factory=list)  # of the backend, such as what runs slower than it should

    @property
    def kept(self) -> int:
        """Image tokens kept, all images together."""
        return sum(image.kept for image in self.images)

    @property
    def total(self) -> int:
        """Image tokens of the full grids."""
        return sum(image.total for image in self.images)

    def views_of(self, image: int) -> list[Selection]:
        """Those of one image, counted from 0."""
        starts = [i for i, view in enumerate(self.images) if not view.number]
        return list(self.images[starts[image] : (*starts, None)[image + 1]])

    @property
    def milliseconds(self) -> dict[str, float]:
        """Of each stage that ran, all its spans together."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.stage] = found.get(span.stage, 0.0) + span.milliseconds
        return found

    @property
    def ttft(self) -> float:
        """Time to first token in milliseconds: everything before decode."""
        return sum(ms for stage, ms in self.milliseconds.items() if stage != "decode")

    def begin(self) -> float:
        """The time now, for ``end``."""
        return time.perf_counter()

    def end(self, name: str, begin: float) -> None:
        """Add the time since ``begin`` to a stage."""
        self.spans.append(Span(name, begin, time.perf_counter()))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begin = self.begin()
        try:
            yield
        finally:
            self.end(name, begin)


def log_request(stats: Stats) -> None:
    """The event "request", with ``fields`` for structured logs (ppexport/logs.py)."""
    if LOG.isEnabledFor(logging.INFO):
        fields = {
            "images": sum(not view.number for view in stats.images),
            "kept": stats.kept,
            "total": stats.total,
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "generated_tokens": stats.generated_tokens,
            "finish": stats.finish,
            "ttft_ms": round(stats.ttft, 3),
            "stages_ms": {name: round(ms, 3) for name, ms in stats.milliseconds.items()},
        }
        LOG.info("request", extra={"fields": fields})
