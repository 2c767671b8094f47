"""``ppexport serve`` over a real socket, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fuzz_server import fuzz
from pydantic import BaseModel
from serving import Server, asked, serving
from starlette.requests import ClientDisconnect
from terminal import runner

import ppexport
from ppexport.bench.load import Load, measure
from ppexport.cli import main
from ppexport.server import app, connections
from ppexport.server.errors import ApiError
from ppexport.server.protocol import parse
from ppexport.server.serve import Address, Setup, listening
from ppexport.server.service import Limits

openai = pytest.importorskip("openai", reason="the openai client is not installed")
SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"
SOAK = Path(__file__).parent.parent / "bench" / "soak.py"
QUESTION = "What is the Region?"
TRANSCRIBE = "Transcribe all text."
# an answer that takes a while: tokens of the pocket model are single letters to short words
LONG = {"schema": {"type": "string", "minLength": 2500}}
LONG_FORM = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "long", **LONG}},
    "max_tokens": 1500,
}


@pytest.fixture(scope="module")
def server(pocket_bundle: Path) -> Iterator[Server]:
    with serving(pocket_bundle, "--name", "pocket") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def pipe(pocket_bundle: Path) -> ppexport.Pipeline:
    return ppexport.load(pocket_bundle)


def test_an_answer_is_that_of_generate(client: Any, pipe: ppexport.Pipeline) -> None:
    expected = pipe.generate(QUESTION, [SCREEN])
    text = expected.text()
    found = client.chat.completions.create(model="pocket", messages=asked(QUESTION, SCREEN))
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text, "assistant", "stop")
    assert found.usage.prompt_tokens == expected.stats.prompt_tokens
    assert found.usage.completion_tokens == expected.stats.generated_tokens
    assert found.usage.prompt_tokens_details.pruned_tokens == expected.stats.total - expected.stats.kept
    assert found.usage.prompt_tokens_details.pruned_by == {
        "pixelprune": expected.stats.total - expected.stats.kept
    }
    assert found.model == "pocket"
    assert found.ppexport["images"][0]["kept"] == expected.stats.kept


def test_a_stream_is_the_whole_answer(client: Any, pipe: ppexport.Pipeline) -> None:
    question = TRANSCRIBE
    chunks = list(
        client.chat.completions.create(
            model="pocket",
            messages=asked(question, SCREEN),
            stream=True,
            stream_options={"include_usage": True},
            max_tokens=12,
        )
    )
    expected = pipe.generate(question, [SCREEN], max_new_tokens=12)
    said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert len([piece for piece in said if piece]) > 5
    assert "".join(said) == expected.text()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_sixteen_at_once(client: Any, pipe: ppexport.Pipeline) -> None:
    """Each is what it would be alone, whatever it was asked with."""
    questions = [QUESTION, "What is the Brightness?", TRANSCRIBE, "Hello"] * 4

    def ask(i: int) -> str:
        images = [SCREEN] if i % 4 < 3 else []
        prune = ["default", "off", {"tau": 0.05}, {"prunesid": 30}][i // 4]
        found = client.chat.completions.create(
            model="pocket", messages=asked(questions[i], *images), max_tokens=24, extra_body={"prune": prune}
        )
        return str(found.choices[0].message.content)

    prunes = ["default", None, ppexport.PixelPrune(tau=0.05), [ppexport.PixelPrune(), ppexport.PruneSID(30)]]
    expected = [
        pipe.generate(questions[i], [SCREEN] if i % 4 < 3 else [], prunes[i // 4], max_new_tokens=24).text()
        for i in range(16)
    ]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == expected


def test_a_conversation_reuses_what_it_began_with(client: Any) -> None:
    messages = asked("What is the Language?", SCREEN)
    first = client.chat.completions.create(model="pocket", messages=messages)
    again = [
        *messages,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": QUESTION},
    ]
    second = client.chat.completions.create(model="pocket", messages=again)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached > second.usage.prompt_tokens_details.image_tokens > 0


def test_sampling_repeats_with_a_seed(client: Any, pipe: ppexport.Pipeline) -> None:
    arguments = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    found = client.chat.completions.create(
        model="pocket", messages=asked(QUESTION, SCREEN), max_tokens=12, **arguments
    )
    expected = pipe.generate(QUESTION, [SCREEN], max_new_tokens=12, **arguments).text()  # type: ignore[arg-type]
    assert found.choices[0].message.content == expected


def test_stop_strings(client: Any, pipe: ppexport.Pipeline) -> None:
    whole = pipe.generate(TRANSCRIBE, [SCREEN], max_new_tokens=60).text()
    end = whole[10:13]
    found = client.chat.completions.create(
        model="pocket",
        messages=asked(TRANSCRIBE, SCREEN),
        max_tokens=60,
        stop=["never ever", end],
    )
    assert found.choices[0].message.content == whole[: whole.index(end)]
    assert found.choices[0].finish_reason == "stop"


def test_log_probabilities(client: Any) -> None:
    found = client.chat.completions.create(
        model="pocket", messages=asked(QUESTION, SCREEN), logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    assert "".join(token.token for token in content).startswith(found.choices[0].message.content)
    for token in content:
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].logprob == token.logprob <= 0  # greedy


SCHEMA = {
    "type": "object",
    "properties": {"region": {"type": "string", "maxLength": 12}, "on": {"type": "boolean"}},
    "required": ["region", "on"],
    "additionalProperties": False,
}


def test_answers_by_a_schema(client: Any, pipe: ppexport.Pipeline) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "settings", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(
        model="pocket", messages=asked(QUESTION, SCREEN), response_format=form, max_tokens=120
    )
    answer = json.loads(found.choices[0].message.content)
    assert set(answer) == {"region", "on"}
    assert isinstance(answer["on"], bool)
    assert found.choices[0].finish_reason == "stop"
    assert pipe.generate(QUESTION, [SCREEN], schema=SCHEMA, max_new_tokens=120).text() == (
        found.choices[0].message.content
    )
    free = client.chat.completions.create(
        model="pocket",
        messages=asked(QUESTION, SCREEN),
        response_format={"type": "json_object"},
        max_tokens=30,
    )
    assert free.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"messages": []}, 400, "messages: "),
        ({"messages": None}, 400, "messages is missing"),
        ({"messages": "hi"}, 400, "messages: Input should be a valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, r"messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "a message of the user is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "expected its text"),
        ({"model": "gpt-4o"}, 404, "the model 'gpt-4o' is not served here, expected 'pocket'"),
        ({"n": 2}, 400, "n is 2, which is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools is "),
        ({"logit_bias": {"5": 3}}, 400, "logit_bias is "),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty is 0.5"),
        ({"audio": {"voice": "x"}}, 400, "audio is not supported"),
        ({"temprature": 0}, 400, "temprature is not supported"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"temperature": "hot"}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "expected one of them"),
        ({"top_logprobs": 3}, 400, "top_logprobs goes with logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options goes with stream"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"seed": -1}, 400, "seed: "),
        ({"prune": {"tau": 7}}, 400, "prune: tau is 7"),
        ({"prune": {"tao": 0}}, 400, "prune: .*unexpected keyword argument 'tao'"),
        ({"prune": {"prunesid": 0}}, 400, "prune: max_tokens is 0"),
        ({"prune": "sometimes"}, 400, "prune"),
        ({"response_format": {"type": "yaml"}}, 400, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, 400, "has a json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "porridge"}}}},
            400,
            "the schema cannot be followed",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_requests(server: Server, change: dict[str, Any], status: int, message: str) -> None:
    body = {"model": "pocket", "messages": asked(QUESTION), **change}
    found, answer, _ = server.ask(body)
    error = answer["error"]
    assert found == status, answer
    assert re.search(message, error["message"]), error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "is not an image that Pillow can read"),
        ("data:image/png;base64,%%%", "base64|cannot|not an image"),
        ("file:///etc/passwd", "expected an image as a data: URL"),
        ("/etc/passwd", "expected an image as a data: URL"),
        ("http://127.0.0.1:1/x.png", "images from '127.0.0.1' are not fetched"),
        ("https://example.org/x.png", "images from 'example.org' are not fetched"),
        ("", "expected an image as a data: URL"),
    ],
)
def test_images_that_are_refused(server: Server, url: str, message: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    found, answer, _ = server.ask({"messages": [{"role": "user", "content": [part]}]})
    assert found == 400
    assert re.search(message, answer["error"]["message"]), answer


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'])
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    found, answer, _ = server.ask(body)
    assert found == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_labels_and_what_is_asked_for_anyway_are_taken(server: Server) -> None:
    """As LangChain and others send them."""
    extra = {
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "tools": None,
        "store": False,
    }
    extra |= {"parallel_tool_calls": True, "logit_bias": None, "stream": False, "reasoning_effort": None}
    found, answer, _ = server.ask({"messages": asked(QUESTION), "max_tokens": 3, **extra})
    assert found == 200, answer


def test_what_else_is_there(server: Server, client: Any) -> None:
    assert server.ask(None, "/health")[:2] == (200, {"status": "ready"})
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("pocket", "model")
    assert client.models.retrieve("pocket").id == "pocket"
    assert server.ask(None, "/v1/models/other")[0] == 404
    assert server.ask(None, "/nowhere")[1]["error"]["message"] == "GET /nowhere: Not Found"
    assert server.ask(None, "/v1/chat/completions")[0] == 405


def test_a_client_that_goes_away_ends_its_request(server: Server, client: Any) -> None:
    stream = client.chat.completions.create(
        model="pocket",
        messages=asked(TRANSCRIBE, SCREEN),
        stream=True,
        max_tokens=400,
        temperature=2.0,
    )
    next(iter(stream))
    assert server.metric("ppexport_running") == 1
    stream.close()
    deadline = time.monotonic() + 20
    while server.metric("ppexport_running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("ppexport_cancelled_total") >= 1


def test_metrics_count(server: Server, client: Any) -> None:
    names = ['ppexport_requests_total{status="200"}', 'ppexport_image_tokens_total{what="kept"}']
    names += ['ppexport_tokens_total{kind="generated"}', "ppexport_first_token_seconds_count"]
    before = [server.metric(name) for name in names]
    found = client.chat.completions.create(model="pocket", messages=asked(QUESTION, SCREEN))
    details = found.usage.prompt_tokens_details
    grown = [server.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [1, details.image_tokens, found.usage.completion_tokens, 1]
    assert server.metric("process_resident_memory_bytes") > 1e7


def test_a_full_queue(pocket_bundle: Path) -> None:
    with serving(pocket_bundle, "--slots", "1", "--queue", "1") as server:
        body = {"messages": asked(TRANSCRIBE, SCREEN), **LONG_FORM}
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: server.ask(body), range(6)))
        statuses = sorted(status for status, *_ in found)
        assert statuses.count(200) >= 2
        assert statuses[-1] == 429
        for status, answer, headers in found:
            if status == 429:
                assert answer["error"]["code"] == "queue_full"
                assert int(headers["retry-after"]) >= 1
        assert server.ask(body)[0] == 200  # nothing is stuck


def test_draining(pocket_bundle: Path) -> None:
    """What is inside ends, what comes is refused, and the process ends well."""
    with serving(pocket_bundle) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
        stream = iter(
            client.chat.completions.create(
                model="",
                messages=asked(TRANSCRIBE, SCREEN),
                stream=True,
                max_tokens=300,
                temperature=2.0,
            )
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while server.ask(None, "/health")[1] != {"status": "draining"}:
            assert time.monotonic() < deadline
        status, answer, headers = server.ask({"messages": asked(QUESTION)})
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "draining", "1")
        assert [chunk for chunk in stream if chunk.choices][-1].choices[0].finish_reason in ("stop", "length")
        assert server.process.wait(timeout=30) == 0


def test_a_time_limit(pocket_bundle: Path) -> None:
    with serving(pocket_bundle, "--timeout", "0.05") as server:
        status, answer, _ = server.ask({"messages": asked(TRANSCRIBE, SCREEN), **LONG_FORM})
        assert (status, answer["error"]["message"]) == (504, "the answer took longer than 0.05 s")


def test_an_api_key(pocket_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("open sesame\n")
    with serving(pocket_bundle, "--api-key", f"@{tmp_path / 'key'}") as server:
        assert server.ask(None, "/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer open"}):
            status, answer, _ = server.ask(None, "/v1/models", **headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask(None, "/v1/models", Authorization="Bearer open sesame")[0] == 200


def test_limits_of_size(pocket_bundle: Path) -> None:
    with serving(pocket_bundle, "--max-body", "1", "--max-images", "2", "--context", "200") as server:
        noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
        status, answer, _ = server.ask({"messages": asked(QUESTION, noise)})
        assert (status, answer["error"]["message"][:11]) == (413, "the body is")
        status, answer, _ = server.ask({"messages": asked(QUESTION, *[SCREEN] * 3)})
        assert (status, answer["error"]["message"]) == (400, "the messages hold 3 images, expected up to 2")
        status, answer, _ = server.ask({"messages": asked("word " * 300)})
        assert status == 400
        assert "expected under 200" in answer["error"]["message"]


def test_mutated_requests(server: Server) -> None:
    """A piece of what ``tests/fuzz_server.py`` sends; other ones than those that it begins with."""
    seen = fuzz(server, 400, seed=7)
    assert seen[400] > 150
    assert seen[200] > 10
    assert server.ask(None, "/health")[0] == 200


def test_a_short_soak(pocket_bundle: Path, tmp_path: Path) -> None:
    """``bench/soak.py`` with few requests: no wrong answer, and nothing is left inside after clients went away."""
    result = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), str(pocket_bundle), "--requests", "120", "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["seen"]["answered"] > 60
    assert (found["wrong"], found["left_inside"], found["status_500"]) == ([], 0, 0)
    assert found["after_the_restart"]["answered"] > 100


def test_bench_serve(server: Server, pocket_bundle: Path, tmp_path: Path) -> None:
    result = tmp_path / "load.json"
    common = ["bench", "serve", server.url, "-i", str(SCREEN), "--requests", "12", "-n", "6", "-q"]
    for more in (["--concurrency", "4"], ["--rate", "40"]):
        done = runner().invoke(main, [*common, *more, "--slo-ttft", "60000", "-o", str(result)])
        assert done.exit_code == 0, done.output
        found = json.loads(result.read_text())
        metrics = found["metrics"]
        assert metrics["request_count"]["avg"] == len(found["requests"]) == 12
        assert metrics["time_to_first_token"]["p50"] <= metrics["time_to_first_token"]["p99"]
        assert metrics["goodput"]["avg"] == metrics["request_throughput"]["avg"]
        assert all(each["pruned_tokens"] == 95 for each in found["requests"])
        assert "time to first token" in done.stdout
        done = runner().invoke(main, ["bench", "compare", str(result), str(result)])
        assert done.exit_code in (0, 3), done.output  # 3: too few requests to tell
        assert "request_latency.mean" in done.stdout
    done = runner().invoke(main, ["bench", "serve", "http://127.0.0.1:9", "--requests", "2", "-q"])
    assert done.exit_code == 1
    assert "refused" in done.stderr
    done = runner().invoke(main, ["bench", "serve", "ftp://x", "-q"])
    assert "expected an address such as http://127.0.0.1:8000" in done.stderr


def test_an_engine_that_hangs_or_ends_is_told(pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Setup(str(pocket_bundle), Limits(seconds=0.2)).open()
    hold, held = threading.Event(), threading.Event()

    def hang() -> list[Any]:
        held.set()
        hold.wait(60)
        raise OSError("the device is gone")

    async def ask() -> list[str]:
        service.start()
        found = [service.state]
        run = await service.run_of(parse({"messages": asked("Hi")}), time.perf_counter())
        pieces = service.answer(parse({"messages": asked("Hi")}), run)
        with pytest.raises(ApiError, match="longer than"):
            await anext(pieces)
        await asyncio.sleep(0.3)
        found.append(service.state)
        hold.set()
        while service._loop.broken is None:
            await asyncio.sleep(0.01)
        return [*found, service.state]

    monkeypatch.setattr(service.pipe.engine, "step", hang)
    try:
        assert asyncio.run(ask()) == ["ready", "broken", "broken"]
        assert held.is_set()
    finally:
        hold.set()
        service.close()


def test_the_answer_goes_into_the_next_request_as_it_came(client: Any) -> None:
    messages = asked(QUESTION, SCREEN)
    answer = client.chat.completions.create(model="pocket", messages=messages)
    for turn in (answer.choices[0].message, answer.choices[0].message.model_dump()):
        again = [*messages, turn, *asked("What is the Brightness?")]
        assert client.chat.completions.create(model="pocket", messages=again).choices[0].message.content


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"messages": [' + b"{}," * 60_000 + b"{}]}", "more than 50000 values"),
        (b'{"messages": [' + b"{}," * 2000 + b"{}]}", "there are 2001 messages"),
        (json.dumps({"messages": asked("Hi"), "prune": {"\ud800": 1}}).encode(), "prune"),
        (
            json.dumps(
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"x": 1}}]}]}
            ).encode(),
            "image_url",
        ),
    ],
    ids=range(4),
)
def test_bodies_that_are_too_much(server: Server, body: bytes, said: str) -> None:
    begin = time.monotonic()
    status, found, _ = server.ask(body)
    assert (status, said in found["error"]["message"]) == (400, True), found
    assert time.monotonic() - begin < 10


def test_bodies_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing more has its time; one that goes away is no fault of the server."""
    monkeypatch.setattr(app, "BODY_SECONDS", 0.05)

    class Slow:
        def __init__(self, gone: bool):
            self.gone = gone

        async def stream(self) -> AsyncIterator[bytes]:
            yield b"{"
            if self.gone:
                raise ClientDisconnect
            await asyncio.sleep(60)

    for gone, status in ((False, 408), (True, 499)):
        with pytest.raises(ApiError) as found:
            asyncio.run(app._body(Slow(gone), 100))  # type: ignore[arg-type]
        assert found.value.status == status


def test_connections_that_ask_for_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.1)

    async def idle() -> bytes:
        config = uvicorn.Config(
            FastAPI(), http=connections.impatient(), log_config=None, lifespan="off", port=0
        )
        with listening(Address("127.0.0.1", 0)) as listener:
            served = uvicorn.Server(config)
            serving = asyncio.ensure_future(served.serve(sockets=[listener]))
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            found = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            served.should_exit = True
            await serving
        return found

    assert asyncio.run(idle()) == b""


def test_bench_serve_of_others(tmp_path: Path) -> None:
    """Streams that end early have failed, whatever shape errors have; an address may end in /v1."""
    answers = [b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', b'data: {"error": "boom"}\n\n']
    answers += [b'data: {"choices": null, "usage": {}}\n\ndata: [DONE]\n\n', b"data: {}\n\ndata: [1]\n\n"]
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[len(paths) - 1])

        def log_message(self, *_: Any) -> None: ...

    other = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        load = Load(f"http://127.0.0.1:{other.server_port}/v1", requests=4, concurrency=1)
        found, _ = measure(load)
    finally:
        other.shutdown()
        other.server_close()
    assert paths == ["/v1/chat/completions"] * 4
    assert [each.ok for each in found] == [False, False, True, False]
    assert found[1].error == "boom"


def test_small_parts_are_sent_at_once() -> None:
    """Else every token waits for the acknowledgement of the one before it, which comes after 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            found.set_result(option)
            writer.close()

        with listening(Address("127.0.0.1", 0)) as listener:
            server = await asyncio.start_server(look, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            option = await found
            writer.close()
            server.close()
        return option

    assert asyncio.run(accepted())


class Settings(BaseModel):
    """What a screen says."""

    region: Literal["Lima", "Porto"]


def test_langchain(server: Server, pipe: ppexport.Pipeline) -> None:
    """Its messages, streams, batches and structured answers, with the fields that it sends along."""
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="unused", model="pocket", temperature=0, max_tokens=400
    )
    shown = asked(QUESTION, SCREEN)
    expected = pipe.generate(QUESTION, SCREEN).text()
    answer = chat.invoke(shown)
    assert answer.content == expected
    assert answer.usage_metadata["input_tokens"] > 9
    parts = list(chat.stream(asked(TRANSCRIBE, SCREEN)))
    assert len(parts) > 5
    assert "".join(part.content for part in parts) == pipe.generate(TRANSCRIBE, SCREEN).text()
    assert [each.content for each in chat.batch([shown] * 5)] == [expected] * 5
    structured = chat.with_structured_output(Settings, method="json_schema", strict=True)
    assert structured.invoke(shown) == Settings(region="Porto")
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat.bind_tools([Settings]).invoke(shown)
