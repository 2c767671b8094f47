"""Prompts to token ids and token ids to text, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..models.errors import BundleError, RequestError

Messages = Sequence[Mapping[str, Any]]
PromptLike = str | Messages


class Text:
    """tokenizer.json and chat_template.jinja of a bundle. ``image_token``: id of the image placeholder."""

    def __init__(self, directory: Path, image_token: int):
        try:
            self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as err:  # tokenizers raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read: {err}; build the bundle again") from err
        self.image_token = image_token
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        try:
            self.template = _environment().from_string(source)
        except jinja2.TemplateError as err:
            raise BundleError(f"chat_template.jinja cannot be compiled: {err}; build the bundle again") from err

    def encode(self, prompt: PromptLike, grids: Sequence[int]) -> np.ndarray:
        """Token ids int32 [S] of a prompt, each image's placeholder repeated once per token of its full grid.

        ``prompt``: a question (the images come before it) or chat messages as transformers takes them; ``grids``: N of
        each image. Raises RequestError if the rendered prompt does not hold one placeholder per image.
        """
        messages = _messages(prompt, len(grids))
        try:
            rendered = self.template.render(messages=messages, add_generation_prompt=True)
        except Exception as err:  # a template may raise anything that Python can
            raise RequestError(f"the chat template refused the prompt: {err}") from err
        try:
            rendered.encode("utf-8")
        except UnicodeEncodeError as err:
            raise RequestError(f"the prompt is not valid text ({err}), expected UTF-8") from err
        ids = np.array(self.tokenizer.encode(rendered, add_special_tokens=False).ids, np.int32)
        is_image = ids == self.image_token
        if is_image.sum() != len(grids):
            raise RequestError(
                f"the prompt holds {int(is_image.sum())} image placeholders, expected {len(grids)}, one per image "
                f"({self.tokenizer.id_to_token(self.image_token)!r} in a question is read as a placeholder)"
            )
        times = np.ones(len(ids), np.int64)
        times[is_image] = grids
        return np.repeat(ids, times)

    def stream(self) -> TextStream:
        """A new incremental decoder."""
        return TextStream(self.tokenizer)


class TextStream:
    """Token ids in, text out as soon as whole characters are there; special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
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


def _messages(prompt: PromptLike, images: int) -> Messages:
    if isinstance(prompt, str):
        content = [{"type": "image"} for _ in range(images)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    messages: Messages = prompt
    if not isinstance(messages, Sequence) or not all(
        isinstance(m, Mapping) and "role" in m and "content" in m for m in messages
    ):
        raise RequestError(
            f"the prompt is {prompt!r:.80}, expected a string or a list of messages with 'role' and 'content'"
        )
    for message in messages:
        parts = message["content"]
        for part in [] if isinstance(parts, str) or not isinstance(parts, Sequence) else parts:
            if not isinstance(part, Mapping) or part.get("type") not in ("image", "text"):
                raise RequestError(f"a message holds the part {part!r:.80}, expected {{'type': 'image'}} or 'text'")
    return messages


def _environment() -> jinja2.Environment:
    """The sandbox transformers renders chat templates in: no access to Python beyond the values given."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
