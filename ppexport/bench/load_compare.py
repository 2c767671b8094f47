"""What became of a server's times between two files of ``ppexport bench serve``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from ..models.errors import RequestError
from . import compare
from .compare import Comparison, Verdict
from .load import TOOL, Timed
from .machine import differences
from .schema import Machine, Model
from .statistics import ratio

METRICS = ("time_to_first_token", "inter_token_latency", "request_latency")
# at a fixed number of requests at once, their mean latency is what the throughput is made of
DEFAULT = (
    "time_to_first_token.p50",
    "time_to_first_token.p90",
    "inter_token_latency.p50",
    "request_latency.mean",
)
ALIKE = ("question", "requests", "concurrency", "rate", "max_tokens")
FEWEST = 12  # requests; with fewer an interval would say nothing


class Item(Model):
    """An image that was sent."""

    image: str
    sha256: str


class LoadResult(Model):
    """One file of ``ppexport bench serve``."""

    tool: Literal["ppexport bench serve"]
    version: Literal[1]
    created: str
    machine: Machine  # that sent the requests
    options: dict[str, Any]
    items: tuple[Item, ...]
    metrics: dict[str, dict[str, Any]]
    requests: tuple[Timed, ...]


def parsed(data: Any, path: str) -> LoadResult | None:
    """A load result; None for what is no file of this tool. Raises RequestError for one that is damaged."""
    if not isinstance(data, dict) or data.get("tool") != TOOL:
        return None
    try:
        return LoadResult.model_validate(data)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(
            f"{path}: {where}: {first['msg'].lower()}, expected a file of this version of '{TOOL}'; measure again"
        ) from err


def compare_loads(
    base: LoadResult,
    new: LoadResult,
    tolerance: float = 0.05,
    metrics: Sequence[str] | None = None,
    any_machine: bool = False,
) -> Comparison:
    """Judge ``new`` by ``base``, as compare.compare judges bundles; more requests that failed are a regression.

    Raises RequestError for results of other questions, images or loads, and for an unknown metric.
    """
    _check_alike(base, new)
    names = compare.parse(metrics, METRICS, DEFAULT)
    apart = [] if any_machine else differences(base.machine, new.machine)
    notes = [
        f"different machines ({each}): nothing can be told; --any-machine compares them" for each in apart
    ]
    if base.options.get("prune") != new.options.get("prune"):
        notes.append(f"prune was {base.options.get('prune')} and is {new.options.get('prune')}")
    confidence = 1 - compare.WRONG / len(names)
    setting = _setting(base)
    found = [_errors(setting, base, new)]
    for metric, name in names:
        told = f"{metric}.{name}"
        before, after = (_values(result, metric) for result in (base, new))
        if apart:
            found.append(_unsure(setting, told, "different machines"))
        elif min(len(before), len(after)) < FEWEST:
            found.append(_unsure(setting, told, f"too few requests, expected at least {FEWEST} in both"))
        else:
            value, low, high = ratio(before, after, name, confidence, np.random.default_rng(0))
            verdict = compare.verdict_of(low, high, tolerance)
            note = "more requests, or a quieter machine, would tell" if verdict == compare.UNSURE else ""
            then, now = (compare.typical(values, name) for values in (before, after))
            found.append(Verdict(setting, told, then, now, value, low, high, verdict, note))
    return Comparison(tolerance, tuple(found), tuple(notes))


def _check_alike(base: LoadResult, new: LoadResult) -> None:
    if [item.sha256 for item in base.items] != [item.sha256 for item in new.items]:
        raise RequestError("the results are of different images, expected the same ones; measure again")
    for name in ALIKE:
        first, second = base.options.get(name), new.options.get(name)
        if first != second:
            raise RequestError(f"{name} was {first!r} and is {second!r}, expected the same; measure again")


def _setting(result: LoadResult) -> str:
    rate = result.options.get("rate")
    return f"{rate:g} a second" if rate else f"{result.options.get('concurrency')} at once"


def _values(result: LoadResult, metric: str) -> np.ndarray:
    """Milliseconds [requests, 1], as they were sent one after the other; those that were answered."""
    sent = sorted(result.requests, key=lambda each: each.sent)
    seconds = {
        "time_to_first_token": lambda each: each.ttft,
        "inter_token_latency": lambda each: each.per_token,
        "request_latency": lambda each: each.ended - each.sent,
    }[metric]
    found = [seconds(each) for each in sent if each.ok]
    return 1e3 * np.array([value for value in found if value > 0], float).reshape(-1, 1)


def _errors(setting: str, base: LoadResult, new: LoadResult) -> Verdict:
    """Shares of requests that were answered."""
    shares = []
    for result in (base, new):
        good = sum(each.ok for each in result.requests)
        shares.append(good / max(1, len(result.requests)))
    before, after = shares
    verdict = compare.REGRESSED if after < before else compare.IMPROVED if after > before else compare.SAME
    return Verdict(setting, "answered", before, after, None, None, None, verdict)


def _unsure(setting: str, metric: str, why: str) -> Verdict:
    return Verdict(setting, metric, None, None, None, None, None, compare.UNSURE, why)
