"""What a request did and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .prune import Selection


@dataclass
class Stats:
    """What a request did and how long it took. Grows while the request runs."""

    images: tuple[Selection, ...] = ()
    milliseconds: dict[str, float] = field(
        default_factory=dict
    )  # per stage: image, prune, reuse, text, vision, prefill, decode
    prompt_tokens: int = 0  # after pruning
    prompt_tokens_full: int = 0  # before pruning
    reused_tokens: int = 0  # of the prompt, whose cache entries an earlier request had computed
    generated_tokens: int = 0
    finish: str = ""  # "stop" (a stop token), "length" (max_new_tokens) or "context" (the model's limit)

    @property
    def kept(self) -> int:
        """Image tokens kept, all images together."""
        return sum(image.kept for image in self.images)

    @property
    def total(self) -> int:
        """Image tokens of the full grids."""
        return sum(image.total for image in self.images)

    @property
    def ttft(self) -> float:
        """Time to first token in milliseconds: everything before decode."""
        return sum(ms for stage, ms in self.milliseconds.items() if stage != "decode")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] = self.milliseconds.get(name, 0.0) + (time.perf_counter() - begin) * 1e3
