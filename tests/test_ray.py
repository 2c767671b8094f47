"""Copies of a bundle on a Ray cluster of this machine: answers as without it, also when a copy dies."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import Server, asked, serving
from terminal import runner

import ppexport
from ppexport.cli import main

pytest.importorskip("ray", reason="ray is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
psutil = pytest.importorskip("psutil", reason="psutil is not installed")
SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"
TWO = ("--ray", "local", "--replicas", "2", "--cpus", "1")
SECONDS = 120.0


@pytest.fixture(scope="module", autouse=True)
def cluster_of_a_busy_machine() -> Iterator[None]:
    """Needs two cores. Ray counts cached files as memory in use, and would end copies beside other tests."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two copies take two cores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield


def copies(process: subprocess.Popen[str], name: str) -> list[Any]:
    """Processes of a command's cluster that run a copy, the oldest first."""
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        try:
            command = each.cmdline()
        except psutil.Error:
            continue
        if command and command[0].startswith(f"ray::{name}"):
            found.append(each)
    return sorted(found, key=lambda each: each.create_time())


def until(true: Any) -> Any:
    """What comes of a question at last that is nothing at first."""
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_every_line_is_answered_once_though_a_copy_dies(pocket_bundle: Path, tmp_path: Path) -> None:
    bodies = [
        {"custom_id": str(i), "body": {"messages": asked("Transcribe all text.", SCREEN), "seed": i}}
        for i in range(300)
    ]
    bodies[7]["body"]["n"] = 2
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in bodies))
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "ppexport", "batch", str(pocket_bundle), str(source), "-o", str(output)]
    with subprocess.Popen(
        [*command, "-q", "--slots", "2", *TWO], stdout=subprocess.PIPE, text=True
    ) as process:
        until(lambda: output.exists() and output.stat().st_size)
        victim = until(lambda: copies(process, "MapWorker"))[0]
        assert len(output.read_text().splitlines()) < 200
        victim.kill()
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
    assert said.endswith(f"299 answered in {output}\n")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [each["line"] for each in found] == [*range(1, 8), *range(9, 301)]
    assert [each["custom_id"] for each in found] == [str(i) for i in range(300) if i != 7]
    (failed,) = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert (failed["line"], failed["custom_id"], failed["error"]["param"]) == (8, "7", "n")
    with ppexport.load(pocket_bundle) as pipe:
        expected = pipe.generate("Transcribe all text.", SCREEN, max_new_tokens=1024).text()
    assert {each["response"]["choices"][0]["message"]["content"] for each in found} == {expected}


@pytest.fixture(scope="module")
def server(pocket_bundle: Path) -> Iterator[Server]:
    with serving(pocket_bundle, *TWO, "--api-key", "a secret key") as running:
        yield running


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="a secret key", max_retries=0)


def test_answers_are_those_of_one_machine(server: Server, pocket_bundle: Path) -> None:
    client = client_of(server)
    answer = client.chat.completions.create(
        model=pocket_bundle.name, messages=asked("What is the Region?", SCREEN)
    )
    assert answer.choices[0].message.content == "Porto"
    assert answer.usage.prompt_tokens_details.pruned_tokens > 0
    with ppexport.load(pocket_bundle) as pipe:
        expected = pipe.generate("Transcribe all text.", SCREEN).text()
    parts = client.chat.completions.create(
        model=pocket_bundle.name,
        messages=asked("Transcribe all text.", SCREEN),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == expected
    assert len([text for text in texts if text]) > 3
    assert chunks[-1].usage.completion_tokens > 3
    with pytest.raises(openai.BadRequestError, match="n is 2"):
        client.chat.completions.create(model=pocket_bundle.name, messages=asked("Hi"), n=2)
    assert server.ask({"messages": asked("Hi")})[0] == 401
    assert server.ask(None, "/health")[:2] == (200, {"status": "ready"})
    assert server.ask(None, "/metrics")[0] == 404
    assert server.ask(None, "/")[0] == 200


def test_a_copy_that_dies_is_replaced(server: Server, pocket_bundle: Path) -> None:
    """Requests that were inside it fail; all others are answered, by the other one."""
    replicas = lambda: copies(server.process, "ServeReplica")  # noqa: E731
    victim = until(lambda: len(replicas()) == 2 and replicas())[0]
    found: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        client = client_of(server)
        while not stop.is_set():
            try:
                answer = client.chat.completions.create(
                    model=pocket_bundle.name, messages=asked("What is the Region?", SCREEN)
                )
                found.append(answer.choices[0].message.content)
            except openai.APIError:
                found.append("failed")
                time.sleep(0.1)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    until(lambda: found.count("Porto") >= 20)
    victim.kill()
    at = len(found)
    until(lambda: found[at:].count("Porto") >= 20)
    until(lambda: len([each for each in replicas() if each.pid != victim.pid]) == 2)
    until(lambda: found[at:].count("Porto") >= 60)
    stop.set()
    for asker in askers:
        asker.join()
    assert set(found) <= {"Porto", "failed"}
    assert found[:at].count("failed") == 0
    assert found.count("failed") <= 16


def test_copies_tell_their_metrics_to_ray(server: Server) -> None:
    """At the port that a node tells its metrics at."""
    sessions = Path("/tmp/ray")
    if not (targets := sorted(sessions.glob("session_*/prom_metrics_service_discovery.json"))):
        pytest.skip("Ray keeps its files elsewhere")

    def told() -> bool:
        text = ""
        for target in targets:
            for address in json.loads(target.read_text())[0]["targets"]:
                try:
                    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
                        text += page.read().decode()
                except OSError:
                    continue
        names = (
            "ray_ppexport_tokens_total",
            "ray_ppexport_first_token_seconds_bucket",
            "ray_ppexport_running",
        )
        return all(name in text for name in names)

    assert until(told)


def test_a_signal_lets_requests_end(pocket_bundle: Path) -> None:
    with serving(pocket_bundle, "--ray", "local", "--replicas", "1", "--cpus", "1") as server:
        body = {"messages": asked("Transcribe all text.", SCREEN), "stream": True}
        place = urlsplit(server.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        first = answer.readline()
        server.process.send_signal(signal.SIGTERM)
        rest = answer.read()
        assert first.startswith(b"data: {")
        assert rest.rstrip().endswith(b"data: [DONE]")
        assert server.process.wait(timeout=SECONDS) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--replicas", "2"), "--replicas and --cpus go with --ray"),
        (("--ray", "local", "--replicas", "4-2"), "--replicas is '4-2', expected a number such as 2, or 1-4"),
        (("--ray", "local", "--replicas", "many"), "expected a number such as 2"),
        (("--ray", "{bundle}"), "is a file or folder, expected ADDRESS or nothing behind --ray"),
        pytest.param(
            ("--ray", "local", "--cpus", "1000"),
            "1 copies of 1000 CPUs each do not fit",
            marks=pytest.mark.slow,
        ),
        (("--ray", "nowhere"), "no Ray cluster answers at 'nowhere'"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster answers at '127.0.0.1:1'"),
    ],
)
def test_options_that_do_not_go(options: tuple[str, ...], said: str, pocket_bundle: Path) -> None:
    given = [option.format(bundle=pocket_bundle) for option in options]
    done = runner().invoke(main, ["serve", str(pocket_bundle), "--port", "0", *given])
    assert done.exit_code in (1, 2), done.output
    assert said in done.stderr
    assert "Traceback" not in done.output
