"""The decoder's states in memory, each one allocation with a row for every slot, in the ways that graphs take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ..models.config import State
from .backends.session import Backend, Binding, Buffer


def looked_at(backend: Backend, used: int, capacity: int) -> int:
    """Entries of a cache that a run looks at: those that are used, or some more, so that shapes seldom change."""
    multiple = backend.cache_multiple
    return min(capacity, -(-used // multiple) * multiple)


class Form(Protocol):
    """Memory of some of the states, in the way that the decoder graph takes them."""

    @property
    def nbytes(self) -> int:
        """What it takes."""

    def grow(self, slots: int, capacity: int, used: int) -> None:
        """Move to memory for more slots or tokens; the first ``used`` entries of every slot stay."""

    def attach(self, binding: Binding, first: int, count: int) -> None:
        """Bind the rows ``first`` ... of the slots to a binding that has not run yet."""

    def before(self, binding: Binding, length: int, tokens: int) -> None:
        """Bind for a run that adds so many tokens to the ``length`` that are there."""

    def after(self, first: int, count: int, active: Sequence[int], length: int, tokens: int) -> None:
        """Keep what that run of ``count`` rows computed for the slots ``active``."""

    def clear(self, slot: int) -> None:
        """A new sequence begins in the slot."""

    def copies(self, slot: int) -> dict[str, Buffer]:
        """Of what cannot be had again by looking at fewer entries, so that a sequence can be cut back to here."""

    def restore(self, slot: int, copies: dict[str, Buffer]) -> None:
        """Go on from there."""


class InPlace:
    """States with an entry per token, input and output of the graph at once: dialects ``ort`` and ``standard``."""

    def __init__(self, backend: Backend, states: Sequence[State], dtype: str):
        self.backend = backend
        self.states = states
        self.dtype = dtype
        self.memory: dict[str, Buffer] = {}
        self.nbytes = 0

    def grow(self, slots: int, capacity: int, used: int) -> None:
        """See Form.

        For more tokens one state after the other moves, so that little is there twice. For more slots all of them move
        at the end, so that where memory runs out the sequences in there go on as they were.
        """
        moved: dict[str, Buffer] = {}
        for state in self.states:
            new = self.backend.zeros(state.sized(slots, capacity), state.stored(self.dtype))
            old = self.memory.get(state.name)
            if old is not None and used:
                rows = new.rows(0, old.shape[0])
                self.backend.copy_into(_entries(rows, state), 0, _entries(old, state), used)
            if old is not None and old.shape[0] == slots:
                self.memory[state.name] = new
            else:
                moved[state.name] = new
        self.memory.update(moved)
        self.nbytes = sum(buffer.nbytes for buffer in self.memory.values())

    def attach(self, binding: Binding, first: int, count: int) -> None:
        """See Form."""
        for name, buffer in self.memory.items():
            rows = buffer.rows(first, first + count)
            binding.input(name, rows)
            binding.output(f"new_{name}", rows)

    def before(self, binding: Binding, length: int, tokens: int) -> None:
        """See Form."""

    def after(self, first: int, count: int, active: Sequence[int], length: int, tokens: int) -> None:
        """See Form."""

    def clear(self, slot: int) -> None:
        """See Form; the graph looks at no entry before it has written it."""

    def copies(self, slot: int) -> dict[str, Buffer]:
        """See Form; entries stay as they are, and what lies behind is written anew."""
        return {}

    def restore(self, slot: int, copies: dict[str, Buffer]) -> None:
        """See Form."""


class ByPosition:
    """One buffer [caches, capacity, 1, kv_heads, Dh] for a single slot: dialect ``plain``.

    The graph reads what is used and puts out new rows. Where nothing is used yet, one entry is bound; the graph masks
    out what lies behind the used part.
    """

    def __init__(self, backend: Backend, states: Sequence[State], dtype: str):
        self.backend = backend
        self.names = [state.name for state in states]
        self.dtype = dtype
        _, heads, _, width = states[0].shape
        self.row = (1, int(heads), int(width))
        self.memory: Buffer | None = None
        self.new: Buffer | None = None
        self.bound: tuple[Binding, int] | None = None  # to which caches of how many entries are bound
        self.nbytes = 0

    def grow(self, slots: int, capacity: int, used: int) -> None:
        """See Form."""
        memory = self.backend.zeros((len(self.names), capacity, *self.row), self.dtype)
        if self.memory is not None and used:
            self.backend.copy_into(memory, 0, self.memory, used)
        self.memory = memory
        self.nbytes = memory.nbytes
        self.new = None
        self.bound = None

    def attach(self, binding: Binding, first: int, count: int) -> None:
        """See Form."""

    def before(self, binding: Binding, length: int, tokens: int) -> None:
        """See Form."""
        assert self.memory is not None
        capacity = self.memory.shape[1]
        used = looked_at(self.backend, length, capacity) if length else 1
        if self.bound != (binding, used):
            for i, name in enumerate(self.names):
                cache = self.memory.rows(i, i + 1).reshape(capacity, *self.row)
                binding.input(name, cache.rows(0, used))
            self.bound = (binding, used)
        if self.new is None or self.new.shape[1] != tokens:
            self.new = self.backend.zeros((len(self.names), tokens, *self.row), self.dtype)
            binding.output("rows", self.new)

    def after(self, first: int, count: int, active: Sequence[int], length: int, tokens: int) -> None:
        """See Form."""
        assert self.memory is not None
        assert self.new is not None
        self.backend.copy_into(self.memory, length, self.new)

    def clear(self, slot: int) -> None:
        """See Form."""

    def copies(self, slot: int) -> dict[str, Buffer]:
        """See Form; entries stay as they are, and what lies behind is written anew."""
        return {}

    def restore(self, slot: int, copies: dict[str, Buffer]) -> None:
        """See Form."""


class Copied:
    """States without an entry per token: the graph puts out new ones, which are copied back for active slots only."""

    def __init__(self, backend: Backend, states: Sequence[State], dtype: str):
        self.backend = backend
        self.states = states
        self.dtype = dtype
        self.memory: dict[str, Buffer] = {}
        self.new: dict[str, Buffer] = {}  # as large; a run of some slots puts its rows out from the first on

    @property
    def nbytes(self) -> int:
        """See Form."""
        return sum(buffer.nbytes for states in (self.memory, self.new) for buffer in states.values())

    def grow(self, slots: int, capacity: int, used: int) -> None:
        """See Form; they have the same size for any number of tokens."""
        if self.memory and next(iter(self.memory.values())).shape[0] == slots:
            return
        moved: dict[str, Buffer] = {}
        made: dict[str, Buffer] = {}
        for state in self.states:
            moved[state.name], made[state.name] = (
                self.backend.zeros(state.sized(slots, capacity), state.stored(self.dtype)) for _ in range(2)
            )
            old = self.memory.get(state.name)
            if old is not None:
                self.backend.copy_into(_flat(moved[state.name].rows(0, old.shape[0])), 0, _flat(old))
        self.memory = moved
        self.new = made

    def attach(self, binding: Binding, first: int, count: int) -> None:
        """See Form."""
        for name, buffer in self.memory.items():
            binding.input(name, buffer.rows(first, first + count))
            binding.output(f"new_{name}", self.new[name].rows(0, count))

    def before(self, binding: Binding, length: int, tokens: int) -> None:
        """See Form."""

    def after(self, first: int, count: int, active: Sequence[int], length: int, tokens: int) -> None:
        """See Form."""
        for name, new in self.new.items():
            for slot in active:
                made = new.rows(slot - first, slot - first + 1)
                self.backend.copy_into(_flat(self._row(name, slot)), 0, _flat(made))

    def clear(self, slot: int) -> None:
        """See Form."""
        for name in self.memory:
            row = self._row(name, slot)
            self.backend.copy_into(_flat(row), 0, _flat(self.backend.zeros(row.shape, row.dtype)))

    def copies(self, slot: int) -> dict[str, Buffer]:
        """See Form."""
        found = {}
        for name in self.memory:
            row = self._row(name, slot)
            found[name] = self.backend.zeros(row.shape, row.dtype)
            self.backend.copy_into(_flat(found[name]), 0, _flat(row))
        return found

    def restore(self, slot: int, copies: dict[str, Buffer]) -> None:
        """See Form."""
        for name, copy in copies.items():
            self.backend.copy_into(_flat(self._row(name, slot)), 0, _flat(copy))

    def _row(self, name: str, slot: int) -> Buffer:
        return self.memory[name].rows(slot, slot + 1)


def _entries(buffer: Buffer, state: State) -> Buffer:
    """A state with an entry per token as [everything before it, M, everything behind it]."""
    at = state.shape.index("M")
    return buffer.reshape(math.prod(buffer.shape[:at]), buffer.shape[at], math.prod(buffer.shape[at + 1 :]))


def _flat(buffer: Buffer) -> Buffer:
    return buffer.reshape(1, math.prod(buffer.shape))
