"""``ppexport eval``: accuracy of a bundle on the pocket workload, per skill and prune setting."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random

import click
import numpy as np

from .models.errors import RequestError
from .runtime.pipeline import Pipeline, load
from .runtime.prune import Prune
from .workloads.score import score
from .workloads.screens import HELD_OUT, SKILLS, sample


@dataclass(frozen=True)
class Result:
    """One skill under one prune setting."""

    skill: str
    setting: str  # "off", or method and tau
    n: int
    accuracy: float  # share of right answers; transcribe: of right characters
    low: float  # 95 % confidence interval
    high: float
    kept_share: float  # of image tokens, all samples together
    seconds: float  # for all samples
    answers: tuple[tuple[str, str, float], ...]  # expected, found, score


def evaluate(pipe: Pipeline, skill: str, prune: Prune | None, count: int) -> Result:
    """Ask about ``count`` held-out samples of a skill, greedily."""
    answers, kept, total, begin = [], 0, 0, time.perf_counter()
    for i in range(count):
        made = sample(skill, HELD_OUT + i)
        answer = pipe.generate(made.question, [np.asarray(made.image)], prune, max_new_tokens=200)
        found = answer.text().strip()
        answers.append((made.answer, found, score(made, found)))
        kept, total = kept + answer.stats.kept, total + answer.stats.total
    seconds = time.perf_counter() - begin
    scores = [s for _, _, s in answers]
    if skill == "transcribe":
        weights = [len(expected) for expected, _, _ in answers]
        accuracy = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
        low, high = _bootstrap(scores, weights)
    else:
        accuracy = sum(scores) / count
        low, high = _wilson(accuracy, count)
    name = "off" if prune is None else f"{prune.method} tau {prune.tau:.4g}"
    return Result(skill, name, count, accuracy, low, high, kept / total, seconds, tuple(answers))


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z = 1.96
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def _bootstrap(scores: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """95 % interval of a weighted mean over samples, from 1000 resamples with a fixed seed."""
    rng = Random(0)
    pairs = list(zip(scores, weights, strict=True))
    means = []
    for _ in range(1000):
        drawn = rng.choices(pairs, k=len(pairs))
        means.append(sum(s * w for s, w in drawn) / sum(w for _, w in drawn))
    means.sort()
    return means[25], means[974]


def settings(taus: Sequence[float], no_prune: bool, method: str) -> list[Prune | None]:
    """The prune settings asked for: tau 0 if none is named."""
    chosen: list[Prune | None] = [None] if no_prune else []
    wanted = taus or ([] if no_prune else [0.0])
    return chosen + [Prune(method, tau=tau) for tau in wanted]


def results(pipe: Pipeline, skills: Sequence[str], chosen: Sequence[Prune | None], count: int) -> Iterator[Result]:
    """Every skill under every setting."""
    for prune in chosen:
        for skill in skills:
            yield evaluate(pipe, skill, prune, count)


def main(
    bundle: str,
    workload: str,
    skills: Sequence[str] | None,
    taus: Sequence[float],
    no_prune: bool,
    method: str,
    device: str,
    count: int,
    as_json: bool,
) -> None:
    """Print a table, or JSON with every answer."""
    unknown = sorted(set(skills or ()) - set(SKILLS))
    if unknown:
        raise RequestError(f"skill is {unknown[0]!r}, expected one of: {', '.join(SKILLS)}")
    found = []
    pipe = load(bundle, device)
    if not as_json:
        click.echo(f"{'skill':<12}{'pruning':<24}{'accuracy':>9}{'95 % interval':>18}{'kept':>8}{'n':>6}{'ms each':>9}")
    for r in results(pipe, skills or SKILLS, settings(taus, no_prune, method), count):
        found.append(asdict(r))
        if not as_json:
            interval = f"{r.low:.1%} .. {r.high:.1%}"
            each = r.seconds / r.n * 1e3
            line = (
                f"{r.skill:<12}{r.setting:<24}{r.accuracy:>9.1%}{interval:>18}{r.kept_share:>8.1%}{r.n:>6}{each:>9.1f}"
            )
            click.echo(line)
            sys.stdout.flush()
    if as_json:
        click.echo(json.dumps({"bundle": bundle, "workload": workload, "results": found}, ensure_ascii=False))
