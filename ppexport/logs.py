"""What ppexport says while it works, for people or for a log collector."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

import click

LEVELS = ("error", "warning", "info", "debug")
FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {
            "time": when,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
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
    return (
        json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, float) else f"{value:.2f}"
    )


def options() -> list[click.Option]:
    """--log-level and --log-format, wherever on the command line they stand."""

    def configured(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            given = ctx.find_root().meta.setdefault("ppexport.logs", {})
            given[parameter.name] = value
            configure(given.get("log_level", "info"), given.get("log_format", "text"))

    common: dict[str, Any] = {"expose_value": False, "callback": configured}
    return [
        click.Option(
            ["--log-level"], type=click.Choice(LEVELS), help="Log to stderr from this level on.", **common
        ),
        click.Option(
            ["--log-format"],
            type=click.Choice(FORMATS),
            help="json: an object per line.  [default: text]",
            **common,
        ),
    ]


class EndsLine(logging.Filter):
    """Ends the line of an answer that is being written to stdout before a log line follows in the same terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.open = False

    def write(self, piece: str) -> None:
        """A piece of an answer."""
        click.echo(piece, nl=False)
        self.open = not piece.endswith("\n") if piece else self.open

    def end(self) -> None:
        """End the line, if one is open."""
        if self.open:
            click.echo()
        self.open = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record is logged."""
        self.end()
        return True

    def __enter__(self) -> EndsLine:
        self._handlers = list(logging.getLogger("ppexport").handlers)
        for handler in self._handlers:
            handler.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers:
            handler.removeFilter(self)


def configure(level: str, form: str) -> None:
    """Log ppexport's events to stderr. ``level`` of LEVELS, ``form`` of FORMATS."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger("ppexport")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
