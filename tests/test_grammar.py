"""Answers by a JSON schema: they match it, and a schema that cannot be followed is told before anything runs."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from terminal import runner

import ppexport
from ppexport.cli import main

SCREEN = Path(__file__).parent.parent / "docs" / "settings.png"
QUESTION = "What is the Region?"


@pytest.fixture(scope="module")
def pipe(pocket_bundle: Path) -> ppexport.Pipeline:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    return ppexport.load(pocket_bundle)


INNER = {
    "type": "object",
    "properties": {"b": {"type": "null"}},
    "required": ["b"],
    "additionalProperties": False,
}
SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "integer", "minimum": 10, "maximum": 20}, lambda found: 10 <= found <= 20),
    ({"enum": ["Porto", "Milan"]}, lambda found: found in ("Porto", "Milan")),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
        lambda found: len(found) == 3,
    ),
    (
        {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
        lambda found: found[:2].isupper() and found[2:].isdigit(),
    ),
    ({"anyOf": [{"type": "null"}, {"const": 7}]}, lambda found: found in (None, 7)),
    (
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/n"}},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {"b": {"type": "null"}},
                    "required": ["b"],
                    "additionalProperties": False,
                }
            },
        },
        lambda found: found["a"]["b"] is None,
    ),
]


@pytest.mark.parametrize(("schema", "right"), SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_match(
    pipe: ppexport.Pipeline, schema: dict[str, Any], right: Any, temperature: float
) -> None:
    for seed in range(3):
        given = {"temperature": temperature, "seed": seed, "max_new_tokens": 200}
        answer = pipe.generate(QUESTION, [SCREEN], schema=schema, **given)
        assert right(json.loads(answer.text())), answer.text()
        assert answer.stats.finish == "stop"


def test_together_with_others(pipe: ppexport.Pipeline) -> None:
    """Every request has its own, and those without are what they are alone."""
    requests = [
        ppexport.Request(QUESTION, [SCREEN], schema={"type": "boolean"}),
        ppexport.Request(QUESTION, [SCREEN]),
        ppexport.Request(QUESTION, [SCREEN], schema=json.dumps({"type": "number"}), max_new_tokens=20),
    ]
    alone = [pipe.generate_batch([each])[0].text() for each in requests]
    assert [answer.text() for answer in pipe.generate_batch(requests)] == alone
    assert alone[0] in ("true", "false")
    assert alone[1] == "Porto"


def test_an_answer_that_is_cut_says_so(pipe: ppexport.Pipeline) -> None:
    answer = pipe.generate(QUESTION, [SCREEN], schema={"type": "string", "minLength": 100}, max_new_tokens=5)
    assert answer.text().startswith('"')
    assert answer.stats.finish == "length"


deep: dict[str, Any] = {}
for _ in range(100):
    deep = {"properties": {"a": deep}}
BAD: list[tuple[Any, str]] = [
    ("{", "the schema is no JSON"),
    ("[" * 100_000, "the schema is no JSON"),
    ("[]", "the schema is a list, expected a JSON schema: an object"),
    (3, "the schema is a int, expected a JSON schema"),
    ({"type": "porridge"}, "the schema cannot be followed"),
    ({"$ref": "#"}, "the schema cannot be followed"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "the schema cannot be followed"),
    ({"type": "string", "pattern": "("}, "the schema cannot be followed"),
    (
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
        "the schema cannot be",
    ),
    ({"enum": ["x" * 200_000]}, "the schema takes 200... bytes, expected up to 131072"),
    ({"a": {1, 2}}, "the schema is no JSON"),
    ({"enum": [1, -(2**63)]}, "llguidance ran out of memory or crashed"),
    ({"maximum": 10**400}, "the schema cannot be followed"),
    (deep, "the schema is nested more than 64 levels deep"),
    ({"properties": {str(i): {} for i in range(200_000)}}, "the schema has over 100000 parts"),
    ({"$ref": "https://example.org/x.json"}, "the schema cannot be followed"),
]


@pytest.mark.parametrize(("schema", "message"), BAD, ids=range(len(BAD)))
def test_schemas_that_cannot_be_followed(pipe: ppexport.Pipeline, schema: Any, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ppexport.RequestError, match=message) as found:
        pipe.generate(QUESTION, [SCREEN], schema=schema).text()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600
    assert time.monotonic() - begin < 20  # it does not hang


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|aa)*b$", "^(.*a){20}$", "^(x{1,100}){1,100}$"])
def test_patterns_that_are_hard_elsewhere(pipe: ppexport.Pipeline, pattern: str) -> None:
    """They are followed, or refused, soon."""
    begin = time.monotonic()
    with contextlib.suppress(ppexport.RequestError):
        pipe.generate(QUESTION, schema={"type": "string", "pattern": pattern}, max_new_tokens=20).text()
    assert time.monotonic() - begin < 20


def test_patterns_that_never_end(pipe: ppexport.Pipeline) -> None:
    """Another process tries them out, and is ended; a crash of it ends nothing else, either."""
    patterns = [{"type": "string", "pattern": f"^.*a.{{{i}}}.*$"} for i in range(30)]
    begin = time.monotonic()
    with pytest.raises(ppexport.RequestError, match="takes more than 5 s|ran out of memory"):
        pipe.generate(QUESTION, schema={"allOf": patterns})
    assert time.monotonic() - begin < 60


def test_from_the_command_line(pocket_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "boolean"}')
    asked = ["run", str(pocket_bundle), "-i", str(SCREEN), QUESTION, "--schema", str(path)]
    done = runner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    assert done.stdout in ("true\n", "false\n")
    for text, message in (("{", "the schema is no JSON"), ("\xff", "")):
        path.write_bytes(text.encode("latin-1"))
        done = runner().invoke(main, asked)
        assert done.exit_code == 1
        assert message in done.stderr
    done = runner().invoke(main, [*asked[:-1], str(tmp_path / "none.json")])
    assert "none.json: cannot be read as a JSON schema" in done.stderr
