"""``ppexport batch``: a file of requests as OpenAI's API takes them, answered together, in the order of the file.

Every line of the input is a request body, or as OpenAI's batch files have it {"custom_id": ..., "body": ...}. A line is
answered once: in the output, or, where it cannot be answered, among the errors, which are kept apart. What was cut off
goes on where it stopped.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .models.errors import PpexportError, RequestError, SpaceError
from .runtime.answer import Speech
from .runtime.pipeline import Pipeline
from .runtime.sequence import Sequence
from .server.chat import ChatWriter
from .server.errors import ApiError, invalid, of_product
from .server.images import ImageRules
from .server.protocol import ChatRequest, parse
from .server.service import Piece, Run, load_for_chats, request_of, top_of

if TYPE_CHECKING:
    from .cluster.connect import Cluster

LONGEST_LINE = 256 << 20  # bytes
BEGIN = b'{"line": '  # of every line that is written
Numbered = tuple[int, bytes]  # a line of the input, counted from 1


@dataclass(frozen=True)
class Written:
    """What is written of one line."""

    failed: bool  # it goes to the errors
    line: bytes  # with its end


@dataclass
class Job:
    """One line of the input."""

    number: int  # counted from 1
    custom_id: str | None = None
    chat: ChatRequest | None = None
    run: Run | None = None
    sequence: Sequence | None = None
    speech: Speech | None = None
    pieces: list[Piece] = field(default_factory=list)
    done: dict[str, Any] | None = None  # what is written of it
    failed: bool = False


def answer_file(
    source: Path,
    output: Path,
    answer: Callable[[Iterator[Numbered]], Iterator[Written]],
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> tuple[int, int]:
    """Answer the lines of ``source`` that ``output`` and its errors do not hold yet.

    Returns how many were answered, and how many the errors hold, those of earlier runs included.

    ``answer`` makes of each line what is written of it, in their order. Raises RequestError for files that cannot be
    read or do not belong together, SpaceError for what cannot be written.
    """
    errors = errors_of(output)
    failed_before = set(_held(errors))
    held = failed_before | set(_held(output))
    try:
        lines = source.open("rb")
    except OSError as err:
        raise RequestError(f"{source}: cannot be read: {err}") from err
    done = 0
    failed = len(failed_before)
    with lines:
        numbered = _numbered(lines)
        while held:
            number, _ = next(numbered, (0, b""))
            if not number:
                raise RequestError(
                    f"{output}: holds line {max(held)}, but {source} ends before: name another output"
                )
            if number not in held:
                raise RequestError(
                    f"{output}: lacks line {number} of {source} and holds later ones, expected it and {errors.name} as "
                    "a run left them; name another output, or put lines to ask again in a file of their own"
                )
            held.discard(number)
        for path in (output, errors):
            _cut(path)
        answers = answer(numbered)
        try:
            with output.open("ab") as good, errors.open("ab") as bad:
                for written in answers:
                    file = bad if written.failed else good
                    file.write(written.line)
                    file.flush()
                    failed += written.failed
                    done += not written.failed
                    progress(done, failed)
        except OSError as err:
            raise SpaceError(f"{output}: cannot be written: {err}; the next run goes on from there") from err
    return done, failed


def _numbered(lines: Any) -> Iterator[Numbered]:
    """The lines that are not blank, counted from 1; one that is too long without its end, which makes it no JSON."""
    number = 0
    while line := lines.readline(LONGEST_LINE):
        number += 1
        whole = line
        while not line.endswith(b"\n") and (line := lines.readline(LONGEST_LINE)):
            pass  # the rest of a line that is too long
        if whole.strip():
            yield number, whole


def errors_of(output: Path) -> Path:
    """Where lines go that cannot be answered."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def _held(path: Path) -> Iterator[int]:
    """Numbers of the lines that a file of answers holds. Raises RequestError for another file."""
    if not path.exists():
        return
    if not path.is_file():
        raise RequestError(f"{path}: is no regular file, expected the name of a file")
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield int(json.loads(line)["line"])
                elif not BEGIN.startswith(line[: len(BEGIN)]):
                    raise ValueError("it ends with something else")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RequestError(
            f"{path}: exists and is not of 'ppexport batch' ({err}), expected another name"
        ) from err


def _cut(path: Path) -> None:
    """Drop an unfinished last line of a file of answers."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def answer_lines(
    pipe: Pipeline, name: str, lines: Iterable[Numbered], max_tokens: int, rules: ImageRules
) -> Iterator[Written]:
    """What is written of each line, in their order; as many run together as the engine of ``pipe`` has slots."""
    for job in _together(pipe, name, _jobs(lines), max_tokens, rules):
        text = json.dumps(job.done, ensure_ascii=False)
        yield Written(job.failed, text.encode() + b"\n")


def _jobs(lines: Iterable[Numbered]) -> Iterator[Job]:
    for number, line in lines:
        job = Job(number)
        try:
            body = json.loads(line)
            if isinstance(body, dict) and isinstance(body.get("body"), dict):
                job.custom_id = str(body["custom_id"]) if body.get("custom_id") is not None else None
                body = body["body"]
            job.chat = parse(body)
            if job.chat.stream:
                raise invalid("stream is true, expected whole answers in a file", "stream")
        except (ValueError, RecursionError) as err:
            _fail(job, invalid(f"the line is no JSON: {err}"))
        except ApiError as err:
            _fail(job, err)
        yield job


def _fail(job: Job, err: ApiError) -> None:
    job.failed = True
    job.done = {"line": job.number, "custom_id": job.custom_id, "status": err.status, **err.body}


def _together(
    pipe: Pipeline, name: str, jobs: Iterator[Job], max_tokens: int, rules: ImageRules
) -> Iterator[Job]:
    """Jobs in their order when they are done; as many run together as the engine has slots."""
    waiting: deque[Job] = deque()  # of the first that is not done and all after it
    try:
        while True:
            running = sum(job.done is None for job in waiting)
            while running < pipe.engine.placement.together and (job := next(jobs, None)) is not None:
                waiting.append(job)
                if job.done is None:
                    _start(pipe, name, job, max_tokens, rules)
                running += job.done is None
            if not waiting:
                return
            if running:
                pipe.engine.step()
            for job in waiting:
                _advance(pipe, name, job)
            while waiting and waiting[0].done is not None:
                yield waiting.popleft()
    finally:
        for job in waiting:
            if job.sequence is not None:
                pipe.engine.cancel(job.sequence)


def _start(pipe: Pipeline, name: str, job: Job, max_tokens: int, rules: ImageRules) -> None:
    assert job.chat is not None
    try:
        request = request_of(job.chat, pipe, name, max_tokens, rules)
        job.run = Run(request)
        job.sequence = pipe.prepare(request, None, job.chat.logprobs)
        job.run.stats = job.sequence.stats
        job.speech = pipe.speech(request)
        pipe.engine.add(job.sequence)
    except ApiError as err:
        _fail(job, err)
    except PpexportError as err:
        _fail(job, of_product(err))


def _advance(pipe: Pipeline, name: str, job: Job) -> None:
    """What the last step made of a job."""
    if job.done is not None:
        return
    assert job.chat is not None
    assert job.run is not None
    assert job.sequence is not None
    assert job.speech is not None
    sequence = job.sequence
    while sequence.pending and not job.speech.ended:
        step = sequence.pending.popleft()
        job.run.last = time.perf_counter()
        job.run.first = job.run.first or job.run.last
        tops = (top_of(step, job.chat.top_logprobs),) if job.chat.logprobs else ()
        job.pieces.append(Piece(job.speech.push(step.token), tops))
    if job.speech.ended:
        sequence.stats.finish = "stop"
        pipe.engine.cancel(sequence)
    elif sequence.error is not None:
        error = sequence.error
        _fail(job, of_product(error) if isinstance(error, PpexportError) else ApiError(500, str(error)))
        return
    elif not sequence.finished:
        return
    job.pieces.append(Piece(job.speech.finish(), ()))
    answer = ChatWriter(pipe, name, job.chat, job.run).whole(job.pieces)
    job.done = {"line": job.number, "custom_id": job.custom_id, "response": answer}


@dataclass(frozen=True)
class Work:
    """How lines are answered."""

    bundle: str
    name: str | None = None  # of the model; None: the bundle's directory
    slots: int = 8
    max_tokens: int = 1024  # of an answer whose request does not say
    device: str = "auto"

    def open(self, threads: int = 0) -> Pipeline:
        """The bundle. Raises BundleError, BackendError, and RequestError for one without a tokenizer."""
        return load_for_chats(self.bundle, self.device, threads=threads, together=self.slots)

    def answer(self, pipe: Pipeline, lines: Iterable[Numbered]) -> Iterator[Written]:
        """What is written of each line."""
        name = self.name or Path(self.bundle).resolve().name
        return answer_lines(pipe, name, lines, self.max_tokens, ImageRules())


def main(work: Work, requests: str, output: str, quiet: bool, cluster: Cluster | None = None) -> int:
    """Answer a file here or on a cluster, and say how it went: the exit code, 1 where lines could not be answered."""
    target = Path(output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise RequestError(
            f"{output}: cannot be written, expected the name of a file in an existing directory"
        )
    if Path(requests).is_file() and target.exists() and target.samefile(requests):
        raise RequestError(f"{output}: is the file of requests, expected another name")
    length = _lines(requests)
    with _answerer(work, cluster) as answer:
        bar_shown = io.StringIO() if quiet else sys.stderr
        with click.progressbar(label="answers", length=length, file=bar_shown) as bar:
            done, failed = answer_file(Path(requests), target, answer, lambda done, failed: bar.update(1))
    click.echo(f"{done} answered in {output}")
    if failed:
        click.echo(f"{failed} could not be answered: {errors_of(target)}", err=True)
    return int(bool(failed))


@contextmanager
def _answerer(
    work: Work, cluster: Cluster | None
) -> Iterator[Callable[[Iterator[Numbered]], Iterator[Written]]]:
    if cluster is not None:
        from .cluster.batch import answering

        with answering(work, cluster) as answer:
            yield answer
        return
    with work.open() as pipe:
        yield lambda lines: work.answer(pipe, lines)


def _lines(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in file)
    except OSError as err:
        raise RequestError(f"{path}: cannot be read: {err}") from err
