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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np

from ..calibration import prompt_ids
from ..models.errors import BackendError
from ..models.manifest import FILE, sha256
from ..models.pruners import Pruner, changed
from ..models.version import __version__
from ..overlay import overlay
from ..runtime.bundle import open_bundle
from ..runtime.image import prepare
from ..runtime.pipeline import Pipeline, load
from ..runtime.stats import Stats
from . import machine, schema
from .power import Meter
from .schema import METRICS, STATISTICS, Interval, Item, Options, Request, Result, Setting, Summary
from .statistics import interval
from .workload import Question, picture

COLD = """import sys
sys.path[:] = [path for path in sys.path if path]  # what lies in the working directory is not meant
from ppexport.bench.cold import run
run()"""
STAGE_OF = {"image": "preprocess"}
PICTURES, WIDTH = 8, 800  # at most so many images, so many pixels wide
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Plan:
    """What to measure and how long."""

    taus: Sequence[float | None] = (0.0, None)  # None: unpruned
    concurrency: Sequence[int] = (1,)
    rounds: int = 20  # each asks every question once under every setting (and once per concurrent request)
    duration: float | None = None  # seconds, in place of a number of rounds
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
    questions: Sequence[Question],
    plan: Plan = Plan(),
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Measure a bundle. Raises BackendError, BundleError, ImageError, RequestError.

    After KeyboardInterrupt the rounds that were finished are the result, if there are any.
    """
    open_bundle(bundle)  # before processes are started
    cold = _cold(bundle, questions[0], plan, progress)
    with load(bundle, plan.device, plan.min_pixels, plan.max_pixels, plan.threads, reuse=0) as pipe:
        items = [_item(pipe, question) for question in questions]
        blocks = {setting: Block() for setting in plan.settings}
        runner, probe = Runner(pipe, questions, items, plan), machine.Probe()
        for i in range(plan.warmup):
            progress("warm up", i, plan.warmup)
            runner.round(i, {setting: Block() for setting in plan.settings})
        progress("warm up", 1, 1)
        done, found, interrupted = 0, None, False
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
                min_pixels=pipe.min_pixels,
                max_pixels=pipe.max_pixels,
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


class Runner:
    """Runs rounds on a pipeline."""

    def __init__(self, pipe: Pipeline, questions: Sequence[Question], items: Sequence[Item], plan: Plan):
        self.pipe, self.questions, self.items, self.plan = pipe, questions, items, plan
        self.begin = time.perf_counter()

    def finished(self, done: int) -> bool:
        """Is it enough after so many rounds? There is at least one."""
        if self.plan.duration is None:
            return done >= self.plan.rounds
        return done > 0 and time.perf_counter() - self.begin >= self.plan.duration

    def progress(self, done: int) -> tuple[int, int]:
        """Done of total: rounds, or seconds."""
        if self.plan.duration is None:
            return done, self.plan.rounds
        return min(int(time.perf_counter() - self.begin), int(self.plan.duration)), max(1, int(self.plan.duration))

    def round(self, number: int, blocks: dict[tuple[float | None, int], Block]) -> None:
        """All settings once, in an order of their own in every round."""
        order = list(blocks)
        Random(number).shuffle(order)
        for tau, concurrency in order:
            block, begin = blocks[tau, concurrency], time.perf_counter()
            if concurrency == 1:
                block.requests += self._pass(number, tau, 0)
            else:
                with ThreadPoolExecutor(concurrency) as pool:
                    futures = [pool.submit(self._pass, number, tau, i) for i in range(concurrency)]
                    block.requests += [request for future in futures for request in future.result()]
            block.seconds += time.perf_counter() - begin

    def _pass(self, number: int, tau: float | None, first: int) -> list[Request]:
        """Every question once, from question ``first`` on."""
        count = len(self.questions)
        return [self._request(number, tau, (first + i) % count) for i in range(count)]

    def _request(self, number: int, tau: float | None, item: int) -> Request:
        pipe, question, stats = self.pipe, self.questions[item], Stats()
        total = self.items[item].width * self.items[item].height // pipe.selector.block**2
        stop = () if self.plan.ignore_eos else None
        begin = time.perf_counter()
        ids = prompt_ids(pipe.text, pipe.manifest.model, question.prompt, [total])
        encoded = time.perf_counter()
        steps = pipe.generate_tokens(
            ids, [question.image], _prune(pipe, tau), self.plan.max_new_tokens, stats=stats, stop=stop
        )
        tokens = []
        for step in steps:
            tokens.append(step.token)
            end = time.perf_counter()  # giving back the caches comes after the answer
        stages = dict.fromkeys(schema.STAGES, 0.0) | {"preprocess": (encoded - begin) * 1e3}
        for span in stats.spans:
            stages[STAGE_OF.get(span.stage, span.stage)] += span.milliseconds
        times = [span.end for span in stats.spans if span.stage in ("prefill", "decode")]
        return Request(
            round=number,
            item=item,
            start=(begin - self.begin) * 1e3,
            stages=stages,
            ttft=(times[0] - begin) * 1e3,
            e2el=(end - begin) * 1e3,
            itl=tuple((b - a) * 1e3 for a, b in pairwise(times)),
            kept=stats.kept,
            total=stats.total,
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.generated_tokens,
            answer=_said(pipe, tokens),
        )


def setting_of(tau: float | None, concurrency: int, block: Block, items: Sequence[Item]) -> Setting:
    """Requests and what they come to."""
    requests, once = block.requests, {r.item: r for r in block.requests}
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


def values_of(request: Request, metric: str, in_stages: bool = False) -> Sequence[float]:
    """One number of a request, several for itl, none for the tpot of a single token.

    ``in_stages``: what of a ttft, e2el or tpot the stages took.
    """
    if metric == "itl":
        return request.itl
    if metric in schema.STAGES:
        return [request.stages[metric]]
    found = request.in_stages(metric) if in_stages else getattr(request, metric)
    return [] if found is None else [found]


def by_round(requests: Sequence[Request], metric: str) -> list[np.ndarray]:
    """The values of each round that has any."""
    rounds: dict[int, list[float]] = {}
    for request in requests:
        rounds.setdefault(request.round, []).extend(values_of(request, metric))
    return [np.array(values) for values in rounds.values() if values]


def summary(groups: Sequence[np.ndarray]) -> Summary:
    """Statistics with their intervals; the resampling repeats itself."""
    rng, found = np.random.default_rng(0), {}
    for name in STATISTICS:
        value, low, high = interval(groups, name, rng)
        found[name] = Interval(value=value, low=low, high=high)
    return Summary(n=sum(map(len, groups)), **found)


def _pictures(pipe: Pipeline, questions: Sequence[Question], plan: Plan) -> Iterator[schema.Picture]:
    """The first images under every tau, small."""
    for item, question in enumerate(questions[:PICTURES]):
        for tau in plan.taus:
            if tau is not None:
                selection = pipe.encode(question.image, _prune(pipe, tau)).selection
                made = overlay(question.image, selection)
                made.thumbnail((WIDTH, 4 * WIDTH))
                written = io.BytesIO()
                made.save(written, "webp", quality=60)
                yield schema.Picture(item=item, tau=tau, webp=base64.b64encode(written.getvalue()).decode())


def _prune(pipe: Pipeline, tau: float | None) -> tuple[Pruner, ...] | None:
    """As the bundle prunes, at this tau."""
    return None if tau is None else changed(pipe.prune, {"tau": tau})


def _said(pipe: Pipeline, tokens: Sequence[int]) -> str:
    """The answer as text, or its token ids where the bundle has no tokenizer."""
    if pipe.text is None:
        return " ".join(map(str, tokens))
    said: str = pipe.text.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return said


def _item(pipe: Pipeline, question: Question) -> Item:
    pixels = prepare(question.image, pipe.selector.block, pipe.min_pixels, pipe.max_pixels)
    return Item(
        image=question.name,
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        width=pixels.shape[1],
        height=pixels.shape[0],
        prompt=question.prompt,
        expected=question.expected,
    )


def _bundle(path: str, pipe: Pipeline) -> schema.Bundle:
    directory, manifest = Path(path), pipe.manifest
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
