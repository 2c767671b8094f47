"""What ppexport says while it works, for people or for a log collector."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

LEVELS = ("error", "warning", "info", "debug")
FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, event, then the fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields = " ".join(f"{key}={_short(value)}" for key, value in getattr(record, "fields", {}).items())
        return f"{when} {record.levelname.lower():<7} {record.getMessage()} {fields}".rstrip()


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, float) else f"{value:.2f}"


def configure(level: str, form: str) -> None:
    """Log ppexport's events to stderr. ``level`` of LEVELS, ``form`` of FORMATS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger("ppexport")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
