"""One thread that steps the engine for all requests of a server, and hands tokens to those who wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..runtime.answer import Step
from ..runtime.engine import Engine
from ..runtime.sequence import Sequence

LOG = logging.getLogger(__name__)
ENDING = 5.0  # seconds for the last step


class Ticket:
    """A sequence that runs, and a queue of what its reader has not seen yet; of one event loop."""

    def __init__(self, sequence: Sequence, told: Callable[[Step], Any]):
        self.sequence = sequence
        self.told = told
        self._events = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def hand_over(self, found: list[Any]) -> None:
        """From any thread; an exception is what ended the sequence early, None its end."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._events.call_soon_threadsafe(self._put, found)

    def _put(self, found: list[Any]) -> None:
        for each in found:
            self._queue.put_nowait(each)

    async def next(self, seconds: float) -> Any:
        """What is told of the next token, None at the end.

        Raises asyncio.TimeoutError, and what ended the sequence early.
        """
        found = await asyncio.wait_for(self._queue.get(), seconds)
        if isinstance(found, BaseException):
            raise found
        return found


class Loop:
    """Steps an engine as long as there is something to run. Start it once; ``add`` and ``cancel`` never wait."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.broken: BaseException | None = None  # what ended the thread
        self._inbox: deque[Ticket] = deque()
        self._tickets: dict[Sequence, Ticket] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._begun: float | None = None  # when the step that runs now began
        self._thread = threading.Thread(target=self._run, name="ppexport-engine", daemon=True)

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has run; 0 where none does."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, sequence: Sequence, told: Callable[[Step], Any]) -> Ticket:
        """Let a sequence run with the others; ``told``: what its reader gets of a step.

        Raises what ended the thread, if it did not go on.
        """
        if self.broken is not None:
            raise self.broken
        ticket = Ticket(sequence, told)
        with self._wake:
            self._inbox.append(ticket)
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        self.engine.cancel(ticket.sequence)
        with self._wake:
            self._wake.notify()

    def close(self) -> bool:
        """End the thread; what still runs is left where it is. False where a step hangs, and the thread with it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(ENDING)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as err:
            LOG.exception("the engine's thread ended")
            self.broken = err
            for ticket in [*self._tickets.values(), *self._inbox]:
                ticket.hand_over([err])

    def _step(self) -> bool:
        """Wait for something to run, and run it a step; False when the loop is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._inbox or not self.engine.idle)
            if self._closing:
                return False
            added = list(self._inbox)
            self._inbox.clear()
        for ticket in added:
            self._tickets[ticket.sequence] = ticket
            if not ticket.sequence.cancelled:
                self.engine.add(ticket.sequence)
        with self.engine.gate:
            pass
        self._begun = time.monotonic()
        stepped = self.engine.step()
        self._begun = None
        for sequence in stepped:
            self._hand_over(sequence)
        for sequence in [sequence for sequence in self._tickets if sequence.cancelled]:
            self._hand_over(sequence)
        return True

    def _hand_over(self, sequence: Sequence) -> None:
        """What is new of a sequence."""
        ticket = self._tickets.get(sequence)
        if ticket is None:  # somebody else's, or told already
            return
        found: list[Any] = []
        while sequence.pending:
            found.append(ticket.told(sequence.pending.popleft()))
        if sequence.error is not None:
            found.append(sequence.error)
        elif sequence.finished or sequence.cancelled:
            found.append(None)
        if sequence.finished or sequence.cancelled:
            del self._tickets[sequence]
        ticket.hand_over(found)
