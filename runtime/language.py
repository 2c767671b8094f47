"""Tokens and image features -> logits: the decoder graph, run on some slots of the states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..models.config import ModelConfig
from ..models.errors import BundleError
from .backends.session import Backend, Buffer, Session
from .slots import Run, Slots
from .states import looked_at

# inputs that are no states
GIVEN = {"input_ids", "features", "feature_rows", "position_ids", "start", "logits_at", "entries"}


@dataclass(frozen=True)
class Inputs:
    """S tokens for each of n rows, n slots side by side."""

    ids: np.ndarray  # int32 [n, S]
    feature_rows: np.ndarray  # int32 [n, S]
    positions: np.ndarray  # int32 [A, n, S]
    start: np.ndarray  # int32 [n], tokens that are in each slot already


class Language:
    """The decoder graph on a backend. ``dtype``: what it calculates in; ``dialect``: what it is written in."""

    def __init__(self, backend: Backend, graph: Path, model: ModelConfig, dtype: str, dialect: str):
        self.backend = backend
        self.model = model
        self.dtype = dtype
        self.by_position = dialect == "plain"
        self.batches = backend.batches and not self.by_position  # may several slots run at once?
        self.session: Session = backend.session(graph)
        missing = sorted({state.name for state in model.states} ^ set(self.session.inputs) - GIVEN)
        if missing:
            raise BundleError(
                f"{graph.name}: its states and those of bundle.json differ in {missing[0]!r}; build it again"
            )
        self.takes_entries = "entries" in self.session.inputs  # how much of the caches to look at
        self.entries: Buffer | None = None
        # of a run without images
        self.no_features = backend.zeros((1 + model.levels, 1, model.text.width), dtype)

    def slots(self, capacity: int) -> Slots:
        """Memory for one sequence of so many tokens; it can grow."""
        return Slots(
            self.backend, self.model.states, self.dtype, self.by_position, 2 + self.model.axes, capacity
        )

    def run(
        self, slots: Slots, first: int, active: Sequence[int], inputs: Inputs, features: Buffer | None
    ) -> np.ndarray:
        """Run more tokens in the rows from ``first`` on; of them, the slots ``active`` are changed.

        ``features`` [1 + L, K, D] or None where no image is among the tokens. Returns the logits float32 [n, V] after
        the last token of each row, valid until the next call. Where states cannot be cut back, ``slots.broken`` stays
        set until the caller has noted that the tokens are in there.
        """
        count, S = inputs.ids.shape
        run = slots.runs.get((first, count))
        if run is None:
            run = slots.runs[first, count] = self._bound(slots, first, count)
        values = {
            "input_ids": inputs.ids,
            "feature_rows": inputs.feature_rows,
            "position_ids": inputs.positions,
            "start": inputs.start,
            "logits_at": np.full((count, 1), S - 1, np.int32),
        }
        if run.inputs and run.inputs["input_ids"].shape[1] == S:
            for name, value in values.items():
                self.backend.write(run.inputs[name], value)
        else:
            run.inputs = {name: self.backend.upload(value) for name, value in values.items()}
            for name, buffer in run.inputs.items():
                run.binding.input(name, buffer)
        shown = self.no_features if features is None else features
        if run.features is not shown:
            run.binding.input("features", shown)
            run.features = shown
        length = int(inputs.start[0])
        if self.takes_entries:
            entries = looked_at(self.backend, int(inputs.start.max()) + S, slots.capacity)
            if run.entries != entries:
                run.binding.input("entries", self._counted(slots.capacity).rows(0, entries))
                run.entries = entries
        changed = slots.broken
        slots.broken = changed or not slots.rewindable
        try:
            for form in slots.forms:
                form.before(run.binding, length, S)
            run.binding.run()
        except Exception:
            slots.broken = changed  # nothing of it can be seen
            raise
        for form in slots.forms:
            form.after(first, count, active, length, S)
        if features is not None:  # they go when the prompt has been run
            run.binding.input("features", self.no_features)
            run.features = self.no_features
        return self.backend.download(run.logits).reshape(count, -1)

    def _counted(self, capacity: int) -> Buffer:
        """0, 1, 2, ... for at least so many entries."""
        if self.entries is None or self.entries.shape[0] < capacity:
            self.entries = self.backend.upload(np.arange(capacity, dtype=np.int32))
        return self.entries

    def _bound(self, slots: Slots, first: int, count: int) -> Run:
        logits = self.backend.zeros((count, 1, self.model.text.vocab), "float32")
        run = Run(self.session.binding(), logits)
        run.binding.output("logits", logits)
        for form in slots.forms:
            form.attach(run.binding, first, count)
        return run
