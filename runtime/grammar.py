"""Answers that have to match a JSON schema: a mask on the logits before each token is chosen.

What may come next is worked out by llguidance (derivatives of a grammar over the bytes of tokens), on the host and for
every backend alike.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models.checks import utf8
from ..models.errors import BackendError, RequestError
from .grammar_child import PROBLEM

MOST_BYTES = 128 << 10  # of a schema as JSON
MOST_DEPTH = 64  # of objects and lists inside of each other in a schema
MOST_PARTS = 100_000  # of its objects, lists and values
# between the parts of an answer: without an end a model could go on with it for ever
WHITESPACE = r"\n {0,24}| ?"
OPTIONS: Any = {"whitespace_pattern": WHITESPACE}
SECONDS = 5.0  # to try a schema out
TRIED = 256  # schemas of which it is known how that went
CHILD = str(Path(__file__).parent / "grammar_child.py")
ANY_OBJECT = {"type": "object"}

SchemaLike = Mapping[str, Any] | str


class Grammars:
    """What the tokens of a bundle are, for grammars. Raises BackendError where llguidance is not installed."""

    def __init__(self, tokenizer: Path, vocab: int, stop: Collection[int]):
        try:
            import llguidance
        except ImportError as err:
            raise BackendError(
                "llguidance is not installed, expected for answers by a schema; install it with: "
                "pip install 'ppexport[schema]'"
            ) from err
        self._llguidance = llguidance
        self.vocab = vocab
        self._tokens = llguidance.LLTokenizer(
            tokenizer.read_text(encoding="utf-8"), n_vocab=vocab, eos_token=sorted(stop)
        )

    def grammar(self, schema: SchemaLike) -> Grammar:
        """For one answer. Raises RequestError for what is no schema, too large, or too hard to follow."""
        text = as_json(schema)
        if problem := _problem(text):
            raise RequestError(f"the schema cannot be followed: {problem}")
        matcher = self._llguidance.LLMatcher
        rules = matcher.grammar_from_json_schema(text, overrides=OPTIONS)
        found = Grammar(matcher(self._tokens, rules, log_level=0), self.vocab)
        found.masked(np.zeros(self.vocab, np.float32))  # before anything runs that would be for nothing
        return found


class Grammar:
    """How far one answer is."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab // 32), np.uint32)

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """Logits float32 [V] -> the same with -inf where a token must not come next. Raises RequestError."""
        self._check()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=len(logits), bitorder="little").view(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def take(self, token: int) -> bool:
        """The token was chosen; is the answer complete with it? Raises RequestError."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed: {_brief(self._matcher.get_error())}")


@functools.lru_cache(maxsize=TRIED)
def _problem(text: str) -> str:
    """What is wrong with a schema, "" if nothing is: another process follows it first (grammar_child.py)."""
    try:
        done = subprocess.run(
            [sys.executable, CHILD],
            input=f"{json.dumps([sys.path, OPTIONS])}\n{text}",
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return (
            f"it takes more than {SECONDS:g} s to work out what it allows, expected fewer or simpler patterns"
        )
    if done.returncode == PROBLEM:
        return _brief(done.stdout)
    return "llguidance ran out of memory or crashed, expected a simpler one" if done.returncode else ""


def _brief(error: object) -> str:
    """The first line of what llguidance says, without the state that it was in."""
    return str(error).partition("<state>")[0].strip().partition("\n")[0][:300]


def as_json(schema: SchemaLike) -> str:
    """A schema as JSON. Raises RequestError for what is none, and for one that is too large."""
    if isinstance(schema, str):
        _check_size(len(schema.encode("utf-8", "replace")))
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as err:
            raise RequestError(f"the schema is no JSON ({err}), expected a JSON schema") from err
    if not isinstance(schema, Mapping):
        raise RequestError(f"the schema is a {type(schema).__name__}, expected a JSON schema: an object")
    _check_parts(schema)
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as err:
        raise RequestError(f"the schema is no JSON ({err}), expected a JSON schema") from err
    _check_size(len(text))
    return text


def read_schema(path: str | Path) -> str:
    """The text of a file; raises RequestError if it cannot be read."""
    try:
        file = Path(utf8(Path(path)))
        _check_size(file.stat().st_size)
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as err:
        raise RequestError(f"{path}: cannot be read as a JSON schema: {err}") from err


def _check_size(found: int) -> None:
    if found > MOST_BYTES:
        raise RequestError(f"the schema takes {found} bytes, expected up to {MOST_BYTES}")


def _check_parts(schema: object) -> None:
    level = [schema]
    for _ in range(MOST_DEPTH):
        inside: list[object] = []
        for value in level:
            inside += (
                value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
            )
        level = inside
        if not level:
            return
        if len(level) > MOST_PARTS:
            raise RequestError(f"the schema has over {MOST_PARTS} parts, expected fewer")
    raise RequestError(f"the schema is nested more than {MOST_DEPTH} levels deep, expected less")
