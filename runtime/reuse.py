"""What past requests computed, for the next ones: slots of sequences that begin alike, and features of images."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np

from ..models.family import Prompt
from .slots import Digests, Slot, Slots
from .vision import Seen

FEATURES = 8  # one part in this many of the memory is for features, which are small


def digest(frames: Iterable[np.ndarray], keeps: Iterable[np.ndarray]) -> bytes:
    """Stands for the pictures of an image, uint8 [H, W, 3], and which of its tokens are seen and kept, int32 each."""
    found = hashlib.sha256()
    for frame in frames:
        found.update(repr(frame.shape).encode())
        found.update(np.ascontiguousarray(frame).data)
    for keep in keeps:
        found.update(repr(keep.shape).encode())
        found.update(np.ascontiguousarray(keep).data)
    return found.digest()


class Features:
    """What towers made of images, by what that was computed from, within ``limit`` bytes; the oldest go first."""

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: OrderedDict[bytes, tuple[Seen, ...]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(view.nbytes for views in self._kept.values() for view in views)

    def get(self, key: bytes) -> tuple[Seen, ...] | None:
        """Of each view of an image, if they are kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: bytes, seen: tuple[Seen, ...]) -> None:
        """Keep what was made of an image, unless it would drive out all others."""
        if sum(view.nbytes for view in seen) <= self.limit:
            self._kept[key] = seen
        while self.nbytes > self.limit:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


class Reuse:
    """Which slots and features are kept, within ``limit`` bytes in all.

    Where slots have a fixed size (``fixed``: engines), one that fits nothing is used again rather than a further one
    made. Where prompts can only be run from their beginning (not ``appends``: session.Backend), only features are kept.
    """

    def __init__(self, limit: int, fixed: bool, appends: bool):
        self.fixed = fixed
        self.appends = appends
        self.room = limit - limit // FEATURES  # for slots
        self.features = Features(limit // FEATURES)

    def find(self, pools: Iterable[Slots], prompt: Prompt, images: Digests) -> tuple[Slot | None, int, int]:
        """The idle slot whose tokens begin like ``prompt`` the longest, and how many of them it can go on from.

        At least one token of the prompt is left to run, and no image is shared in part. A slot is taken if an image is
        shared or half of it; otherwise it is left for a request that it fits better. The third number is how many
        tokens any slot shares that cannot be cut back to them: what is worth keeping for requests that begin so, too.
        """
        best = None
        most = 0
        branch = 0
        for slots in pools if self.appends else ():
            for slot in slots.listed:
                if not slot.length:
                    continue
                count = shared(slot.held, slot.images, prompt.columns, images)
                if not slots.rewindable:
                    branch = max(branch, count)
                    count = max((n for n in (slot.length, *slot.kept) if n <= count), default=0)
                if slot.busy:
                    continue
                worth = bool((prompt.image_of[:count] >= 0).any()) or 2 * count >= slot.length
                if worth and count > most:
                    best = slot
                    most = count
        return best, most, branch

    def again(self, pools: Iterable[Slots]) -> Slot | None:
        """An idle slot of fixed size to use for something else, where there is no room for one more."""
        unused = idle(pools)
        if not self.fixed or not unused:
            return None
        one_more = sum(slots.nbytes for slots in unused) + unused[0].nbytes
        return unused[0].listed[0] if one_more > self.room or not self.appends else None

    def too_much(self, pools: Iterable[Slots]) -> Iterator[Slots]:
        """Idle slots that there is no room for, the least recently used first."""
        unused = idle(pools)
        for slots in unused:  # copies go first
            if sum(each.nbytes for each in unused) > self.room:
                for slot in slots.listed:
                    slot.kept.clear()
        for slots in list(unused):
            if slots.broken or slots.nbytes > self.room:  # the latter would drive out all others
                unused.remove(slots)
                yield slots
        while sum(slots.nbytes for slots in unused) > self.room:
            yield unused.pop(0)


def idle(pools: Iterable[Slots]) -> list[Slots]:
    """Those in which nobody runs, the least recently used first."""
    return sorted((slots for slots in pools if not slots.busy), key=lambda slots: slots.last_used)


def shared(held: np.ndarray, images: Digests, columns: np.ndarray, digests: Digests) -> int:
    """How many tokens a sequence and a prompt (Prompt.columns, int32 [2 + A, S] both) begin with alike.

    Less than all of the prompt, and only whole images. With tokens 1 9 9 2 held, 9 9 an image, a prompt 1 9 9 7 8 about
    the same image shares 3 of them; about another image it shares 1; and 1 9 9 alone shares 1, since one token is left
    to run and the image is not split.
    """
    most = min(held.shape[1], columns.shape[1] - 1)
    same = (held[:, :most] == columns[:, :most]).all(axis=0)
    count = most if same.all() else int(same.argmin())
    image_of = columns[1]
    other = next((i for i, (a, b) in enumerate(zip(images, digests, strict=False)) if a != b), None)
    if other is not None and other in image_of[:count]:
        count = int((image_of == other).argmax())
    if image_of[count] >= 0:  # the next token may lie within an image
        count = int((image_of == image_of[count]).argmax())
    return count
