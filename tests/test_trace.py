"""Traces of requests, and logs."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from terminal import runner

from ppexport.cli import main

POCKET = Path(__file__).resolve().parent.parent / "models" / "pocket"


@pytest.fixture
def bundle(pocket_bundle: Path) -> Path:
    return pocket_bundle


def test_a_trace_has_every_stage_and_token(bundle: Path, tmp_path: Path) -> None:
    path, screen = tmp_path / "trace.json", POCKET.parent.parent / "docs" / "settings.png"
    questions = ["What is the Region?", "What is the Brightness?"]
    done = runner().invoke(
        main, ["run", str(bundle), *questions, "-i", str(screen), "--trace", str(path), "--json"]
    )
    assert done.exit_code == 0, done.output
    trace = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    stats = [json.loads(line) for line in done.stdout.splitlines()]
    requests = [event for event in events if event["tid"] == 1]
    assert [event["name"] for event in requests] == questions
    for request, found in zip(requests, stats, strict=True):
        inside = [
            e for e in events if e["tid"] == 2 and request["ts"] <= e["ts"] <= request["ts"] + request["dur"]
        ]
        total: dict[str, float] = {}
        for event in inside:
            assert event["ts"] + event["dur"] <= request["ts"] + request["dur"] + 0.01
            total[event["name"]] = total.get(event["name"], 0) + event["dur"] / 1e3
        assert total == pytest.approx(found["milliseconds"], abs=0.01)
        assert sum(e["name"] == "decode" for e in inside) == found["generated_tokens"] - 1
    done = runner().invoke(main, ["run", str(bundle), "Hi", "--trace", "missing/trace.json"])
    assert "missing/trace.json: cannot be written" in done.stderr


@pytest.mark.parametrize("form", ["json", "text"])
def test_logs(form: str, bundle: Path) -> None:
    screen = POCKET.parent.parent / "docs" / "settings.png"
    try:
        done = runner().invoke(
            main, ["--log-format", form, "run", str(bundle), "What is the Region?", "-i", str(screen), "-q"]
        )
    finally:
        logging.getLogger("ppexport").handlers.clear()
        logging.getLogger("ppexport").setLevel(logging.NOTSET)
        logging.getLogger("ppexport").propagate = True
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    if form == "json":
        loaded, request = map(json.loads, lines)
        assert (loaded["event"], loaded["level"]) == ("loaded", "info")
        assert request["event"] == "request"
        assert request["finish"] == "stop"
        assert set(request["stages_ms"]) >= {"prune", "vision", "prefill", "decode"}
    else:
        assert "loaded" in lines[0]
        assert re.search(r"request .*kept=\d+ total=\d+", lines[1])
