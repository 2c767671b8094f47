"""The metrics of a copy, told by Ray with those of its node."""

from __future__ import annotations

from typing import Any

from ..server.errors import invalid
from ..server.metrics import Metrics


class RayMetrics(Metrics):
    """The same names as one server's, with "ray_" before them, at the metrics port of every node."""

    def counter(self, name: str, what: str, *labels: str) -> Any:
        """What counts; ``labels``: names of its labels."""
        from ray.util.metrics import Counter

        return _Counter(Counter(f"ppexport_{name}_total", what, labels), labels)

    def gauge(self, name: str, what: str) -> Any:
        """What is set."""
        from ray.util.metrics import Gauge

        return Gauge(f"ppexport_{name}", what)

    def histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        """What is observed, in seconds."""
        from ray.util.metrics import Histogram

        return Histogram(f"ppexport_{name}_seconds", what, list(buckets))

    def text(self) -> tuple[bytes, str]:
        """Raises ApiError: whichever copy is asked would tell of itself alone."""
        raise invalid("/metrics: copies on Ray tell theirs at the metrics port of their node", status=404)


class _Counter:
    """A counter of Ray, used like one of prometheus_client."""

    def __init__(self, counter: Any, names: tuple[str, ...], values: tuple[str, ...] = ()):
        self._counter = counter
        self._names = names
        self._values = values

    def labels(self, *values: str) -> _Counter:
        """The one with these values of its labels."""
        return _Counter(self._counter, self._names, values)

    def inc(self, by: float = 1) -> None:
        """Count."""
        if by:  # Ray's takes no 0
            self._counter.inc(by, dict(zip(self._names, self._values, strict=True)))
