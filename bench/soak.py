"""Thousands of mixed requests to a server of the pocket model: no wrong answer, no growth, nothing stuck.

    python bench/soak.py BUNDLE --requests 30000 -o bench/results/soak.json

Pictures, samples with a seed, answers by a schema, streams that are left in the middle, requests that are refused; at
the end the server is killed (kill -9), and started again. Each answer is held against what ``generate`` gives.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe
from serving import Server, asked, serving

import ppexport

ROOT = Path(__file__).resolve().parent.parent
SCREEN = ROOT / "docs" / "settings.png"
PAGE = ROOT / "ppexport" / "bench" / "images" / "gui_mousepad.png"
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "on", "schema": SCHEMA}}
REUSE = 64  # MiB
LEAVES = 0.1  # share of requests whose client goes away
BAD = 0.1
KINDS: list[dict[str, Any]] = [
    {"messages": asked("What is the Region?", SCREEN)},
    {"messages": asked("What is the Brightness?", SCREEN), "prune": "off"},
    {"messages": asked("Transcribe all text.", SCREEN), "max_tokens": 40},
    {"messages": asked("What is this?", PAGE), "max_tokens": 12},
    {"messages": asked("Hello"), "max_tokens": 8},
    {"messages": asked("What is the Region?", SCREEN), "temperature": 1.2, "seed": 5, "max_tokens": 12},
    {"messages": asked("What is the Region?", SCREEN), "response_format": FORM},
    {"messages": asked("What is the Region?", SCREEN), "prune": {"prunesid": 30}},
    {"messages": asked("Which?", SCREEN, np.full((200, 300, 3), 90, np.uint8)), "max_tokens": 6},
]
NO_IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
BODIES_THAT_ARE_NONE: list[bytes] = [
    b"{",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 4}',
    json.dumps({"messages": [{"role": "user", "content": NO_IMAGE}]}).encode(),
    json.dumps({"messages": asked("a"), "response_format": NO_SCHEMA}).encode(),
]


def expected(pipe: ppexport.Pipeline, kind: dict[str, Any]) -> str:
    """What the request gives without a server."""
    from ppexport.server.images import ImageRules, messages_of
    from ppexport.server.protocol import parse, prune_of

    chat = parse(kind)
    return pipe.generate(
        messages_of(chat.messages, ImageRules()),
        prune=prune_of(chat.prune, pipe.prune),
        max_new_tokens=chat.max_tokens or 1024,
        temperature=chat.temperature,
        seed=chat.seed,
        schema=chat.schema_,
    ).text()


class Client:
    """Sends one request after the other, and counts what comes of them."""

    def __init__(self, server: Server, answers: list[str]):
        self.server = server
        self.answers = answers
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def one(self, number: int) -> None:
        """A request of some kind."""
        draw = random.Random(number)
        place = urlsplit(self.server.url)
        assert place.hostname is not None
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
        try:
            if draw.random() < BAD:
                self._refused(connection, draw.choice(BODIES_THAT_ARE_NONE))
            else:
                self._answered(connection, draw)
        except Exception as err:
            self._count("failed", f"{number}: {err!r}")
        finally:
            connection.close()

    def _refused(self, connection: http.client.HTTPConnection, body: bytes) -> None:
        connection.request("POST", "/v1/chat/completions", body)
        answer = connection.getresponse()
        answer.read()
        self._count("refused", "" if answer.status == 400 else f"status {answer.status} for {body[:80]!r}")

    def _answered(self, connection: http.client.HTTPConnection, draw: random.Random) -> None:
        which = draw.randrange(len(KINDS))
        leaves = draw.random() < LEAVES
        streams = leaves or draw.random() < 0.5
        body = json.dumps({**KINDS[which], "stream": streams}).encode()
        connection.request("POST", "/v1/chat/completions", body)
        if leaves and draw.random() < 0.5:
            self._count("left before an answer")
            return
        answer = connection.getresponse()
        if answer.status == 429:
            answer.read()
            self._count("told to come later")
            return
        if leaves:
            answer.read(draw.randrange(1, 400))
            self._count("left in the middle")
            return
        found = (
            _streamed(answer) if streams else json.loads(answer.read())["choices"][0]["message"]["content"]
        )
        right = found == self.answers[which]
        self._count("answered", "" if right else f"kind {which}: {found!r}, expected {self.answers[which]!r}")

    def _count(self, what: str, wrong: str = "") -> None:
        with self.lock:
            self.seen[what] += 1
            if wrong:
                self.wrong.append(wrong)


def _streamed(answer: http.client.HTTPResponse) -> str:
    chunks = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def settle(server: Server) -> float:
    """Seconds until no request is inside any more."""
    begin = time.monotonic()
    while server.metric("ppexport_running") and time.monotonic() - begin < 60:
        time.sleep(0.02)
    return time.monotonic() - begin


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", default=10_000, show_default=True)
@click.option("--at-once", default=12, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(bundle: Path, requests: int, at_once: int, output: Path) -> None:
    """Soak, and write a JSON file; exit code 1 if anything was wrong."""
    with ppexport.load(bundle) as pipe:
        answers = [expected(pipe, kind) for kind in KINDS]
    memory: list[tuple[int, int]] = []
    with serving(bundle, "--queue", str(4 * at_once), "--reuse", str(REUSE)) as server:
        client = Client(server, answers)
        begin = time.perf_counter()
        every = max(1, requests // 20)
        with ThreadPoolExecutor(at_once) as pool:
            for first in range(0, requests, every):
                list(pool.map(client.one, range(first, min(first + every, requests))))
                settle(server)
                resident = int(server.metric("process_resident_memory_bytes"))
                memory.append((min(first + every, requests), resident))
                click.echo(f"{memory[-1][0]:>7} requests, {resident / 1e6:.0f} MB, {dict(client.seen)}")
        seconds = time.perf_counter() - begin
        left = server.metric("ppexport_running")
        answered = int(server.metric('ppexport_requests_total{status="500"}'))
        code = server.end(signal.SIGKILL)
    with serving(bundle) as server:
        again = Client(server, answers)
        for number in range(200):
            again.one(requests + number)
    after = [bytes_ for count, bytes_ in memory if count >= requests / 10]
    result = {
        "machine": describe(),
        "requests": requests,
        "at_once": at_once,
        "seconds": round(seconds, 1),
        "requests_per_second": round(requests / seconds, 1),
        "seen": dict(client.seen),
        "wrong": client.wrong + again.wrong,
        "status_500": answered,
        "left_inside": left,
        "killed_with": code,
        "after_the_restart": dict(again.seen),
        "memory": memory,
        "growth_after_the_first_tenth": round(after[-1] / after[0] - 1, 4),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(
        json.dumps(
            {key: value for key, value in result.items() if key not in ("machine", "memory")}, indent=1
        )
    )
    sys.exit(1 if result["wrong"] or left or answered else 0)


if __name__ == "__main__":
    main()
