"""What past requests computed, for the next ones: caches of sequences that begin alike, and features of images."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque

import numpy as np

from .backends.session import Buffer
from .language import Decoding, Prompt

FEATURES = 8  # one part in this many of the memory is for features, which are small
Digests = tuple[bytes, ...]  # of the images of a request


def digest(image: np.ndarray, keep: np.ndarray) -> bytes:
    """Stands for an image uint8 [H, W, 3] and which of its tokens are kept, int32 [K]."""
    found = hashlib.sha256(repr(image.shape).encode())
    found.update(np.ascontiguousarray(image).data)
    found.update(np.ascontiguousarray(keep).data)
    return found.digest()


class Reuse:
    """Keeps finished sequences and image features within ``limit`` bytes, the least recently used ones go first.

    A sequence belongs to one request at a time, so requests on several threads never share a cache. Where caches have
    a fixed size (``fixed``: engines), one that fits nothing is used again rather than a further one made. Where prompts
    can only be run from their beginning (not ``appends``: session.Backend), only features are kept.
    """

    def __init__(self, limit: int, fixed: bool, appends: bool):
        self.limit, self.fixed, self.appends = limit, fixed, appends
        self._lock = threading.Lock()
        self._given: deque[tuple[Decoding, Digests]] = deque()  # back, and not sorted in yet
        self._sequences: list[tuple[Decoding, Digests]] = []  # the oldest first
        self._features: OrderedDict[bytes, Buffer] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        with self._lock:
            self._sort_in()
            return self._sequence_bytes() + sum(buffer.nbytes for buffer in self._features.values())

    def take(self, prompt: Prompt, digests: Digests) -> tuple[Decoding | None, int]:
        """The sequence that begins like ``prompt`` the longest, and how many tokens they share.

        At least one token of the prompt is left to run, and no image is shared in part. A sequence is taken if an image
        is shared or half of it; otherwise it is left for a request that it fits better.
        """
        with self._lock:
            self._sort_in()
            best, most = -1, 0
            for i, (sequence, images) in enumerate(self._sequences):
                count = shared(sequence.held, images, prompt.columns, digests) if self.appends else 0
                worth = bool((prompt.image_of[:count] >= 0).any()) or 2 * count >= sequence.length
                if worth and count > most:
                    best, most = i, count
            if best < 0 and self.fixed and self._sequences:
                one_more = self._sequence_bytes() + self._sequences[0][0].cache.nbytes
                best = 0 if one_more > self._room() or not self.appends else -1
            return (self._sequences.pop(best)[0], most) if best >= 0 else (None, 0)

    def keep(self, sequence: Decoding, digests: Digests) -> None:
        """Give a sequence back. Takes no lock: a dropped answer may do so in the middle of anything, on any thread."""
        if self.limit:
            self._given.append((sequence, digests))

    def features(self, key: bytes) -> Buffer | None:
        """The features of an image, if they are kept."""
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def keep_features(self, key: bytes, features: Buffer) -> None:
        """Keep the features of an image."""
        room = self.limit // FEATURES
        with self._lock:
            if features.nbytes <= room:
                self._features[key] = features
            while sum(buffer.nbytes for buffer in self._features.values()) > room:
                self._features.popitem(last=False)

    def close(self) -> None:
        """Keep nothing from now on."""
        self.limit = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._given.clear()
            self._sequences.clear()
            self._features.clear()

    def _sort_in(self) -> None:
        while self._given:
            sequence, digests = self._given.popleft()
            if sequence.cache.nbytes <= self._room():  # or it would drive out all others
                self._sequences.append((sequence, digests))
        while self._sequence_bytes() > self._room():
            self._sequences.pop(0)

    def _room(self) -> int:
        return self.limit - self.limit // FEATURES

    def _sequence_bytes(self) -> int:
        return sum(sequence.cache.nbytes for sequence, _ in self._sequences)


def shared(held: np.ndarray, images: Digests, columns: np.ndarray, digests: Digests) -> int:
    """How many tokens a sequence and a prompt (Prompt.columns, int32 [5, S] both) begin with alike.

    Less than all of the prompt, and only whole images.
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
