"""One bundle that answers requests: checks them, lets them run together, and counts what they did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..models.errors import PpexportError, RequestError
from ..runtime.answer import Step
from ..runtime.pipeline import Pipeline, load
from ..runtime.sequence import Request
from ..runtime.stats import Stats
from .errors import ApiError, busy, closing, of_product
from .images import ImageRules, image_of, messages_of
from .loop import Loop
from .metrics import Metrics
from .protocol import ChatRequest, SelectRequest, prune_of
from .shown import shown
from .timing import Timing

TEXT = 30  # tokens of a usual question with its template
READERS = 2  # threads that decode and prune images while the engine runs


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    slots: int = 8  # requests that run together
    queue: int = 32  # further ones that wait
    max_tokens: int = 1024  # of an answer whose request does not say
    seconds: float = 600.0  # for one request, waiting included


@dataclass(frozen=True)
class Top:
    """A token and its log probability, and the likeliest ones at its place."""

    token: int
    logprob: float
    others: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    tops: tuple[Top, ...]  # of the tokens in it, where they were asked for


@dataclass
class Run:
    """One request that is answered; ``stats`` grows while it runs."""

    request: Request
    arrived: float = field(default_factory=time.perf_counter)
    stats: Stats | None = None
    first: float = 0.0  # when its first token came
    last: float = 0.0


class Service:
    """Answers requests with one bundle; belongs to one event loop from ``start`` on."""

    def __init__(
        self, pipe: Pipeline, name: str, limits: Limits, rules: ImageRules, metrics: Metrics | None = None
    ):
        self.pipe = pipe
        self.name = name
        self.limits = limits
        self.rules = rules
        self.created = int(time.time())
        self.metrics = metrics or Metrics()
        self.timing = Timing()
        self.draining = False
        self.inside = 0  # requests that were let in and have not ended
        self._loop = Loop(pipe.engine)
        self._readers = ThreadPoolExecutor(READERS, "ppexport-reader")

    def start(self) -> None:
        """Begin to answer."""
        self._loop.start()

    def close(self) -> None:
        """End; requests that still run are left where they are."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._loop.close():
            self.pipe.close()

    @property
    def state(self) -> str:
        """ready, draining, or broken: the engine's thread ended, or a step takes longer than any request may."""
        if self._loop.broken is not None or self._loop.step_seconds > self.limits.seconds:
            return "broken"
        return "draining" if self.draining else "ready"

    def admit(self) -> None:
        """Let one more request in; ``leave`` is to follow. Raises ApiError if there is no room for it."""
        if self.state != "ready":
            raise closing(f"the server is {self.state}, and takes no further requests")
        room = self.limits.slots + self.limits.queue
        if self.inside >= room:
            raise busy(
                f"{self.inside} requests are running or waiting, expected under {room}: try again later", 1
            )
        self.inside += 1

    def leave(self) -> None:
        """A request that was let in has ended."""
        self.inside -= 1

    async def empty(self) -> None:
        """Until no request is inside any more."""
        while self.inside:
            await asyncio.sleep(0.02)

    async def answer(self, chat: ChatRequest, run: Run) -> AsyncGenerator[Piece, None]:
        """The parts of an answer to a request; ``run`` as ``run_of`` made it.

        Raises ApiError. Closing it ends the request.
        """
        deadline = run.arrived + self.limits.seconds
        try:
            sequence = await self._in_reader(
                lambda: self.pipe.prepare(run.request, None, chat.logprobs), deadline
            )
            run.stats = sequence.stats
            ticket = self._loop.add(sequence, lambda step: token_of(step, chat))
        except PpexportError as err:
            raise of_product(err) from err
        speech = self.pipe.speech(run.request)
        try:
            held: list[Top] = []
            while True:
                try:
                    found = await ticket.next(max(0.0, deadline - time.perf_counter()))
                except PpexportError as err:
                    raise of_product(err) from err
                except asyncio.TimeoutError as err:
                    raise self._late() from err
                if found is None:
                    break
                token, top = found
                run.last = time.perf_counter()
                run.first = run.first or run.last
                if top is not None:
                    held.append(top)
                text = speech.push(token)
                if text or speech.ended:
                    yield Piece(text, tuple(held))
                    held.clear()
                if speech.ended:
                    sequence.stats.finish = "stop"
                    break
            rest = speech.finish()
            if rest or held:
                yield Piece(rest, tuple(held))
            self.metrics.answered(sequence.stats, run.arrived, run.first, run.last)
            self.timing.add(sequence.stats)
        finally:
            self._loop.cancel(ticket)

    async def run_of(self, chat: ChatRequest, arrived: float) -> Run:
        """What a request asks of the pipeline; ``arrived`` in seconds of perf_counter. Raises ApiError."""
        work = lambda: request_of(chat, self.pipe, self.name, self.limits.max_tokens, self.rules)  # noqa: E731
        return Run(await self._in_reader(work, arrived + self.limits.seconds), arrived)

    async def select(self, asked: SelectRequest) -> dict[str, Any]:
        """What would be kept of a picture, and how long its first token would take. Raises ApiError."""

        def look() -> dict[str, Any]:
            image = image_of(asked.image, self.rules, "image")
            try:
                return shown(image, self.pipe.select(image, prune_of(asked.prune, self.pipe.prune)))
            except PpexportError as err:
                raise of_product(err) from err

        found: dict[str, Any] = await self._in_reader(look, time.perf_counter() + self.limits.seconds)
        return {**found, "predicted_ms": self.timing.first_token(found["kept"], TEXT)}

    async def _in_reader(self, work: Any, deadline: float) -> Any:
        """What comes of work in a thread. Raises ApiError where it takes too long; the thread does it to the end."""
        doing = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await asyncio.wait_for(doing, max(0.0, deadline - time.perf_counter()))
        except asyncio.TimeoutError as err:
            raise self._late() from err

    def _late(self) -> ApiError:
        return ApiError(504, f"the answer took longer than {self.limits.seconds:g} s", None, "timeout")

    async def measured(self) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and their content type."""
        await self.gauge()
        return self.metrics.text()

    async def gauge(self) -> None:
        """Measure what goes up and down."""
        self.metrics.running.set(self.inside)
        self.metrics.waiting.set(max(0, self.inside - self.limits.slots))
        # the engine may be in the middle of a step, for which nobody else here is to wait
        self.metrics.reuse_bytes.set(await asyncio.to_thread(lambda: self.pipe.engine.held_bytes))


def load_for_chats(bundle: str, device: str, **options: Any) -> Pipeline:
    """A bundle as runtime.pipeline.load opens it. Raises RequestError, too, for one without a tokenizer."""
    pipe = load(bundle, device, **options)
    if pipe.text is None:
        pipe.close()
        raise RequestError(f"{bundle}: has no tokenizer (its checkpoint had none), expected one for chats")
    return pipe


def request_of(chat: ChatRequest, pipe: Pipeline, name: str, max_tokens: int, rules: ImageRules) -> Request:
    """What a chat asks of a pipeline, whose bundle is called ``name``. Raises ApiError."""
    if chat.model and chat.model != name:
        message = f"the model {chat.model!r:.80} is not served here, expected {name!r}"
        raise ApiError(404, message, "model", code="model_not_found")
    messages = messages_of(chat.messages, rules)
    try:
        return Request(
            prompt=messages,
            prune=prune_of(chat.prune, pipe.prune),
            max_new_tokens=chat.max_completion_tokens or chat.max_tokens or max_tokens,
            temperature=chat.temperature,
            top_p=chat.top_p,
            top_k=chat.top_k,
            seed=chat.seed,
            until=chat.until,
            schema=chat.schema_,
        )
    except PpexportError as err:
        raise of_product(err) from err


def token_of(step: Step, chat: ChatRequest) -> tuple[int, Top | None]:
    """What is told of a step: its token, and where they were asked for its log probabilities."""
    return step.token, top_of(step, chat.top_logprobs) if chat.logprobs else None


def top_of(step: Step, count: int) -> Top:
    """Log probabilities of a token and of the likeliest ones, by the logits as the model gave them."""
    logits = step.logits.astype(np.float64)
    logits -= logits.max()
    probable = logits - np.log(np.exp(logits).sum())
    best: Sequence[int] = []
    if count:  # equal ones by rising number
        least = np.partition(probable, -count)[-count]
        likely = np.flatnonzero(probable >= least)
        best = likely[np.argsort(-probable[likely], kind="stable")][:count].tolist()
    return Top(step.token, float(probable[step.token]), tuple((n, float(probable[n])) for n in best))
