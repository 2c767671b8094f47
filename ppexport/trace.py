"""The stages of a request as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source: "Trace Event Format" of the Chromium project; complete events ("X"), microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .models.files import write_text
from .runtime.stats import Stats


def events(requests: Sequence[tuple[str, Stats]]) -> list[dict[str, Any]]:
    """One request after the other: its name, over it its stages; every decoded token has an event of its own."""
    pid = os.getpid()
    origin = min((span.begin for _, stats in requests for span in stats.spans), default=0.0)
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "ppexport"}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": "requests"}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": 2, "args": {"name": "stages"}},
    ]

    def event(name: str, tid: int, begin: float, end: float, **args: Any) -> dict[str, Any]:
        times = {"ts": round((begin - origin) * 1e6, 3), "dur": round((end - begin) * 1e6, 3)}
        return {"ph": "X", "cat": "ppexport", "name": name, "pid": pid, "tid": tid, **times, "args": args}

    for name, stats in requests:
        if not stats.spans:
            continue
        begin = stats.spans[0].begin
        end = stats.spans[-1].end
        args = {"kept": stats.kept, "total": stats.total, "prompt_tokens": stats.prompt_tokens}
        found.append(
            event(name, 1, begin, end, **args, generated_tokens=stats.generated_tokens, finish=stats.finish)
        )
        token = 0
        for span in stats.spans:
            token += span.stage == "decode"
            found.append(
                event(
                    span.stage,
                    2,
                    span.begin,
                    span.end,
                    **({"token": token} if span.stage == "decode" else {}),
                )
            )
    return found


def write(requests: Sequence[tuple[str, Stats]], path: str | Path) -> None:
    """Write a trace file. Raises SpaceError."""
    text = json.dumps({"traceEvents": events(requests), "displayTimeUnit": "ms"}, ensure_ascii=False)
    write_text(path, text + "\n")
