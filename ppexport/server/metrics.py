"""What a server did, for Prometheus. Names are listed in docs/serve.md."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..runtime.stats import Stats

FIRST_TOKEN = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 21, 34, 60, 120)  # seconds
NEXT_TOKEN = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 1, 2)
WHOLE = (*FIRST_TOKEN, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        counter, gauge, histogram = self.counter, self.gauge, self.histogram
        self.requests = counter("requests", "Requests that ended, by the status of their answer.", "status")
        self.cancelled = counter("cancelled", "Requests whose client went away before the end.")
        self.tokens = counter(
            "tokens", "Tokens: of prompts after pruning, reused ones of these, generated.", "kind"
        )
        self.image_tokens = counter(
            "image_tokens", "Image tokens that were kept, and that pruners dropped.", "what"
        )
        self.reuse_hits = counter("reuse_hits", "Requests that went on where an earlier one had been.")
        self.first_token = histogram(
            "first_token", "From the request's arrival to its first token.", FIRST_TOKEN
        )
        self.next_token = histogram(
            "next_token", "From one token to the next, the mean of a request.", NEXT_TOKEN
        )
        self.whole = histogram("request", "From the request's arrival to the end of its answer.", WHOLE)
        self.running = gauge("running", "Requests that have a slot or wait for the engine.")
        self.waiting = gauge("waiting", "Of these, requests in the queue.")
        self.reuse_bytes = gauge("reuse_bytes", "Memory that holds what past requests computed.")

    def counter(self, name: str, what: str, *labels: str) -> Any:
        """What counts; ``labels``: names of its labels."""
        return Counter(f"ppexport_{name}", what, labels, registry=self._registry)

    def gauge(self, name: str, what: str) -> Any:
        """What is set."""
        return Gauge(f"ppexport_{name}", what, registry=self._registry)

    def histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        """What is observed, in seconds."""
        return Histogram(f"ppexport_{name}_seconds", what, registry=self._registry, buckets=buckets)

    @cached_property
    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        return registry

    def answered(self, stats: Stats, arrived: float, first: float, last: float) -> None:
        """Count a request that got an answer; times in seconds of one clock."""
        self.tokens.labels("prompt").inc(stats.prompt_tokens)
        self.tokens.labels("reused").inc(stats.reused_tokens)
        self.tokens.labels("generated").inc(stats.generated_tokens)
        self.image_tokens.labels("kept").inc(stats.kept)
        self.image_tokens.labels("dropped").inc(stats.total - stats.kept)
        if stats.reused_tokens:
            self.reuse_hits.inc()
        self.first_token.observe(first - arrived)
        self.whole.observe(last - arrived)
        if stats.generated_tokens > 1:
            self.next_token.observe((last - first) / (stats.generated_tokens - 1))

    def text(self) -> tuple[bytes, str]:
        """As Prometheus reads it, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
