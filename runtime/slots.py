"""Slots: what a sequence remembers of its tokens, side by side with that of others that run in the same batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..models.config import State
from .backends.session import Backend, Binding, Buffer
from .states import ByPosition, Copied, Form, InPlace

MOST_KEPT = 4  # copies of the states of one sequence
Digests = tuple[bytes, ...]  # of the images of a request


class Slot:
    """One sequence's row of the states, and what its entries were computed from."""

    def __init__(self, slots: Slots, index: int):
        self.slots = slots
        self.index = index
        self.length = 0  # tokens in it
        self.images: Digests = ()
        self.busy = False  # does a sequence run in it?
        self.last_used = 0  # rising
        # where states are not rewindable: lengths that it can be cut back to, and copies of what it was then
        self.kept: dict[int, dict[str, Buffer]] = {}
        self._columns: list[np.ndarray] = []

    @property
    def held(self) -> np.ndarray:
        """What the entries were computed from: int32 [2 + A, length], as Prompt.columns."""
        start = np.empty((self.slots.column_rows, 0), np.int32)
        self._columns = [np.concatenate([start, *self._columns], axis=1)[:, : self.length]]
        return self._columns[0]

    def rewind(self, length: int) -> None:
        """Go on after the first ``length`` tokens; the entries behind them are written anew."""
        self.slots.broken = not self.slots.rewindable  # until it is done
        if not length:
            self.slots.clear(self.index)
        elif length < self.length and not self.slots.rewindable:
            for form in self.slots.forms:
                form.restore(self.index, self.kept[length])
        self._columns = [self.held[:, :length]]
        self.length = length
        self.kept = {n: copies for n, copies in self.kept.items() if n <= length}
        self.slots.broken = False

    def keep(self) -> None:
        """Let a later sequence go on from here, though states cannot be cut back.

        Of more than MOST_KEPT places the first one stays, behind what most requests begin with, and the latest ones.
        """
        copies = [form.copies(self.index) for form in self.slots.forms]
        self.kept[self.length] = {name: copy for each in copies for name, copy in each.items()}
        if len(self.kept) > MOST_KEPT:
            del self.kept[sorted(self.kept)[1]]

    def append(self, columns: np.ndarray) -> None:
        """Entries for further tokens, int32 [2 + A, n], have been written."""
        self._columns.append(columns.copy())
        self.length += columns.shape[1]


class Run:
    """The decoder graph bound to some rows of the states."""

    def __init__(self, binding: Binding, logits: Buffer):
        self.binding = binding
        self.logits = logits  # float32 [count, 1, V]
        self.inputs: dict[str, Buffer] = {}  # kept for the next run with as many tokens
        self.features: Buffer | None = None
        self.entries = 0  # of the caches, that it looks at; 0 where it looks at all


class Slots:
    """Memory of several sequences of up to ``capacity`` tokens. ``column_rows``: 2 + A, see Prompt.columns."""

    def __init__(
        self,
        backend: Backend,
        states: Sequence[State],
        dtype: str,
        by_position: bool,
        column_rows: int,
        capacity: int,
    ):
        caches = [state for state in states if state.by_token]
        others = [state for state in states if not state.by_token]
        self.forms: list[Form] = []
        if caches:
            form = ByPosition if by_position else InPlace
            self.forms.append(form(backend, caches, dtype))
        if others:
            self.forms.append(Copied(backend, others, dtype))
        self.column_rows = column_rows
        self.rewindable = all(state.rewindable for state in states)
        self.listed: list[Slot] = []
        self.capacity = 0
        self.runs: dict[tuple[int, int], Run] = {}  # by first row and count
        self.broken = False  # was a change to the memory interrupted?
        self.grow(1, capacity)

    @property
    def nbytes(self) -> int:
        """Of all states, and of what is kept of them."""
        kept = [copy for slot in self.listed for copies in slot.kept.values() for copy in copies.values()]
        return sum(form.nbytes for form in self.forms) + sum(copy.nbytes for copy in kept)

    @property
    def busy(self) -> bool:
        """Does any sequence run in it?"""
        return any(slot.busy for slot in self.listed)

    @property
    def last_used(self) -> int:
        """When a sequence ended here the last time."""
        return max(slot.last_used for slot in self.listed)

    def grow(self, count: int, capacity: int) -> None:
        """Have ``count`` slots of ``capacity`` tokens; what is held stays."""
        used = max((slot.length for slot in self.listed), default=0)
        self.broken = count == len(self.listed)  # until it is done: one state after the other moves
        self.runs.clear()  # they hold the memory before
        for form in self.forms:
            form.grow(count, capacity, used)
        self.broken = False
        self.listed += [Slot(self, i) for i in range(len(self.listed), count)]
        self.capacity = capacity

    def clear(self, index: int) -> None:
        """A new sequence begins in the slot."""
        for form in self.forms:
            form.clear(index)

    def close(self) -> None:
        """Give the memory back at once, rather than when the garbage collector finds that slots name each other."""
        self.runs.clear()
        self.forms.clear()
        self.listed.clear()
