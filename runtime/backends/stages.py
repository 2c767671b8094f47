"""What runs where: a backend and a graph for each stage of a bundle, all on the same memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .session import Backend


@dataclass(frozen=True)
class Stage:
    """A graph with weights, and what runs it."""

    backend: Backend
    graph: Path


@dataclass(frozen=True)
class Stages:
    """Those of a loaded bundle."""

    prune: Backend
    vision: Stage | None  # None: the model takes text only
    language: Stage
    chosen: str  # where it runs, and why there

    @property
    def backends(self) -> list[Backend]:
        """Each one once."""
        found = [self.language.backend, self.prune, *([self.vision.backend] if self.vision else [])]
        return [backend for i, backend in enumerate(found) if backend not in found[:i]]
