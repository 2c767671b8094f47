"""The key and value caches of one sequence, in the two forms that decoder graphs take them."""

from __future__ import annotations

from typing import Protocol

from ..models.config import TextConfig
from .backends.session import Backend, Binding, Buffer


class Cache(Protocol):
    """Memory for the keys and values of up to ``capacity`` tokens of a sequence, bound to a decoder's binding."""

    nbytes: int  # of that memory

    def grow(self, capacity: int) -> None:
        """Move to memory for more tokens."""

    def before(self, length: int, count: int) -> None:
        """Bind for a run that adds ``count`` tokens to the ``length`` that are there."""

    def after(self, length: int, count: int) -> None:
        """Keep what that run computed."""


class InPlace:
    """Caches [1, kv_heads, capacity, Dh], input and output of the graph at once (``ort``, ``standard``)."""

    def __init__(self, backend: Backend, binding: Binding, c: TextConfig, dtype: str, capacity: int):
        self.backend, self.binding, self.dtype = backend, binding, dtype
        self.heads, self.width = c.kv_heads, c.head_dim
        self.memory: dict[str, Buffer | None] = {
            f"{kind}_{i}": None for i in range(c.layers) for kind in ("key", "value")
        }
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """See Cache; one cache after the other."""
        self.nbytes = 0
        for name, old in self.memory.items():
            new = self.backend.zeros((1, self.heads, capacity, self.width), self.dtype)
            if old is not None:
                there = old.reshape(self.heads, old.shape[2], self.width)
                self.backend.copy_into(new.reshape(self.heads, capacity, self.width), 0, there)
            self.memory[name] = new
            self.binding.input(name, new)
            self.binding.output(f"new_{name}", new)
            self.nbytes += new.nbytes

    def before(self, length: int, count: int) -> None:
        """See Cache."""

    def after(self, length: int, count: int) -> None:
        """See Cache."""


class Rows:
    """One buffer [2 * layers, capacity, 1, kv_heads, Dh]; the graph reads what is used and puts out new rows.

    Where nothing is used yet, one entry is bound; the graph masks out what lies behind the used part.
    """

    def __init__(self, backend: Backend, binding: Binding, c: TextConfig, dtype: str, capacity: int):
        self.backend, self.binding, self.dtype, self.layers = backend, binding, dtype, c.layers
        self.row = (1, c.kv_heads, c.head_dim)
        self.memory = backend.zeros((2 * c.layers, capacity, *self.row), dtype)
        self.nbytes = self.memory.nbytes
        self.new: Buffer | None = None

    def grow(self, capacity: int) -> None:
        """See Cache."""
        memory = self.backend.zeros((2 * self.layers, capacity, *self.row), self.dtype)
        self.backend.copy_into(memory, 0, self.memory)
        self.memory, self.nbytes = memory, memory.nbytes

    def before(self, length: int, count: int) -> None:
        """See Cache."""
        capacity, step = self.memory.shape[1], self.backend.cache_step
        used = min(capacity, -(-length // step) * step) if length else 1
        for i in range(2 * self.layers):
            cache = self.memory.rows(i, i + 1).reshape(capacity, *self.row)
            self.binding.input(f"{('key', 'value')[i % 2]}_{i // 2}", cache.rows(0, used))
        if self.new is None or self.new.shape[1] != count:
            self.new = self.backend.zeros((2 * self.layers, count, *self.row), self.dtype)
            self.binding.output("rows", self.new)

    def after(self, length: int, count: int) -> None:
        """See Cache."""
        assert self.new is not None
        self.backend.copy_into(self.memory, length, self.new)


FORMS: dict[str, type[InPlace] | type[Rows]] = {"ort": InPlace, "standard": InPlace, "plain": Rows}
