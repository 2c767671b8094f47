"""The loop that all requests share: each step runs a part of one prompt, and one more token of every other sequence."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Several

import numpy as np

from ..models.errors import BackendError
from .answer import Step
from .backends.session import Buffer
from .language import Inputs, Language
from .placement import Placement
from .reuse import Reuse
from .sequence import Picture, Sequence
from .stats import log_request
from .vision import Seen, Vision

TOGETHER = 8  # sequences that run at once, if nothing else is asked for
FAR = (
    1024  # tokens behind the last place where states are kept, from which on the end of a prompt is one, too
)
TAIL = 16  # without these, which templates may write otherwise once the prompt has its answer
BRANCH = 64  # where sequences begin alike, states are kept after a multiple of so many tokens
CHUNK = 256  # tokens of a prompt that run at once while other sequences wait for their next token
CLOSED = "the pipeline is closed, expected an open one; load the bundle again"
NO_LOGITS = np.empty(0, np.float32)


class Engine:
    """Runs sequences together. Any thread may call any method; ``cancel`` never waits.

    ``vision``: None for models that take text only; ``context``: tokens of the longest sequence; ``together``:
    sequences that run at once, others wait for their turn; ``reuse``: None keeps nothing. ``lock`` belongs to whoever
    changes anything; who needs it between the steps of others takes ``gate`` first and holds both: who steps again and
    again passes the gate each time, and so waits.
    """

    def __init__(
        self,
        language: Language,
        vision: Vision | None,
        reuse: Reuse | None,
        context: int,
        together: int = TOGETHER,
    ):
        self.language = language
        self.vision = vision
        self.placement = Placement(language, reuse, context, together)
        self.lock = threading.RLock()
        self.gate = threading.Lock()
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._dropped: deque[Sequence] = deque()  # cancelled, and not taken out yet
        self._closed = False

    @property
    def idle(self) -> bool:
        """Is there nothing to run?"""
        return not (self._waiting or self._active or self._dropped)

    @property
    def held_bytes(self) -> int:
        """What is kept of past requests."""
        with self.gate, self.lock:
            self._take_out()
            return self.placement.held_bytes

    def add(self, sequence: Sequence) -> None:
        """Let a sequence run with the others. Raises BackendError where the engine is closed."""
        with self.lock:
            self._check_open()
            self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Let a sequence end where it is; what it computed is kept for others.

        Takes no lock: the garbage collector may do this in the middle of anything, on any thread.
        """
        if not sequence.cancelled:
            sequence.cancelled = True
            if not sequence.finished:
                log_request(sequence.stats)
            self._dropped.append(sequence)

    def next(self, sequence: Sequence) -> Step | None:
        """The next token of an added sequence, None at its end; others run on with it.

        Raises what ended the sequence early.
        """
        while True:
            with self.gate:
                pass
            with self.lock:
                if sequence.pending:
                    return sequence.pending.popleft()
                if sequence.error is not None:
                    raise sequence.error
                if sequence.finished or sequence.cancelled:
                    return None
                self.step()

    def step(self) -> list[Sequence]:
        """At most one chunk of one prompt, and one more token of every sequence that has a first one.

        Returns the sequences that got a token, or ended. A sequence that fails has an ``error``, and others run on.
        """
        with self.lock:
            self._take_out()
            self._leave_broken()
            return [*self._admit(), *self._decode(), *self._prefill()]

    def forget(self) -> None:
        """Keep nothing of past requests."""
        with self.lock:
            self._take_out()
            self.placement.forget()

    def close(self) -> None:
        """End all sequences, whose readers get an error, and keep nothing."""
        with self.lock:
            self._take_out()
            self._closed = True
            for sequence in [*self._waiting, *self._active]:
                sequence.error = BackendError(CLOSED)
                self.cancel(sequence)
            self._take_out()
            self.placement.reuse = None
            self.placement.drop_idle()

    # ------------------------------------------------------------------------------------- slots

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(CLOSED)

    def _take_out(self) -> None:
        """Sequences that were cancelled."""
        while self._dropped:
            sequence = self._dropped.popleft()
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            if sequence in self._active:
                self._end(sequence)

    def _leave_broken(self) -> None:
        """End the sequences whose memory was left half changed, by an interruption of another one."""
        for slots in [slots for slots in self.placement.pools if slots.broken]:
            inside = [sequence for sequence in self._active if sequence.runs_in(slots)]
            self._fail(inside, BackendError("a run of several requests was interrupted; ask again"))
            self.placement.drop(slots)

    def _admit(self) -> list[Sequence]:
        """Waiting sequences get slots; returns those that could not. Who waits for a reader keeps no other waiting."""
        failed = []
        while (
            self._waiting and sum(not sequence.stalled for sequence in self._active) < self.placement.together
        ):
            sequence = self._waiting.popleft()
            try:
                slot, known = self.placement.place(sequence, self._active)
            except Exception as err:
                sequence.fail(err)
                sequence.free()
                failed.append(sequence)
                continue
            slot.busy = True
            slot.images = sequence.digests
            sequence.slot = slot
            sequence.rest = sequence.prompt.after(known)
            left = np.unique(sequence.rest.image_of[sequence.rest.image_of >= 0])
            sequence.images_to_encode = [sequence.pictures[i] for i in left]
            sequence.stats.reused_tokens = known
            self._active.append(sequence)
        return failed

    def _end(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        self._active.remove(sequence)
        slot = sequence.slot
        assert slot is not None
        sequence.slot = None
        sequence.free()
        self.placement.give_back(slot)

    def _fail(self, sequences: Several[Sequence], error: BaseException) -> None:
        for sequence in sequences:
            sequence.fail(error)
            slot = sequence.slot
            assert slot is not None
            if not slot.slots.broken:
                slot.rewind(0)
            self._end(sequence)

    # ------------------------------------------------------------------------------------- prompts

    def _prefill(self) -> list[Sequence]:
        """One image or one chunk of the first prompt that is not done; all of it where nobody else waits for tokens."""
        sequence = next((s for s in self._active if not s.decodes), None)
        if sequence is None:
            return []
        others = any(s.decodes and not s.stalled for s in self._active)
        try:
            while not sequence.encoded:
                self._encode(sequence)
                if others and sequence.pictures:
                    return []
            return self._run_prompt(sequence, CHUNK if others and self.language.backend.appends else None)
        except Exception as err:
            self._fail([sequence], err)
            return [sequence]

    def _encode(self, sequence: Sequence) -> None:
        """Features of one more image that the slot does not hold; ``encoded`` when all are there."""
        with sequence.stats.stage("vision"):
            missing = sequence.images_to_encode
            if missing:
                sequence.parts.append(self.features(missing[0]))
                missing.pop(0)  # now, since an interruption of the line above belongs to somebody else
                self.language.backend.wait()
            sequence.encoded = not missing
            if sequence.encoded and sequence.parts:
                assert self.vision is not None
                sequence.features = self.vision.join(sequence.parts)
                sequence.parts.clear()

    def features(self, picture: Picture) -> Buffer:
        """Features of an image [1 + L, K, D] on the backend, all views; computed where they are not kept."""
        with self.lock:
            self._check_open()
            assert self.vision is not None
            return picture.features or self.vision.whole(self.seen(picture))

    def seen(self, picture: Picture) -> tuple[Seen, ...]:
        """What the vision tower makes of each view of an image; computed where it is not kept."""
        with self.lock:
            self._check_open()
            reuse = self.placement.reuse
            kept = reuse.features.get(picture.digest) if reuse else None
            if kept is not None:
                return kept
            assert self.vision is not None
            computed = tuple(self.vision.encode(view.image, view.keep, view.others) for view in picture.views)
            if reuse:
                reuse.features.keep(picture.digest, computed)
            return computed

    def _run_prompt(self, sequence: Sequence, most: int | None) -> list[Sequence]:
        """Run what is left of a prompt, or ``most`` tokens of it."""
        rest = sequence.rest
        slot = sequence.slot
        assert rest is not None
        assert slot is not None
        end = len(rest.ids) if most is None else min(sequence.done + most, len(rest.ids))
        with sequence.stats.stage("prefill"):
            self.placement.make_room(slot.slots, slot.length + end - sequence.done)
            marks = self._marks(sequence)
            for until in (*(mark for mark in marks if sequence.done < mark < end), end):
                begin = sequence.done
                inputs = Inputs(
                    rest.ids[None, begin:until],
                    rest.feature_rows[None, begin:until],
                    rest.positions[:, None, begin:until],
                    np.array([slot.length], np.int32),
                )
                logits = self.language.run(slot.slots, slot.index, [slot.index], inputs, sequence.features)
                slot.append(rest.columns[:, begin:until])
                slot.slots.broken = False
                sequence.done = until
                if until in marks:
                    slot.keep()
        if end < len(rest.ids):
            return []
        sequence.features = None
        return self._choose([sequence], logits)

    def _marks(self, sequence: Sequence) -> list[int]:
        """After how many tokens of its rest another question may go on.

        Before its first image and behind the last, where another sequence began to differ (behind a system prompt that
        both have), and at the end of a long text. Only of models whose states cannot be cut back; with others a
        question may go on from anywhere. Every place costs one more pass over the weights, and a copy of the states.
        """
        rest = sequence.rest
        slot = sequence.slot
        assert rest is not None
        assert slot is not None
        if self.placement.reuse is None or slot.slots.rewindable or not self.language.backend.appends:
            return []
        end = len(rest.ids)
        known = len(sequence.prompt.ids) - end
        branch = max(
            0, sequence.branch // BRANCH * BRANCH - known
        )  # questions may have a first word in common
        if rest.image_of[branch] >= 0:  # an image is shared as a whole
            branch = int((rest.image_of == rest.image_of[branch]).argmax())
        shown = np.flatnonzero(rest.image_of >= 0)
        first = int(shown[0]) if len(shown) else 0
        marks = {branch, int(shown[-1]) + 1 if len(shown) else 0, first if first >= BRANCH else 0}
        if end - max(marks) >= FAR:
            marks.add(end - TAIL)
        return sorted(marks - {0})

    # -------------------------------------------------------------------------------------- tokens

    def _decode(self) -> list[Sequence]:
        """One more token of every sequence that has one and whose reader is not far behind."""
        advanced = []
        for batch in self._batches():
            begin = [sequence.stats.begin() for sequence in batch]
            try:
                logits = self._run_tokens(batch)
            except Exception as err:
                self._fail(batch, err)
                advanced += batch
                continue
            for sequence, at in zip(batch, begin, strict=True):
                sequence.stats.end("decode", at)
            if self.language.backend.notes:
                batch[0].stats.notes += self.language.backend.notes
                self.language.backend.notes.clear()
            advanced += self._choose(batch, logits)
        return advanced

    def _batches(self) -> Iterator[list[Sequence]]:
        """Sequences that run as one: those of the same memory, or each alone."""
        ready = [sequence for sequence in self._active if sequence.decodes and not sequence.stalled]
        for slots in list(self.placement.pools):
            batch = [sequence for sequence in ready if sequence.runs_in(slots)]
            if self.language.batches and batch:
                yield batch
            else:
                yield from ([sequence] for sequence in batch)

    def _run_tokens(self, batch: list[Sequence]) -> np.ndarray:
        """Run the last token of each: logits float32 [len(batch), V].

        The rows between the first and the last slot run all. One that lies idle there, or waits, runs a token that
        nobody asked for: it is written behind the slot's own end, and the next token there takes its place.
        """
        places = [sequence.slot for sequence in batch if sequence.slot is not None]
        slots = places[0].slots
        first = min(slot.index for slot in places)
        rows = slots.listed[first : max(slot.index for slot in places) + 1]
        self.placement.make_room(slots, max(slot.length for slot in rows) + 1)
        n = len(rows)
        ids = np.zeros((n, 1), np.int32)
        positions = np.zeros((self.language.model.axes, n, 1), np.int32)
        for sequence, slot in zip(batch, places, strict=True):
            ids[slot.index - first] = sequence.token
            positions[:, slot.index - first] = sequence.next_position
        start = np.array([slot.length for slot in rows], np.int32)
        inputs = Inputs(ids, np.full((n, 1), -1, np.int32), positions, start)
        active = [slot.index for slot in places]
        logits = self.language.run(slots, first, active, inputs, None)
        for slot in places:
            row = slot.index - first
            slot.append(np.vstack([ids[row], [-1], positions[:, row]]).astype(np.int32))
        slots.broken = False
        return logits[[slot.index - first for slot in places]] if n > 1 else logits

    def _choose(self, batch: list[Sequence], logits: np.ndarray) -> list[Sequence]:
        """The next token of each, from logits float32 [len(batch), V]."""
        for sequence, row in zip(batch, logits, strict=True):
            stats = sequence.stats
            try:
                token, last = sequence.choose(row)
            except Exception as err:
                self._fail([sequence], err)
                continue
            sequence.token = token
            stats.generated_tokens += 1
            full = stats.generated_tokens == sequence.limit
            finish = "stop" if last else sequence.limited_by if full else ""
            if finish:  # else its reader may end it at this moment, and say why
                stats.finish = finish
            sequence.pending.append(Step(token, row.copy() if sequence.keeps_logits else NO_LOGITS))
            if finish:
                sequence.finished = True
                self._end(sequence)
                log_request(stats)
        return batch
