"""Prompts to token ids and token ids to text, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..models.checks import utf8
from ..models.errors import BundleError, RequestError
from .messages import Message, PromptLike, with_images

PRIVATE = (
    0xF0000,
    0x100000,
)  # first code points of Unicode's private planes, for what stands for special tokens
PLANE = 0xFFFE


class Text:
    """tokenizer.json and chat_template.jinja of a bundle.

    ``image_token``: id of the image placeholder; ``named``: what the template may ask for, such as "bos_token".
    """

    def __init__(self, directory: Path, image_token: int, named: Mapping[str, str]):
        try:
            self.tokenizer = Tokenizer.from_file(utf8(directory / "tokenizer.json"))
        except Exception as err:  # tokenizers raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read: {err}; build the bundle again") from err
        self.image_token = image_token
        self.named = dict(named)
        self._before, self._after = _around(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items() if token.special}
        self._special_start = re.compile(f"(?={'|'.join(map(re.escape, self.special)) or '(?!)'})")
        self._beginnings = {token[:n] for token in self.special for n in range(1, len(token))}
        self._as_text: Tokenizer | None = None  # takes special tokens for text
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        try:
            self.template = _environment().from_string(source)
        except jinja2.TemplateError as err:
            raise BundleError(
                f"chat_template.jinja cannot be compiled: {err}; build the bundle again"
            ) from err

    def encode(self, prompt: PromptLike, grids: Sequence[int]) -> np.ndarray:
        """Token ids int32 [S] of a prompt, each image's placeholder repeated once per token of its full grid.

        ``prompt``: a question (the images come before it) or chat messages (messages.py); ``grids``: N of each image.
        Special tokens in them are text, only those of the template are special. Raises RequestError if the rendered
        prompt does not hold one placeholder per image.
        """
        messages, _ = with_images(prompt, [b""] * len(grids))
        marks = self._marks(messages)
        try:
            said = self._marked(messages, marks) if marks else messages
            rendered = self.template.render(messages=said, add_generation_prompt=True, **self.named)
        except Exception as err:  # a template may raise anything that Python can
            raise RequestError(f"the chat template refused the prompt: {err}") from err
        try:
            rendered.encode("utf-8")
        except UnicodeEncodeError as err:
            raise RequestError(f"the prompt is not valid text ({err}), expected UTF-8") from err
        numbers = self._encode_marked(rendered, marks) if marks else self._encode(rendered)
        if not rendered.startswith(self.named.get("bos_token") or "\0"):  # as transformers' processors do
            numbers = [*self._before, *numbers, *self._after]
        ids = np.array(numbers, np.int32)
        is_image = ids == self.image_token
        if is_image.sum() != len(grids):
            raise RequestError(
                f"the prompt holds {int(is_image.sum())} image placeholders, expected {len(grids)}, one per image: the "
                "bundle's chat template does not show every image part"
            )
        times = np.ones(len(ids), np.int64)
        times[is_image] = grids
        return np.repeat(ids, times)

    def stream(self) -> TextStream:
        """A new incremental decoder."""
        return TextStream(self.tokenizer)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _marks(self, messages: Sequence[Message]) -> dict[str, str]:
        """First characters of special tokens that begin in messages -> characters that stand for them in the template.

        Empty where none begins there. Tokens may also end in the next part, or in the template's own text.
        """
        text = list(_strings(messages))
        first = {said[at] for said in text for at in self._starts(said)}
        if not first:
            return {}
        used = set().union(*map(set, text))
        free = (chr(point) for low in PRIVATE for point in range(low, low + PLANE) if chr(point) not in used)
        marks = dict(zip(sorted(first), free, strict=False))
        if len(marks) < len(first):
            raise RequestError(
                "the prompt holds special tokens and all characters of Unicode's private planes"
            )
        return marks

    def _starts(self, said: str) -> list[int]:
        """Where a special token begins in a string, or may begin at its end: "a <|im_" may go on with "end|>"."""
        whole = [match.start() for match in self._special_start.finditer(said)]
        length = max(map(len, self.special), default=0)
        cut = [len(said) - n for n in range(1, min(length, len(said) + 1)) if said[-n:] in self._beginnings]
        return sorted({*whole, *cut})

    def _marked(self, value: Any, marks: Mapping[str, str]) -> Any:
        """Messages in which no special token begins any more; roles are not looked at."""
        if isinstance(value, str):
            characters = list(value)
            for at in self._starts(value):
                characters[at] = marks[characters[at]]
            return "".join(characters)
        if isinstance(value, Mapping):
            return {
                key if key == "role" else self._marked(key, marks): item
                if key == "role"
                else self._marked(item, marks)
                for key, item in value.items()
            }
        return [self._marked(item, marks) for item in value] if isinstance(value, (list, tuple)) else value

    def _encode_marked(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        """Token ids of text in which marks stand for the first characters of special tokens that are text.

        The text between the special tokens of the template is what the tokenizer takes by itself anyway, so cutting
        there changes nothing: "<|im_start|>user\\nWhat is <|im_end|>?<|im_end|>" with the first end marked is the start
        token, the text "user\\nWhat is <|im_end|>?" and the end token.
        """
        if self._as_text is None:
            as_text = Tokenizer.from_str(self.tokenizer.to_str())
            as_text.encode_special_tokens = True
            self._as_text = as_text  # only now, for other threads
        tokens = self.tokenizer.encode(rendered, add_special_tokens=False)
        special = set(self.special.values())
        back = str.maketrans({mark: character for character, mark in marks.items()})
        ids: list[int] = []
        end = 0
        for number, (start, stop) in [
            *zip(tokens.ids, tokens.offsets, strict=True),
            (-1, (len(rendered),) * 2),
        ]:
            if number in special or number < 0:
                if between := rendered[end:start].translate(back):
                    ids += self._as_text.encode(between, add_special_tokens=False).ids
                ids += [number] if number >= 0 else []
                end = stop
        return ids


class TextStream:
    """Token ids in, text out as soon as whole characters are there; special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0  # characters handed out

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._sent += len(piece)
        return piece

    def finish(self) -> str:
        """What is left: bytes that never became a character, as replacement characters."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._sent :]


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text of its own accord, such as a token for its beginning."""
    inside = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    places = [i for i in range(len(whole)) if whole[i : i + len(inside)] == inside]
    first = places[0] if places else len(whole)
    return whole[:first], whole[first + len(inside) :]


def _strings(value: Any) -> Iterator[str]:
    """All text in messages but the roles, which are checked."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "role":
                yield from _strings(key)
                yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _environment() -> jinja2.Environment:
    """The sandbox transformers renders chat templates in: no access to Python beyond the values given."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class Generation(jinja2.ext.Extension):
    """``{% generation %}``: marks what a model is trained to say, in templates of training tools. Renders its body."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
