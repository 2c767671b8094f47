"""``ppexport bench serve``: requests to a server of OpenAI's API, at a rate or so many at once, and how long they took.

Names of metrics are those of NVIDIA's AIPerf where it has them.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np

from ..models.errors import RequestError
from ..runtime.image import images_in

TOOL = "ppexport bench serve"  # as results name it
SECONDS = 600.0  # without anything from the server
MOST_THREADS = 512  # requests on their way, where a rate is asked for
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """What is sent. ``rate``: requests per second, arriving at random; None: ``concurrency`` at once, all the time."""

    url: str  # of the server, such as http://127.0.0.1:8000
    images: tuple[str, ...] = ()  # files or folders; requests take them in turns
    question: str = "Describe this image in detail."
    requests: int = 64
    concurrency: int = 8
    rate: float | None = None
    max_tokens: int = 64
    prune: Any = "default"
    key: str | None = None
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)  # further fields of every body


@dataclass
class Timed:
    """One request, in seconds since the first one was sent."""

    sent: float
    tokens: list[float] = field(default_factory=list)  # when each part of the answer came
    ended: float = 0.0
    status: int = 0
    error: str = ""
    output_tokens: int = 0
    prompt_tokens: int = 0
    pruned_tokens: int = 0

    @property
    def ok(self) -> bool:
        """Was it answered to the end?"""
        return self.status == 200 and not self.error

    @property
    def ttft(self) -> float:
        """Seconds to the first token that is text; to the end where none is."""
        return (self.tokens[0] if self.tokens else self.ended) - self.sent

    @property
    def per_token(self) -> float:
        """Seconds from one token to the next, the mean; 0 with less than two."""
        if self.output_tokens < 2 or not self.tokens:
            return 0.0
        return (self.tokens[-1] - self.tokens[0]) / (self.output_tokens - 1)


def measure(load: Load, progress: Callable[[int], None] = lambda done: None) -> tuple[list[Timed], float]:
    """Send all requests and wait for their ends: each of them, and the seconds that all took.

    Raises RequestError for a URL that is none, and ImageError for images that cannot be read.
    """
    place = _place(load.url)
    bodies = [json.dumps(body).encode() for body in _bodies(load)]
    found: list[Timed] = []
    lock = threading.Lock()
    begin = time.perf_counter()

    def one(number: int, due: float) -> None:
        time.sleep(max(0.0, due - (time.perf_counter() - begin)))
        timed = _ask(place, bodies[number % len(bodies)], load.key, begin)
        with lock:
            found.append(timed)
            progress(len(found))

    workers = load.concurrency if load.rate is None else min(load.requests, MOST_THREADS)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(load.requests), _due(load)))
    return found, max(timed.ended for timed in found)


def _due(load: Load) -> Iterable[float]:
    """When each request is sent at the earliest."""
    if load.rate is None:
        return [0.0] * load.requests
    gaps = np.random.default_rng(load.seed).exponential(1 / load.rate, load.requests)
    return [float(each) for each in np.cumsum(gaps) - gaps[0]]


def _place(url: str) -> SplitResult:
    try:
        found = urlsplit(url if "://" in url else f"http://{url}")
        good = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:  # of the port
        good = False
    if not good:
        raise RequestError(f"the URL is {url!r:.80}, expected an address such as http://127.0.0.1:8000")
    return found


def _bodies(load: Load) -> list[dict[str, Any]]:
    """The different requests."""
    files: Sequence[Path | None] = images_in(load.images) if load.images else [None]
    found = []
    for file in files:
        content: list[dict[str, Any]] = [{"type": "text", "text": load.question}]
        if file is not None:
            data = base64.b64encode(file.read_bytes()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}})
        found.append(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": load.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **load.more,
                **({} if load.prune == "default" else {"prune": load.prune}),  # others do not know it
            }
        )
    return found


def _ask(place: SplitResult, body: bytes, key: str | None, begin: float) -> Timed:
    """Send one request and read its answer."""
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    assert place.hostname is not None
    connection = kind(place.hostname, place.port, timeout=SECONDS)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    timed = Timed(time.perf_counter() - begin)
    try:
        path = place.path.rstrip("/").removesuffix("/v1")
        connection.request("POST", f"{path}/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        timed.status = answer.status
        if answer.status != 200:
            timed.error = answer.read(500).decode(errors="replace")
        whole = False
        for line in answer:
            whole = whole or line.startswith(b"data: [DONE]")
            if line.startswith(b"data: {"):
                _take(timed, json.loads(line[6:]), time.perf_counter() - begin)
        if not whole and not timed.error:
            timed.error = "the stream ended before its end, expected data: [DONE]"
    except (OSError, http.client.HTTPException, ValueError, AttributeError, TypeError) as err:
        timed.error = str(err) or type(err).__name__
    finally:
        connection.close()
    timed.ended = time.perf_counter() - begin
    return timed


def _take(timed: Timed, chunk: dict[str, Any], now: float) -> None:
    """A part of an answer."""
    if error := chunk.get("error"):
        timed.error = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    if any((choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()):
        timed.tokens.append(now)
    if usage := chunk.get("usage"):
        timed.output_tokens = usage.get("completion_tokens") or 0
        timed.prompt_tokens = usage.get("prompt_tokens") or 0
        timed.pruned_tokens = (usage.get("prompt_tokens_details") or {}).get("pruned_tokens") or 0


def summary(
    found: Sequence[Timed], seconds: float, slo_ttft: float | None = None, slo_per_token: float | None = None
) -> dict[str, dict[str, Any]]:
    """Metric -> unit and values; the limits of a goodput in milliseconds, None for no limit."""
    good = [timed for timed in found if timed.ok]
    made: dict[str, dict[str, Any]] = {
        "request_count": _single("requests", len(good)),
        "error_request_count": _single("requests", len(found) - len(good)),
        "request_throughput": _single("requests/sec", len(good) / seconds),
        "output_token_throughput": _single(
            "tokens/sec", sum(timed.output_tokens for timed in good) / seconds
        ),
    }
    if not good:
        return made
    made |= {
        "time_to_first_token": _many("ms", [1e3 * timed.ttft for timed in good]),
        "inter_token_latency": _many(
            "ms", [1e3 * timed.per_token for timed in good if timed.output_tokens > 1]
        ),
        "request_latency": _many("ms", [1e3 * (timed.ended - timed.sent) for timed in good]),
        "output_sequence_length": _many("tokens", [timed.output_tokens for timed in good]),
        "input_sequence_length": _many("tokens", [timed.prompt_tokens for timed in good]),
    }
    if slo_ttft is not None or slo_per_token is not None:
        within = [
            timed
            for timed in good
            if (slo_ttft is None or 1e3 * timed.ttft <= slo_ttft)
            and (slo_per_token is None or 1e3 * timed.per_token <= slo_per_token)
        ]
        made["goodput"] = _single("requests/sec", len(within) / seconds)
    return made


def _single(unit: str, value: float) -> dict[str, Any]:
    return {"unit": unit, "avg": round(float(value), 4)}


def _many(unit: str, values: Sequence[float]) -> dict[str, Any]:
    array = np.array(values or [0.0], float)
    found = {"unit": unit, "avg": array.mean(), "min": array.min(), "max": array.max(), "std": array.std()}
    found |= {f"p{n}": np.percentile(array, n) for n in PERCENTILES}
    return {name: round(float(each), 3) if name != "unit" else each for name, each in found.items()}


def as_json(load: Load, found: Sequence[Timed], metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything, but the key (load_compare.LoadResult)."""
    from .machine import describe

    options = {name: value for name, value in asdict(load).items() if name != "key"}
    files = images_in(load.images) if load.images else []
    return {
        "tool": TOOL,
        "version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe().model_dump(),
        "options": options,
        "items": [
            {"image": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
        ],
        "metrics": metrics,
        "requests": [asdict(timed) for timed in found],
    }


def lines(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """For people."""
    made = []
    for name, values in metrics.items():
        if "p50" in values:
            numbers = "  ".join(f"{key} {values[key]:.1f}" for key in ("avg", "p50", "p90", "p99", "max"))
        else:
            numbers = f"{values['avg']:g}"
        made.append(f"{name.replace('_', ' '):<26}{numbers}  {values['unit']}")
    return made
