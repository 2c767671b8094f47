"""What became of each metric between two measurements, told with the noise of both in mind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..models.errors import RequestError
from ..table import aligned
from .machine import differences
from .measure import values_of
from .schema import METRICS, STAGES, Result, Setting, Speed
from .statistics import FEWEST, QUANTILE, ratio, statistic

# What a request takes when the machine lets it: moments in which the machine is slow come and go between measurements,
# and make medians scatter ten times as much (bench/latency_noise.py). Promises about p50 or p95 are judged by --metric.
DEFAULT = tuple(f"{name}.p10" for name in ("ttft", "tpot", "e2el", *STAGES, "other"))
WHOLE = ("ttft", "tpot", "e2el")  # metrics that stages add up to, but for what no stage took
SHIFT = 0.25  # a smaller difference between the machine's speeds then and now says nothing about times
RESOLUTION = 0.01  # milliseconds by which a stage differs from process to process
WRONG = 0.05  # chance that any verdict of a comparison is wrong where nothing changed
SHARES = ("accuracy", "answered")  # metrics that are no times
SMALL = 0.01  # of the end-to-end latency: what is not known of a smaller stage does not matter
IMPROVED = "improved"
SAME = "same"
REGRESSED = "regressed"
UNSURE = "cannot tell"
CANNOT_TELL = 3  # exit code; 2 is that of wrong options and files that cannot be read


@dataclass(frozen=True)
class Verdict:
    """One metric under one setting."""

    setting: str
    metric: str  # "ttft.p50"
    base: float | None  # milliseconds, of all requests; shares of right answers for "accuracy"
    new: float | None
    ratio: float | None  # new over base, each question compared with itself
    low: float | None  # of its confidence interval
    high: float | None
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All verdicts. ``exit_code``: 1 if anything regressed, else CANNOT_TELL if anything cannot be told, else 0."""

    tolerance: float
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """For a shell."""
        found = {each.verdict for each in self.verdicts}
        return 1 if REGRESSED in found else CANNOT_TELL if UNSURE in found or not found else 0

    def of(self, verdict: str) -> list[Verdict]:
        """Those with that verdict."""
        return [each for each in self.verdicts if each.verdict == verdict]


def compare(
    base: Result,
    new: Result,
    tolerance: float = 0.05,
    metrics: Sequence[str] | None = None,
    accuracy: bool = False,
    any_machine: bool = False,
) -> Comparison:
    """Judge ``new`` by ``base``.

    A metric has regressed if its whole confidence interval lies above 1 + tolerance, has improved if it lies below
    1 / (1 + tolerance), is the same if it lies between; else it cannot be told. Intervals are so wide that all of them
    together are right in 95 of 100 comparisons, and wider by what the machine itself became slower or faster. Raises
    RequestError for results of different questions or options, and for an unknown metric.
    """
    _check_alike(base, new)
    names = parse(metrics)
    apart = [] if any_machine else differences(base.machine, new.machine)
    slower, faster, notes = _machine_speed(base.speed, new.speed)
    notes += [
        f"different machines ({each}): nothing can be told; --any-machine compares them" for each in apart
    ]
    found: list[Verdict] = []
    others = {(s.tau, s.concurrency): s for s in new.settings}
    confidence = 1 - WRONG / max(1, len(names) * len(base.settings))
    for setting in base.settings:
        other = others.pop((setting.tau, setting.concurrency), None)
        if other is None:
            found += [_unsure(setting, f"{metric}.{name}", "not measured now") for metric, name in names]
            found += [_unsure(setting, "accuracy", "not measured now")] if accuracy else []
            continue
        if changed := _other_lengths(setting, other):
            notes.append(
                f"{setting.name}: {changed} answers became longer or shorter; --ignore-eos would not let them"
            )
        for metric, name in names:
            verdict = _judge(
                setting, other, metric, name, tolerance, confidence, slower, faster, metrics is None
            )
            if verdict is not None:
                found.append(verdict if not apart else _unsure(setting, verdict.metric, "different machines"))
        if accuracy:
            found.append(_accuracy(setting, other, base))
    notes += [f"{other.name}: not measured then" for other in others.values()]
    return Comparison(tolerance, tuple(found), tuple(notes))


def _check_alike(base: Result, new: Result) -> None:
    before, after = ([(i.sha256, i.prompt, i.expected) for i in r.items] for r in (base, new))
    if before != after:
        raise RequestError(
            f"the results are of different questions: {len(before)} of '{base.workload}' and {len(after)} of "
            f"'{new.workload}', expected the same images (at the same size) and prompts; measure again"
        )
    for name in ("max_new_tokens", "ignore_eos", "threads"):
        first = getattr(base.options, name)
        second = getattr(new.options, name)
        if first != second:
            raise RequestError(f"{name} was {first} and is {second}, expected the same; measure again")


def parse(
    metrics: Sequence[str] | None, known: Sequence[str] = METRICS, default: Sequence[str] = DEFAULT
) -> list[tuple[str, str]]:
    """("ttft", "p50") of "ttft.p50" or "ttft"; None: the default. Raises RequestError for what is not ``known``."""
    found = []
    for name in default if metrics is None else metrics:
        metric, _, how = name.partition(".")
        if metric not in known or (how or "p50") not in (*QUANTILE, "mean"):
            raise RequestError(
                f"metric is {name!r}, expected one of {', '.join(known)} with .mean, .p10, .p50, .p90, .p95 or .p99"
            )
        found.append((metric, how or "p50"))
    return found


def _machine_speed(base: Speed, new: Speed) -> tuple[float, float, list[str]]:
    """How many times slower and faster the machine may be now: (at least 1, at most 1), and what to say of it."""
    slower = 1.0
    faster = 1.0
    notes = []
    for what, name in (("reads memory", "memory_gb_per_s"), ("multiplies", "gflop_per_s")):
        times = [1 / np.array(getattr(speed, name)) for speed in (base, new)]
        value = float(np.median(times[1]) / np.median(times[0]))
        if not 1 / (1 + SHIFT) < value < 1 + SHIFT:
            slower = max(slower, value)
            faster = min(faster, value)
            word = "slower" if value > 1 else "faster"
            notes.append(
                f"the machine itself {what} {abs(value - 1):.0%} {word}: intervals are that much wider"
            )
    return slower, faster, notes


def _judge(
    base: Setting,
    new: Setting,
    metric: str,
    name: str,
    tolerance: float,
    confidence: float,
    slower: float,
    faster: float,
    by_default: bool,
) -> Verdict | None:
    """The verdict on one metric; None where it has no values (a stage that does not run) and nobody named it."""
    tables = common(base, new, metric) if metric != "prune" or base.tau is not None else None
    if tables is None or not all(values.size and (values > 0).all() for values in tables):
        return None if by_default else _unsure(base, f"{metric}.{name}", "it has no values here")
    before, after = (typical(values, name) for values in tables)

    def interval(tables: tuple[np.ndarray, np.ndarray]) -> tuple[float, float, float]:
        value, low, high = ratio(tables[0], tables[1], name, confidence, np.random.default_rng(0))
        apart = 0 if metric in ("tpot", "itl") else RESOLUTION / before
        return value, low / slower - apart, high / faster + apart

    value, low, high = interval(tables)
    if not np.isfinite(high):
        return _unsure(base, f"{metric}.{name}", f"too few rounds, expected at least {FEWEST} in both")
    verdict = verdict_of(low, high, tolerance)
    note = ""
    if verdict in (REGRESSED, IMPROVED) and metric in (*WHOLE, "other"):
        in_stages = common(base, new, metric, in_stages=True) if metric in WHOLE else None
        if in_stages is None or verdict_of(*interval(in_stages)[1:], tolerance) != verdict:
            verdict = UNSURE
            note = "only the time outside of all stages (other) says so"
    elif verdict == UNSURE:
        note = "more rounds, or a quieter machine, would tell"
        most = max(high - 1, 1 - low) * before
        if (
            by_default
            and metric in (*STAGES, "other")
            and most < SMALL * typical(table(base, "e2el")[0], name)
        ):
            verdict = SAME
            note = f"a change of {most:.2f} ms at most, under {SMALL:.0%} of e2el"
    return Verdict(base.name, f"{metric}.{name}", before, after, value, low, high, verdict, note)


def verdict_of(low: float, high: float, tolerance: float) -> str:
    """The verdict on an interval of new over base. At 10 %: 0.84 .. 0.97 is no improvement, and not the same either."""
    if low > 1 + tolerance:
        return REGRESSED
    if high < 1 / (1 + tolerance):
        return IMPROVED
    return SAME if low >= 1 / (1 + tolerance) and high <= 1 + tolerance else UNSURE


def typical(values: np.ndarray, name: str) -> float:
    """One number of [rounds, items] for people, whose ratio is that of the comparison."""
    return float(np.exp(np.log(statistic(values, name, 0)).mean()))


def common(
    base: Setting, new: Setting, metric: str, in_stages: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both tables, of the questions that have values in both; None if there are none."""
    (before, first), (after, second) = table(base, metric, in_stages), table(new, metric, in_stages)
    both = [item for item in first if item in second]
    if not both:
        return None
    return before[:, [first.index(i) for i in both]], after[:, [second.index(i) for i in both]]


def table(setting: Setting, metric: str, in_stages: bool = False) -> tuple[np.ndarray, list[int]]:
    """Milliseconds [rounds, items], the mean where a question was asked several times in a round; and the items.

    ``in_stages`` as for measure.values_of.
    Questions without a value (the tpot of an answer of one token), and rounds that lack one, are left out.
    """
    cells: dict[tuple[int, int], list[float]] = {}
    for request in setting.requests:
        cells.setdefault((request.round, request.item), []).extend(values_of(request, metric, in_stages))
    means = {key: fmean(values) for key, values in cells.items() if values}
    items = sorted({item for _, item in means})
    rounds = sorted({number for number, _ in means})
    whole = [number for number in rounds if all((number, item) in means for item in items)]
    values = np.array([[means[number, item] for item in items] for number in whole])
    return values.reshape(len(whole), len(items)), items


def _other_lengths(base: Setting, new: Setting) -> int:
    """Questions whose answer has another number of tokens."""
    before, after = ({r.item: r.output_tokens for r in s.requests} for s in (base, new))
    return sum(after.get(item, length) != length for item, length in before.items())


def _accuracy(base: Setting, new: Setting, result: Result) -> Verdict:
    """Every question that was answered right, and is not any more, is a regression."""
    right: list[dict[int, float]] = []
    for setting in (base, new):
        answers: dict[int, list[bool]] = {}
        for r in setting.requests:
            if (is_right := result.items[r.item].judge(r.answer)) is not None:
                answers.setdefault(r.item, []).append(is_right)
        right.append({item: sum(found) / len(found) for item, found in answers.items()})
    if not right[0] or set(right[0]) != set(right[1]):
        before, after = ({r.item: r.answer for r in s.requests} for s in (base, new))
        changed = sum(before[item] != after.get(item) for item in before)
        return _unsure(base, "accuracy", f"no expected answers; {changed} of {len(before)} answers changed")
    lost = [item for item in right[0] if right[1][item] < right[0][item]]
    won = [item for item in right[0] if right[1][item] > right[0][item]]
    shares = [sum(found.values()) / len(found) for found in right]
    verdict = REGRESSED if lost else IMPROVED if won else SAME
    note = f"lost: {', '.join(result.items[item].image for item in lost)}" if lost else ""
    return Verdict(base.name, "accuracy", shares[0], shares[1], None, None, None, verdict, note)


def _unsure(setting: Setting, metric: str, why: str) -> Verdict:
    return Verdict(setting.name, metric, None, None, None, None, None, UNSURE, why)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Plain JSON types."""
    return {**asdict(comparison), "exit_code": comparison.exit_code}


HEAD = ("setting", "metric", "base", "new", "change", "interval", "verdict")


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """For people, one line a verdict."""
    found: list[tuple[str, ...]] = []
    for v in comparison.verdicts:
        unit = "{:.1%}" if v.metric in SHARES else "{:.2f} ms"
        before, after = ("" if x is None else unit.format(x) for x in (v.base, v.new))
        change = "" if v.ratio is None else f"{v.ratio - 1:+.1%}"
        interval = "" if v.low is None or v.high is None else f"{v.low - 1:+.1%} .. {v.high - 1:+.1%}"
        verdict = f"{v.verdict} ({v.note})" if v.note else v.verdict
        found.append((v.setting, v.metric, before, after, change, interval, verdict))
    return found


def text(comparison: Comparison) -> list[str]:
    """A table in plain text."""
    return [*aligned([HEAD, *rows(comparison)]), *comparison.notes, outcome(comparison)]


def outcome(comparison: Comparison) -> str:
    """One line that says it all."""
    counts = {word: len(comparison.of(word)) for word in (REGRESSED, UNSURE, IMPROVED, SAME)}
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{told or 'nothing to compare'} (tolerance {comparison.tolerance:.0%})"


def markdown(comparison: Comparison, title: str, about: str) -> str:
    """A summary for the page of a CI run, in GitHub's Markdown; ``about``: its last line."""
    signs = {IMPROVED: "🟢", SAME: "⚪", REGRESSED: "🔴", UNSURE: "🟡"}
    lines = [f"### {title}: {outcome(comparison)}", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |"]
    for verdict, row in zip(comparison.verdicts, rows(comparison), strict=True):
        cells = [*row[:-1], f"{signs[verdict.verdict]} {row[-1]}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", *(f"> {note}" for note in comparison.notes), about]
    return "\n".join(lines) + "\n"


def append(markdown_text: str, path: str | Path) -> None:
    """Add to a file, as $GITHUB_STEP_SUMMARY wants it."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(markdown_text)


def dumps(comparison: Comparison) -> str:
    """One line of JSON."""
    return json.dumps(as_json(comparison), allow_nan=False)
