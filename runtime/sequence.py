"""A request in progress: what was asked, what it was made into, and how far it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..models.checks import integer
from ..models.errors import RequestError
from ..models.family import Kept, Prompt
from ..models.pruners import Pruner
from .answer import Step
from .backends.session import Buffer
from .grammar import Grammar, SchemaLike
from .image import ImageLike
from .messages import PromptLike
from .prune import Selection
from .sampling import Sampling
from .slots import Slot, Slots
from .stats import Stats, log_request

PruneLike = Pruner | Several[Pruner] | Literal["default"] | None


@dataclass(frozen=True)
class Request:
    """A question about images, and how to answer it; see Pipeline.generate. Raises RequestError for bad values."""

    prompt: PromptLike
    images: ImageLike | Several[ImageLike] = ()
    prune: PruneLike = "default"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    until: Several[str] = ()  # the answer ends before the first of these strings
    schema: SchemaLike | None = None  # the answer is JSON that matches this JSON schema

    def __post_init__(self) -> None:
        integer("max_new_tokens", self.max_new_tokens, at_least=1)
        self.sampling  # noqa: B018 (raises)
        listed = isinstance(self.until, (list, tuple))
        if not listed or not all(isinstance(end, str) and end for end in self.until):
            raise RequestError(f"until is {self.until!r:.80}, expected a list of strings that are not empty")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)


@dataclass(frozen=True)
class Shown:
    """One view of an image on the backend, as the vision tower takes it."""

    image: Buffer  # uint8 [H, W, 3]
    keep: Buffer  # int32 [K]
    others: dict[str, Buffer]  # see Family.tower_inputs


@dataclass(frozen=True)
class Picture:
    """One image of a request, after all pruners."""

    views: tuple[Shown, ...]
    selections: tuple[Selection, ...]  # of each view
    kept: Kept
    digest: bytes  # of its pixels and of what is kept; empty where nothing is reused
    features: Buffer | None = None  # [1 + L, K, D], where pruners have looked at them already


@dataclass(eq=False)
class Sequence:
    """One request in progress. The engine changes it; ``finished`` and ``error`` say how it ended."""

    prompt: Prompt
    pictures: tuple[Picture, ...]
    sampling: Sampling
    stats: Stats
    limit: int  # tokens to generate at most
    limited_by: str  # what ``stats.finish`` says where that many were generated
    stop: Collection[int]  # tokens that end it
    ahead: int | None  # tokens that it may be ahead of its reader while others run; None: any number
    keeps_logits: bool  # does the reader want the logits of every token?
    grammar: Grammar | None = None  # what the answer has to be
    pending: deque[Step] = field(default_factory=deque)  # tokens that were not read yet
    finished: bool = False
    error: BaseException | None = None
    cancelled: bool = False
    slot: Slot | None = None
    rest: Prompt | None = None  # of the prompt, what the slot does not hold
    # tokens that it has begun with like another one, whose states cannot be cut back to there
    branch: int = 0
    # the images in there, as far as they have no features yet
    images_to_encode: list[Picture] = field(default_factory=list)
    parts: list[Buffer] = field(default_factory=list)  # features of each of the others
    encoded: bool = False  # are all features there?
    features: Buffer | None = None  # of all images in there, until the prompt has been run
    done: int = 0  # tokens of ``rest`` that have been run
    token: int = 0  # the last one that was generated

    def __post_init__(self) -> None:
        self.rng: np.random.Generator = self.sampling.rng()

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of its images; empty where nothing is reused."""
        return tuple(picture.digest for picture in self.pictures if picture.digest)

    @property
    def decodes(self) -> bool:
        """Has its prompt been run?"""
        return self.rest is not None and self.done == len(self.rest.ids)

    def choose(self, logits: np.ndarray) -> tuple[int, bool]:
        """The next token from logits float32 [V], and whether the answer ends with it."""
        allowed = logits if self.grammar is None else self.grammar.masked(logits)
        token = self.sampling.choose(allowed, self.rng)
        if token in self.stop:
            return token, True
        return token, self.grammar is not None and self.grammar.take(token)

    def fail(self, error: BaseException) -> None:
        """It ends, and this is what its reader hears."""
        self.error = error
        self.finished = True
        log_request(self.stats)

    def free(self) -> None:
        """Let go of images and features: whoever reads the answer may keep it for long."""
        self.pictures = ()
        self.features = None
        self.parts.clear()
        self.images_to_encode.clear()

    def runs_in(self, slots: Slots) -> bool:
        """Is its slot one of these?"""
        return self.slot is not None and self.slot.slots is slots

    @property
    def stalled(self) -> bool:
        """Is it so far ahead of its reader that it waits?"""
        return self.ahead is not None and len(self.pending) >= self.ahead

    @property
    def next_position(self) -> int:
        """Of the token that was generated last."""
        return self.prompt.next_position + self.stats.generated_tokens - 1
