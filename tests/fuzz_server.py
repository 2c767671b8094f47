"""Mutated requests to a server: whatever comes, the answer is one of the statuses that are promised, and comes soon.

python tests/fuzz_server.py BUNDLE --requests 100000
"""

from __future__ import annotations

import base64
import copy
import http.client
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from serving import Server, asked, serving

SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"
PROMISED = {200, 400, 404, 413, 429, 503, 504}
SLOWEST = 20.0  # seconds
REUSE = 64  # MiB, so that it is soon full and all growth would be something else
PART = 5000  # requests between two looks at the memory
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**63,
        -(2**63),
        1e308,
        -1e-308,
        0.5,
        "",
        " ",
        "\0",
        "\ud800",
        "é" * 50,
        "a" * 5000,
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        {"a": None},
        {"type": "image_url"},
        {"$ref": "#"},
        "data:image/png;base64,",
        "http://localhost/",
    ),
    *(
        "<|im_end|>",
        "{{ 7 * 7 }}",
        "%s%n",
        "../../etc/passwd",
        "data:application/pdf;base64,JVBERi0xLjQK#1-3",
    ),
    *(
        "(a{99999}){9999}",
        "(?:",
        "\\p{Greek}{500}",
        "^(a|b)*c{1,900}$",
        2**53 - 1,
        1 - 2**53,
        0.1,
        1e-12,
        99999,
    ),
]
SEEDS: list[dict[str, Any]] = [
    {"messages": asked("What is the Region?", SCREEN), "max_tokens": 3},
    {"messages": asked("Hi"), "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    {
        "messages": asked("Hi"),
        "max_tokens": 2,
        "temperature": 1.0,
        "top_p": 0.5,
        "top_k": 3,
        "seed": 1,
        "stop": ["a"],
    },
    {"messages": asked("Hi"), "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "n": 1, "user": "u"},
    {"messages": asked("Hi", SCREEN), "max_tokens": 2, "prune": {"tau": 0.1, "prunesid": {"max_tokens": 9}}},
    {
        "messages": [{"role": "system", "content": "x"}, *asked("Hi")],
        "max_completion_tokens": 4,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "n",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "string", "pattern": "^a+$"}, "b": {"enum": [1, None]}},
                    "required": ["a"],
                    "$defs": {"c": {"$ref": "#/$defs/c"}},
                },
            },
        },
    },
]


SEEDS.append(
    {
        "messages": asked("Hi"),
        "max_tokens": 6,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "schema": {
                    "anyOf": [
                        {"type": "integer", "minimum": -5, "exclusiveMaximum": 700, "multipleOf": 5},
                        {"type": "number", "maximum": 2.5, "multipleOf": 0.5},
                        {"type": "string", "minLength": 2, "maxLength": 9, "pattern": "^[a-z]+$"},
                        {"type": "string", "format": "date-time"},
                        {"const": {"a": [1, 2.5, "x", None]}},
                        {
                            "type": "array",
                            "prefixItems": [{"type": "null"}],
                            "items": {"enum": [1]},
                            "minItems": 2,
                        },
                        {"allOf": [{"type": ["object", "null"]}, {"minProperties": 1}]},
                        {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}},
                        {"oneOf": [{"$ref": "#/$defs/tree"}, {"not": {"type": "string"}}]},
                    ],
                    "$defs": {
                        "tree": {
                            "type": "object",
                            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                            "additionalProperties": False,
                            "dependentRequired": {"children": ["a"]},
                        }
                    },
                }
            },
        },
    }
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a body, the body itself left out."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, each in inside for found in [(*path, key), *places(each, (*path, key))]]


def mutated(draw: random.Random) -> bytes:
    """A body that was a good one."""
    body = copy.deepcopy(draw.choice(SEEDS))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        spots = places(body)
        if not spots:
            break
        *path, key = draw.choice(spots)
        holder: Any = body
        for step in path:
            holder = holder[step]
        what = draw.random()
        if what < 0.45:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif what < 0.6:
            del holder[key]
        elif what < 0.7 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "type", "image_url", str(key) * 2))] = holder.pop(key)
        elif isinstance(holder[key], str) and len(holder[key]) > 100:
            holder[key] = _damaged_url(holder[key], draw)
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = [holder[key]]
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        damaged = bytearray(text)
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        text = bytes(damaged[: draw.randrange(1, len(damaged) + 1)])
    return text


def _damaged_url(url: str, draw: random.Random) -> str:
    """With some bytes of its image changed, or without its end."""
    head, _, data = url.partition(",")
    try:
        raw = bytearray(base64.b64decode(data + "=" * (-len(data) % 4), validate=True))
    except ValueError:
        raw = bytearray()
    if len(raw) < 30:  # another mutation was here before
        return url[: draw.randrange(len(url))]
    for _ in range(draw.randrange(1, 30)):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return f"{head},{base64.b64encode(bytes(raw[: draw.randrange(20, len(raw))])).decode()}"


def fuzz(server: Server, requests: int, seed: int = 0, first: int = 0) -> Counter[int]:
    """Send them, numbered from ``first`` on; how often each status came.

    Raises AssertionError with the body that led to anything else.
    """
    place = urlsplit(server.url)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=SLOWEST)
    seen: Counter[int] = Counter()
    for number in range(first, first + requests):
        body = mutated(random.Random(seed * 1_000_003 + number))
        path = "/v1/chat/completions"
        begin = time.monotonic()
        try:
            connection.request("POST", path, body)
            answer = connection.getresponse()
            said = answer.read()
        except Exception as err:
            raise AssertionError(f"request {number}: {err!r} for {body[:3000]!r}") from err
        assert answer.status in PROMISED, (number, answer.status, said[:300], body[:3000])
        assert b'"server_error"' not in said, (number, said[:300], body[:3000])
        assert time.monotonic() - begin < SLOWEST, (number, body[:3000])
        seen[answer.status] += 1
    connection.close()
    return seen


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", default=100_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(bundle: Path, requests: int, seed: int, output: Path | None) -> None:
    """Fuzz a server, and say which statuses came and how much memory it took."""
    seen: Counter[int] = Counter()
    memory = []
    with serving(bundle, "--reuse", str(REUSE)) as server:
        begin = time.monotonic()
        for first in range(0, requests, PART):
            seen += fuzz(server, min(PART, requests - first), seed, first)
            memory.append([min(first + PART, requests), int(server.metric("process_resident_memory_bytes"))])
            click.echo(f"{memory[-1][0]:>7} requests, {memory[-1][1] / 1e6:.0f} MB, {dict(seen)}")
        seconds = time.monotonic() - begin
        running = int(server.metric("ppexport_running"))
        code = server.end(signal.SIGTERM)
    result = {
        "requests": requests,
        "seed": seed,
        "seconds": round(seconds, 1),
        "statuses": {str(status): count for status, count in sorted(seen.items())},
        "left_inside": running,
        "exit_code": code,
        "memory_bytes": memory,
    }
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(running or code))


if __name__ == "__main__":
    main()
