"""``ppexport eval``: accuracy of a bundle on synthetic screens or a user's own questions, under every prune setting."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np

from .models.checks import shown
from .models.errors import RequestError
from .models.pruners import Pruner, changed, listed, with_budget
from .models.pruners.pixelprune import PixelPrune
from .models.pruners.prunesid import PruneSID
from .options import as_asked
from .runtime.bundle import check_takes_images, open_bundle
from .runtime.pipeline import Pipeline, load
from .runtime.sequence import PruneLike
from .workloads.own import read_tasks
from .workloads.score import score
from .workloads.screens import HELD_OUT, SKILLS, sample

SCREENS = "screens"
COUNT = 200  # screens of each skill
LONGEST = 200  # tokens of an answer


@dataclass(frozen=True)
class Asked:
    """One question with its answer."""

    image: Any
    question: str
    answer: str
    score: Callable[[str], float]


@dataclass(frozen=True)
class Result:
    """One skill under one prune setting."""

    skill: str  # or the name of the user's file
    setting: str  # "off", or method and tau
    n: int
    accuracy: float  # share of right answers; transcribe: of right characters
    low: float  # 95 % confidence interval
    high: float
    kept_share: float  # of image tokens, all samples together
    seconds: float  # for all samples
    answers: tuple[tuple[str, str, float], ...]  # expected, found, score


def evaluate(pipe: Pipeline, skill: str, prune: PruneLike, count: int = COUNT) -> Result:
    """Ask about ``count`` held-out screens of a skill, greedily."""
    return ask(pipe, skill, screens(skill, count), count, prune)


def screens(skill: str, count: int) -> Iterator[Asked]:
    """Held-out screens of a skill."""
    for i in range(count):
        made = sample(skill, HELD_OUT + i)
        yield Asked(np.asarray(made.image), made.question, made.answer, partial(score, made))


def ask(pipe: Pipeline, skill: str, questions: Iterator[Asked], count: int, prune: PruneLike) -> Result:
    """Ask ``count`` questions, greedily."""
    answers = []
    kept = 0
    total = 0
    begin = time.perf_counter()
    for asked in questions:
        answer = pipe.generate(asked.question, [asked.image], prune, max_new_tokens=LONGEST)
        found = answer.text().strip()
        answers.append((asked.answer, found, asked.score(found)))
        kept += answer.stats.kept
        total += answer.stats.total
    seconds = time.perf_counter() - begin
    scores = [s for _, _, s in answers]
    if skill == "transcribe":
        weights = [len(expected) for expected, _, _ in answers]
        accuracy = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
        low, high = _bootstrap(scores, weights)
    else:
        accuracy = sum(scores) / count
        low, high = _wilson(accuracy, count)
    name = setting_name(pipe.prune if isinstance(prune, str) else prune)
    return Result(skill, name, count, accuracy, low, high, kept / total, seconds, tuple(answers))


def setting_name(prune: Pruner | Sequence[Pruner] | None) -> str:
    """For people: "off", or the method and tau of PixelPrune, the budget of PruneSID and the names of others."""
    names = []
    for pruner in listed(prune):
        if isinstance(pruner, PixelPrune):
            names.append(f"{pruner.method} tau {pruner.tau:.4g}")
        else:
            names.append(f"prunesid {pruner.max_tokens}" if isinstance(pruner, PruneSID) else pruner.name)
    return ", ".join(names) or "off"


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z = 1.96
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def _bootstrap(scores: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """95 % interval of a weighted mean over samples, from 1000 resamples with a fixed seed.

    Scores that are all equal have no spread to draw from: theirs is Wilson's.
    """
    if len(set(scores)) == 1:
        return _wilson(scores[0], len(scores))
    rng = Random(0)
    pairs = list(zip(scores, weights, strict=True))
    means = []
    for _ in range(1000):
        drawn = rng.choices(pairs, k=len(pairs))
        means.append(sum(s * w for s, w in drawn) / sum(w for _, w in drawn))
    means.sort()
    return means[25], means[974]


def settings(
    pipe: Pipeline,
    taus: Sequence[float],
    no_prune: bool,
    method: str | None,
    budget: dict[str, Any] | None = None,
) -> list[PruneLike]:
    """The prune settings asked for: the bundle's if none is named. ``budget``: of PruneSID, for all."""
    if no_prune and method is not None and not taus:
        raise RequestError("--method says how to prune, found --no-prune alone; leave it out, or add --tau")
    chosen: list[PruneLike] = [as_asked((), {}, True, budget)] if no_prune else []
    given = {} if method is None else {"method": method}
    own = with_budget(pipe.prune, **budget) if budget else pipe.prune
    if not taus and not no_prune:
        chosen.append(changed(own, given) if given else own)
    return chosen + [changed(own, {**given, "tau": tau}) for tau in dict.fromkeys(taus)]


def questions_of(
    workload: str, skills: Sequence[str] | None, count: int | None
) -> list[tuple[str, int, list[Asked]]]:
    """Names and questions of a user's file; raises RequestError for options that are for screens, and bad files."""
    if skills:
        raise RequestError(
            f"skills are of the workload '{SCREENS}', found {workload!r:.80}; leave --skills out"
        )
    tasks = read_tasks(workload)[:count]
    asked = [Asked(task.image, task.question, task.answer, task.score) for task in tasks]
    return [(shown(Path(workload).name), len(asked), asked)]


def main(
    bundle: str,
    workload: str,
    skills: Sequence[str] | None,
    taus: Sequence[float],
    no_prune: bool,
    method: str | None,
    device: str,
    count: int | None,
    as_json: bool,
    budget: dict[str, Any] | None = None,
) -> None:
    """Print a table, or JSON with every answer."""
    unknown = sorted(set(skills or ()) - set(SKILLS)) if workload == SCREENS else []
    if unknown:
        raise RequestError(f"skill is {unknown[0]!r}, expected one of: {', '.join(SKILLS)}")
    own = [] if workload == SCREENS else questions_of(workload, skills, count)
    check_takes_images(bundle, open_bundle(bundle)[1], "every question is about an image")
    found = []
    pipe = load(bundle, device)
    chosen = settings(pipe, taus, no_prune, method, budget)
    if not as_json:
        click.echo(
            f"{'skill':<12}{'pruning':<32}{'accuracy':>9}{'95 % interval':>18}{'kept':>8}{'n':>6}{'ms each':>9}"
        )
    for r in _results(pipe, own, skills or SKILLS, chosen, count or COUNT):
        found.append(asdict(r))
        if not as_json:
            click.echo(line(r))
            sys.stdout.flush()
    if as_json:
        click.echo(json.dumps({"bundle": bundle, "workload": workload, "results": found}, ensure_ascii=False))


def _results(
    pipe: Pipeline,
    own: list[tuple[str, int, list[Asked]]],
    skills: Sequence[str],
    chosen: Sequence[PruneLike],
    count: int,
) -> Iterator[Result]:
    """A user's questions, or every skill, under every setting."""
    for prune in chosen:
        for name, n, asked in own:
            yield ask(pipe, name, iter(asked), n, prune)
        for skill in () if own else skills:
            yield evaluate(pipe, skill, prune, count)


def line(r: Result) -> str:
    """A row of the table."""
    interval = f"{r.low:.1%} .. {r.high:.1%}"
    each = r.seconds / r.n * 1e3
    return f"{r.skill:<12}{r.setting:<32}{r.accuracy:>9.1%}{interval:>18}{r.kept_share:>8.1%}{r.n:>6}{each:>9.1f}"
