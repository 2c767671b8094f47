"""Rounds of requests, all settings in each, in turning order: a slow moment of the machine hits all alike."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np

from ..calibration import prompt_ids
from ..models.errors import BackendError
from ..models.manifest import FILE, sha256
from ..models.progress import Progress, silent
from ..models.pruners import Pruner, changed
from ..models.version import __version__
from ..overlay import overlay
from ..runtime.bundle import check_takes_images, open_bundle
from ..runtime.pipeline import Pipeline, load
from ..runtime.sequence import Sequence
from ..runtime.stats import Stats
from . import machine, schema
from .power import Meter
from .schema import METRICS, STATISTICS, Interval, Item, Options, Request, Result, Setting, Summary
from .statistics import FEWEST, interval
from .workload import Question, picture

COLD = """import sys
sys.path[:] = [path for path in sys.path if path]  # what lies in the working directory is not meant
from ppexport.bench.cold import run
run()"""
STAGE_OF = {"image": "preprocess"}
PICTURES = 8
WIDTH = 800  # at most so many images, so many pixels wide


@dataclass(frozen=True)
class Plan:
    """What to measure and how long."""

    taus: Several[float | None] = (0.0, None)  # None: unpruned
    concurrency: Several[int] = (1,)  # requests at once
    rounds: int = 20  # each asks every question once under every setting (and once per concurrent request)
    duration: float | None = (
        None  # seconds, in place of a number of rounds; FEWEST rounds take as long as they do
    )
    warmup: int = 2  # rounds that do not count
    cold: int = 3  # new processes
    max_new_tokens: int = 32
    ignore_eos: bool = False  # answers as long as they may be, so that all take as many steps
    device: str = "auto"
    threads: int = 0
    min_pixels: int | None = None
    max_pixels: int | None = None
    pictures: bool = True  # of what was pruned, for reports

    @property
    def settings(self) -> list[tuple[float | None, int]]:
        """Every tau at every concurrency."""
        return [(tau, concurrency) for concurrency in self.concurrency for tau in self.taus]


@dataclass
class Block:
    """What one setting did: its requests, and how long it was at work."""

    requests: list[Request] = field(default_factory=list)
    seconds: float = 0.0


def measure(
    bundle: str,
    workload: str,
    questions: Several[Question],
    plan: Plan = Plan(),
    progress: Progress = silent,
) -> Result:
    """Measure a bundle. Raises BackendError, BundleError, ImageError, RequestError.

    After KeyboardInterrupt the rounds that were finished are the result, if there are any.
    """
    _, manifest = open_bundle(bundle)  # before processes are started
    check_takes_images(bundle, manifest, "every question is about an image")
    cold = _cold(bundle, questions[0], plan, progress)
    together = max(plan.concurrency)
    with load(
        bundle, plan.device, plan.min_pixels, plan.max_pixels, plan.threads, False, 0, together
    ) as pipe:
        items = [_item(pipe, question) for question in questions]
        blocks = {setting: Block() for setting in plan.settings}
        runner = Runner(pipe, questions, items, plan)
        probe = machine.Probe()
        for i in range(plan.warmup):
            progress("warm up", i, plan.warmup)
            runner.round(i, {setting: Block() for setting in plan.settings})
        progress("warm up", 1, 1)
        done = 0
        found = None
        interrupted = False
        with Meter() as meter:
            runner.begin = time.perf_counter()
            try:
                while not runner.finished(done):
                    probe.run()
                    fresh = {setting: Block() for setting in plan.settings}
                    runner.round(done, fresh)
                    for setting, block in fresh.items():
                        blocks[setting].requests += block.requests
                        blocks[setting].seconds += block.seconds
                    done += 1
                    found = found or machine.describe()  # clocks while at work
                    progress("measure", *runner.progress(done))
            except KeyboardInterrupt:
                if found is None:
                    raise
                interrupted = True
            probe.run()
        if not interrupted:
            progress("measure", 1, 1)
        assert found is not None
        return Result(
            version=1,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            ppexport=__version__,
            machine=found,
            bundle=_bundle(bundle, pipe),
            workload=workload,
            items=tuple(items),
            options=Options(
                taus=tuple(plan.taus),
                concurrency=tuple(plan.concurrency),
                max_new_tokens=plan.max_new_tokens,
                ignore_eos=plan.ignore_eos,
                threads=plan.threads,
                min_pixels=pipe.preprocessing.min_pixels,
                max_pixels=pipe.preprocessing.max_pixels,
            ),
            rounds=done,
            warmup=plan.warmup,
            cold=summary([np.array([ms]) for ms in cold]) if cold else None,
            settings=tuple(setting_of(*key, block, items) for key, block in blocks.items()),
            speed=schema.Speed(memory_gb_per_s=tuple(probe.memory), gflop_per_s=tuple(probe.arithmetic)),
            peak_rss_bytes=machine.peak_rss() - probe.nbytes,
            peak_gpu_bytes=meter.gpu_bytes,
            pictures=tuple(_pictures(pipe, questions, plan)) if plan.pictures else (),
            energy_joules=meter.joules,
        )


@dataclass
class Running:
    """A request under way."""

    number: int  # of the round
    item: int  # of the question
    user: deque[int]  # what the same user asks after it
    stats: Stats
    begin: float
    encoded: float = 0.0  # when the prompt's text was tokens
    end: float = 0.0  # of the last token so far
    tokens: list[int] = field(default_factory=list)


class Runner:
    """Runs rounds on a pipeline."""

    def __init__(self, pipe: Pipeline, questions: Several[Question], items: Several[Item], plan: Plan):
        self.pipe = pipe
        self.questions = questions
        self.items = items
        self.plan = plan
        self.begin = time.perf_counter()

    def finished(self, done: int) -> bool:
        """Is it enough after so many rounds? Fewer than FEWEST could not be compared."""
        if self.plan.duration is None:
            return done >= self.plan.rounds
        return done >= FEWEST and time.perf_counter() - self.begin >= self.plan.duration

    def progress(self, done: int) -> tuple[int, int]:
        """Done of total: rounds, or seconds."""
        if self.plan.duration is None:
            return done, self.plan.rounds
        seconds = min(time.perf_counter() - self.begin, self.plan.duration * done / FEWEST)
        return min(int(seconds), int(self.plan.duration)), max(1, int(self.plan.duration))

    def round(self, number: int, blocks: dict[tuple[float | None, int], Block]) -> None:
        """All settings once, in an order of their own in every round."""
        order = list(blocks)
        Random(number).shuffle(order)
        for tau, concurrency in order:
            block = blocks[tau, concurrency]
            begin = time.perf_counter()
            block.requests += self._together(number, tau, concurrency)
            block.seconds += time.perf_counter() - begin

    def _together(self, number: int, tau: float | None, concurrency: int) -> list[Request]:
        """So many users, each with every question once and one after the other, from a question of their own on."""
        count = len(self.questions)
        users = [deque((first + i) % count for i in range(count)) for first in range(concurrency)]
        running: dict[Sequence, Running] = {}
        done = []
        try:
            for user in users:
                self._ask(number, tau, user, running)
            while running:
                for sequence in self.pipe.engine.step():
                    record = running[sequence]
                    record.end = time.perf_counter()
                    record.tokens += [step.token for step in sequence.pending]
                    sequence.pending.clear()
                    if sequence.error is not None:
                        raise sequence.error
                    if sequence.finished:
                        done.append(self._request(running.pop(sequence)))
                        if record.user:
                            self._ask(number, tau, record.user, running)
        finally:
            for sequence in running:
                self.pipe.engine.cancel(sequence)
        return done

    def _ask(
        self, number: int, tau: float | None, user: deque[int], running: dict[Sequence, Running]
    ) -> None:
        """The next question of a user."""
        pipe = self.pipe
        item = user.popleft()
        question = self.questions[item]
        total = pipe.pixels(question.image)[1].placeholders
        stop = () if self.plan.ignore_eos else None
        record = Running(number, item, user, Stats(), time.perf_counter())
        ids = prompt_ids(pipe.text, pipe.manifest.model, question.prompt, [total])
        record.encoded = time.perf_counter()
        sequence = pipe.prepare_tokens(
            ids,
            [question.image],
            _prune(pipe, tau),
            self.plan.max_new_tokens,
            stats=record.stats,
            stop=stop,
            ahead=None,
            keeps_logits=False,
        )
        running[sequence] = record
        pipe.engine.add(sequence)

    def _request(self, record: Running) -> Request:
        stats = record.stats
        stages = dict.fromkeys(schema.STAGES, 0.0) | {"preprocess": (record.encoded - record.begin) * 1e3}
        for span in stats.spans:
            stages[STAGE_OF.get(span.stage, span.stage)] += span.milliseconds
        last_of_prompt = max(i for i, span in enumerate(stats.spans) if span.stage == "prefill")
        times = [
            stats.spans[last_of_prompt].end,
            *(span.end for span in stats.spans if span.stage == "decode"),
        ]
        return Request(
            round=record.number,
            item=record.item,
            start=(record.begin - self.begin) * 1e3,
            stages=stages,
            ttft=(times[0] - record.begin) * 1e3,
            e2el=(record.end - record.begin) * 1e3,
            itl=tuple((b - a) * 1e3 for a, b in pairwise(times)),
            kept=stats.kept,
            total=stats.total,
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.generated_tokens,
            answer=_said(self.pipe, record.tokens),
        )


def setting_of(tau: float | None, concurrency: int, block: Block, items: Several[Item]) -> Setting:
    """Requests and what they come to."""
    requests = block.requests
    once = {r.item: r for r in block.requests}
    judged = [is_right for r in requests if (is_right := items[r.item].judge(r.answer)) is not None]
    output = sum(r.output_tokens for r in requests)
    return Setting(
        tau=tau,
        concurrency=concurrency,
        metrics={name: summary(groups) for name in METRICS if (groups := by_round(requests, name))},
        request_throughput=len(requests) / block.seconds,
        output_throughput=output / block.seconds,
        total_token_throughput=(output + sum(r.prompt_tokens for r in requests)) / block.seconds,
        kept=sum(r.kept for r in once.values()),
        total=sum(r.total for r in once.values()),
        correct=sum(judged) if judged else None,
        answered=len(judged) if judged else None,
        requests=tuple(requests),
    )


def values_of(request: Request, metric: str, in_stages: bool = False) -> Several[float]:
    """One number of a request, several for itl, none for the tpot of a single token.

    ``in_stages``: what of a ttft, e2el or tpot the stages took.
    """
    if metric == "itl":
        return request.itl
    if metric in schema.STAGES:
        return [request.stages[metric]]
    found = request.in_stages(metric) if in_stages else getattr(request, metric)
    return [] if found is None else [found]


def by_round(requests: Several[Request], metric: str) -> list[np.ndarray]:
    """The values of each round that has any."""
    rounds: dict[int, list[float]] = {}
    for request in requests:
        rounds.setdefault(request.round, []).extend(values_of(request, metric))
    return [np.array(values) for values in rounds.values() if values]


def summary(groups: Several[np.ndarray]) -> Summary:
    """Statistics with their intervals; the resampling repeats itself."""
    rng = np.random.default_rng(0)
    found = {}
    for name in STATISTICS:
        value, low, high = interval(groups, name, rng)
        found[name] = Interval(value=value, low=low, high=high)
    return Summary(n=sum(map(len, groups)), **found)


def _pictures(pipe: Pipeline, questions: Several[Question], plan: Plan) -> Iterator[schema.Picture]:
    """The first images under every tau, small."""
    for item, question in enumerate(questions[:PICTURES]):
        for tau in plan.taus:
            if tau is not None:
                made = overlay(question.image, pipe.encode(question.image, _prune(pipe, tau)).selections)
                made.thumbnail((WIDTH, 4 * WIDTH))
                written = io.BytesIO()
                made.save(written, "webp", quality=60)
                yield schema.Picture(item=item, tau=tau, webp=base64.b64encode(written.getvalue()).decode())


def _prune(pipe: Pipeline, tau: float | None) -> tuple[Pruner, ...] | None:
    """As the bundle prunes, at this tau."""
    return None if tau is None else changed(pipe.prune, {"tau": tau})


def _said(pipe: Pipeline, tokens: Several[int]) -> str:
    """The answer as text, or its token ids where the bundle has no tokenizer."""
    if pipe.text is None:
        return " ".join(map(str, tokens))
    said: str = pipe.text.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return said


def _item(pipe: Pipeline, question: Question) -> Item:
    frames, _ = pipe.pixels(question.image)
    largest = max(frames, key=lambda frame: frame.size)
    return Item(
        image=question.name,
        sha256=hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest(),
        width=largest.shape[1],
        height=largest.shape[0],
        prompt=question.prompt,
        expected=question.expected,
    )


def _bundle(path: str, pipe: Pipeline) -> schema.Bundle:
    directory = Path(path)
    manifest = pipe.manifest
    return schema.Bundle(
        name=directory.resolve().name,
        sha256=sha256(directory / FILE),
        family=manifest.family,
        precision=str(manifest.precision),
        bytes=sum(file.bytes for file in manifest.files.values()),
        device=pipe.chosen,
    )


def _cold(bundle: str, question: Question, plan: Plan, progress: Progress) -> list[float]:
    """Milliseconds from the start of a new process to its first token."""
    if not plan.cold:
        return []
    found = []
    with tempfile.TemporaryDirectory() as name:
        image = question.image
        if not isinstance(image, str):
            image = f"{name}/image.png"
            picture(question).save(image)
        given = {**asdict(plan), "bundle": bundle, "image": image, "prompt": question.prompt}
        for i in range(plan.cold):
            progress("cold start", i, plan.cold)
            given["started"] = time.time()
            command = [sys.executable, "-c", COLD, json.dumps(given)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BackendError(f"a new process could not answer: {last}")
            found.append(float(done.stdout.splitlines()[-1]))
    progress("cold start", 1, 1)
    return found
