"""``ppexport bench compare`` of two files of ``bench serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminal import runner

import ppexport
from ppexport.bench import compare as judge
from ppexport.bench.load_compare import compare_loads, parsed
from ppexport.bench.machine import describe
from ppexport.cli import main


def result(
    scale: float = 1.0, seed: int = 0, count: int = 60, failed: int = 0, **options: Any
) -> dict[str, Any]:
    """Requests whose times scatter by a few percent."""
    draw = np.random.default_rng(seed)
    requests = []
    for i in range(count):
        first = scale * 0.2 * draw.lognormal(0, 0.03)
        each = scale * 0.01 * draw.lognormal(0, 0.03)
        tokens = [i + first + each * n for n in range(10)]
        status = 429 if i < failed else 200
        requests.append(
            {
                "sent": float(i),
                "tokens": tokens,
                "ended": tokens[-1],
                "status": status,
                "error": "busy" if status == 429 else "",
                "output_tokens": 10,
                "prompt_tokens": 50,
                "pruned_tokens": 90,
            }
        )
    asked = {"question": "What?", "requests": count, "concurrency": 8, "rate": None, "max_tokens": 10}
    return {
        "tool": "ppexport bench serve",
        "version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "machine": describe().model_dump(),
        "options": {"url": "http://a", "prune": "default", **asked, **options},
        "items": [{"image": "a.png", "sha256": "0" * 64}],
        "metrics": {},
        "requests": requests,
    }


def verdicts(base: dict[str, Any], new: dict[str, Any], **how: Any) -> dict[str, str]:
    before, after = parsed(base, "base"), parsed(new, "new")
    assert before is not None
    assert after is not None
    return {each.metric: each.verdict for each in compare_loads(before, after, **how).verdicts}


def test_the_same_twice() -> None:
    found = verdicts(result(), result(seed=1))
    assert set(found.values()) == {judge.SAME}
    assert list(found) == [
        "answered",
        "time_to_first_token.p50",
        "time_to_first_token.p90",
        "inter_token_latency.p50",
        "request_latency.mean",
    ]


def test_slower_faster_and_failing() -> None:
    assert verdicts(result(), result(1.3, 1))["time_to_first_token.p50"] == judge.REGRESSED
    assert verdicts(result(), result(0.7, 1))["request_latency.mean"] == judge.IMPROVED
    failing = verdicts(result(), result(seed=1, failed=3))
    assert failing["answered"] == judge.REGRESSED
    assert failing["request_latency.mean"] == judge.SAME
    assert verdicts(result(count=5), result(count=5))["inter_token_latency.p50"] == judge.UNSURE


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ppexport.RequestError, match="concurrency was 8 and is 4, expected the same"):
        verdicts(result(), result(concurrency=4))
    other = result()
    other["items"][0]["sha256"] = "1" * 64
    with pytest.raises(ppexport.RequestError, match="different images"):
        verdicts(result(), other)
    with pytest.raises(ppexport.RequestError, match="metric is 'ttft', expected one of time_to_first_token"):
        verdicts(result(), result(), metrics=["ttft"])
    strange = result()
    strange["machine"]["cpu"] = "another"
    assert verdicts(result(), strange)["request_latency.mean"] == judge.UNSURE
    assert verdicts(result(), strange, any_machine=True)["request_latency.mean"] == judge.SAME
    del strange["requests"][0]["sent"]
    with pytest.raises(ppexport.RequestError, match="requests.0.sent: field required"):
        parsed(strange, "new")


def test_from_the_command_line(tmp_path: Path) -> None:
    def file(name: str, data: Any) -> str:
        (tmp_path / name).write_text(json.dumps(data))
        return str(tmp_path / name)

    base, slow = file("base.json", result()), file("slow.json", result(1.5, 1, prune="off"))
    summary = tmp_path / "summary.md"
    done = runner().invoke(main, ["bench", "compare", base, slow, "--markdown", str(summary)])
    assert done.exit_code == 1, done.output
    assert "time_to_first_token.p50" in done.stdout
    assert "prune was default and is off" in done.stdout
    assert summary.read_text().startswith("### Load of http://a: 4 regressed, 1 same")
    assert runner().invoke(main, ["bench", "compare", base, base]).exit_code == 0
    other = file("other.json", {"version": 1})
    done = runner().invoke(main, ["bench", "compare", base, other])
    assert (done.exit_code, "expected both or neither" in done.stderr) == (2, True)
    done = runner().invoke(main, ["bench", "compare", base, base, "--accuracy"])
    assert (done.exit_code, "--accuracy is for results of 'bench'" in done.stderr) == (2, True)
