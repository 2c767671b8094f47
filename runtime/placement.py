"""Which slot a sequence gets: one that an earlier request left, one beside the others that run, or one of its own."""

from __future__ import annotations

from collections.abc import Sequence as Several

from ..models.errors import RequestError
from .language import Language
from .reuse import Reuse, idle
from .sequence import Sequence
from .slots import Slot, Slots

ROOM = 256  # tokens that a slot has room for at least, beyond what is known to be needed


class Placement:
    """The memory of all sequences of an engine; arguments as of Engine."""

    def __init__(self, language: Language, reuse: Reuse | None, context: int, together: int):
        self.language = language
        self.reuse = reuse
        self.context = context
        self.together = together
        self.pools: list[Slots] = []
        self._ended = 0  # sequences

    @property
    def held_bytes(self) -> int:
        """What is kept of past requests: slots in which nobody runs, and features."""
        features = self.reuse.features.nbytes if self.reuse is not None else 0
        return features + sum(slots.nbytes for slots in idle(self.pools))

    def place(self, sequence: Sequence, active: Several[Sequence]) -> tuple[Slot, int]:
        """A slot, and how many tokens of the prompt it holds already. ``active``: the sequences that run.

        Case 1: one that an earlier request left. Case 2: beside the sequences that run, so that they run as one batch.
        Case 3: memory of its own.
        """
        tokens = len(sequence.prompt.ids) + min(sequence.limit - 1, ROOM)
        if self.reuse is not None:  # Case 1
            found, known, sequence.branch = self.reuse.find(self.pools, sequence.prompt, sequence.digests)
            if found is not None:
                found.rewind(known)
                return found, known
        try:
            slot = self._beside(active, tokens)  # Case 2
        except MemoryError:  # what runs there goes on; memory of its own may be smaller
            slot = None
        if slot is None and self.reuse is not None:
            slot = self.reuse.again(self.pools)
        if slot is None:  # Case 3
            slots = self.language.slots(self.language.backend.capacity or tokens)
            self.pools.append(slots)
            slot = slots.listed[0]
        slot.rewind(0)
        return slot, 0

    def _beside(self, active: Several[Sequence], tokens: int) -> Slot | None:
        """A slot of the memory that most sequences run in; it grows by doubling up to ``together`` slots."""
        running = [sequence.slot.slots for sequence in active if sequence.slot is not None]
        if not running or not self.language.batches:
            return None
        slots = max(running, key=running.count)
        free = sorted((slot for slot in slots.listed if not slot.busy), key=lambda slot: slot.last_used)
        empty = [slot for slot in free if not slot.length]
        if not empty and len(slots.listed) < self.together:
            slots.grow(min(2 * len(slots.listed), self.together), max(slots.capacity, tokens))
            empty = [slot for slot in slots.listed if not slot.busy and not slot.length]
        return next(iter([*empty, *free]), None)

    def make_room(self, slots: Slots, tokens: int) -> None:
        """Room for ``tokens`` tokens in every slot, and some more, so that entries are seldom moved.

        Raises RequestError where caches have a fixed size.
        """
        if tokens <= slots.capacity:
            return
        if self.language.backend.capacity:
            raise RequestError(f"{tokens} tokens, expected at most {slots.capacity} (the cache's capacity)")
        slots.grow(len(slots.listed), max(tokens, min(tokens + max(ROOM, tokens // 4), self.context)))

    def give_back(self, slot: Slot) -> None:
        """Nobody runs in a slot any more; it is kept for others if anything is."""
        slot.busy = False
        self._ended += 1
        slot.last_used = self._ended
        if self.reuse is not None:
            for slots in list(self.reuse.too_much(self.pools)):
                self.drop(slots)
            return
        if not slot.slots.broken:
            slot.rewind(0)
        self.drop_idle()

    def drop_idle(self) -> None:
        """Give back the memory in which nobody runs."""
        for slots in idle(self.pools):
            self.drop(slots)

    def forget(self) -> None:
        """Keep nothing of past requests."""
        self.drop_idle()
        if self.reuse is not None:
            self.reuse.features.clear()

    def drop(self, slots: Slots) -> None:
        """Give back the memory of slots, if that has not been done."""
        if slots in self.pools:
            self.pools.remove(slots)
            slots.close()
