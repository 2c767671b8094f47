"""What a client sends and gets: the part of OpenAI's chat completions that ppexport has, in pydantic.

Source: the API reference of OpenAI, "Create chat completion". A field that would change the answer and is not supported
is refused by name; one that says nothing (null), that asks for what happens anyway, or that only labels a request is
taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ..models.errors import RequestError
from ..models.pruners import Pruner, changed, with_budget
from ..runtime.grammar import ANY_OBJECT
from ..runtime.sequence import PruneLike
from .errors import ApiError, invalid

# fields that are taken where they ask for what happens anyway
AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # they change nothing about an answer
MOST_STOPS = 4
MOST_MESSAGES = 1000
MOST_VALUES = (
    50_000  # of a body, by its commas and brackets: the checks of millions would take minutes and gigabytes
)
MOST_TOP = 20  # alternatives with log probabilities

Short = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Part(BaseModel):
    """Fields that are not named here are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ImageUrl(Part):
    """An image, as a data: URL, or where the server allows it by name, at an address."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ContentPart(Part):
    """Text, or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class StreamOptions(Part):
    """What a stream ends with."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Part):
    """What the answer has to match."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """Text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class ChatRequest(Part):
    """The body of a request."""

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=1 << 63)
    stop: Short | Annotated[list[Short], Field(max_length=MOST_STOPS)] | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP)
    response_format: ResponseFormat = ResponseFormat()
    prune: Literal["default", "off"] | dict[str, Any] = "default"

    @property
    def until(self) -> list[str]:
        """The strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def schema_(self) -> dict[str, Any] | None:
        """What the answer has to match, as a JSON schema."""
        if self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return ANY_OBJECT
        assert self.response_format.json_schema is not None
        return self.response_format.json_schema.schema_


class SelectRequest(Part):
    """A picture, and how it would be pruned."""

    image: str
    prune: Literal["default", "off"] | dict[str, Any] = "default"


def parse_select(body: object) -> SelectRequest:
    """Check a request. Raises ApiError."""
    try:
        return SelectRequest.model_validate(body)
    except (ValidationError, RecursionError) as err:
        raise _first(err) from err


def parse(body: object) -> ChatRequest:
    """Check a request. Raises ApiError that names the first field that does not fit."""
    if not isinstance(body, Mapping):
        raise invalid(f"the body is a {type(body).__name__}, expected a JSON object")
    given = {key: value for key, value in body.items() if value is not None and key not in LABELS}
    messages = given.get("messages")
    if isinstance(messages, list):
        if len(messages) > MOST_MESSAGES:
            raise invalid(f"there are {len(messages)} messages, expected up to {MOST_MESSAGES}", "messages")
        given["messages"] = [_without_nulls(message) for message in messages]
    for key, allowed in AS_IT_IS.items():
        if key in given:
            value = given.pop(key)
            if value not in allowed:
                raise invalid(f"{key} is {value!r:.60}, which is not supported: leave it out", key)
    try:
        found = ChatRequest.model_validate(given)
    except (ValidationError, RecursionError) as err:
        raise _first(err) from err
    _check(found)
    return found


def from_json(body: bytes) -> Any:
    """What a body says. Raises ApiError for what is no JSON, or holds too much."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise invalid(f"the body holds more than {MOST_VALUES} values, expected fewer")
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as err:
        raise invalid(f"the body is no JSON: {err}") from err


def _no_number(name: str) -> float:
    raise ValueError(f"found {name}, expected a number")


def _without_nulls(message: Any) -> Any:
    """A message without the fields that say nothing, and so its parts."""
    if not isinstance(message, dict):
        return message
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    if isinstance(found.get("content"), list):
        found["content"] = [
            {key: value for key, value in part.items() if value is not None}
            if isinstance(part, dict)
            else part
            for part in found["content"]
        ]
    return found


def _first(err: ValidationError | RecursionError) -> ApiError:
    """What is wrong with the first field that does not fit."""
    if isinstance(err, RecursionError):
        return invalid("the request is nested too deeply")
    errors = err.errors(include_url=False, include_context=False)
    # the deepest one: of a list of parts it is told, too, that it is no text
    first = max(errors, key=lambda each: len(each["loc"]))
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"{where} is not supported: leave it out", where, code="unsupported_parameter")
    if first["type"] == "missing":
        return invalid(f"{where} is missing", where, code="missing_required_parameter")
    return invalid(f"{where}: {first['msg']}; found {first['input']!r:.80}", where)


def _check(request: ChatRequest) -> None:
    """What fields say together."""
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if (part.type == "text") != (part.text is not None) or (part.type == "image_url") != (
                part.image_url is not None
            ):
                where = f"messages.{i}.content.{j}"
                raise invalid(
                    f"{where} has the type {part.type!r}, expected its {part.type} and nothing else", where
                )
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs goes with logprobs: true", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options goes with stream: true", "stream_options")
    if (request.response_format.type == "json_schema") != (request.response_format.json_schema is not None):
        raise invalid(
            "response_format of the type json_schema, and only that, has a json_schema", "response_format"
        )
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("max_tokens and max_completion_tokens are given, expected one of them", "max_tokens")


def prune_of(given: Literal["default", "off"] | dict[str, Any], own: tuple[Pruner, ...]) -> PruneLike:
    """What ``prune`` of a request stands for, given the bundle's own pruners.

    An object changes settings of PixelPrune; under "prunesid" it may hold a budget, a number, or settings of PruneSID.
    Raises ApiError.
    """
    if given == "default":
        return "default"
    if given == "off":
        return None
    assert isinstance(given, dict)
    settings = {key: value for key, value in given.items() if key != "prunesid"}
    budget = given.get("prunesid")
    try:
        found = changed(own, settings) if settings else own
        if isinstance(budget, dict):
            found = with_budget(found, **budget)
        elif budget is not None:
            found = with_budget(found, budget)
    except RequestError as err:
        raise invalid(f"prune: {err}", "prune") from err
    except TypeError as err:  # a setting that there is none of
        raise invalid(f"prune: {err}".replace("__init__() ", ""), "prune") from err
    return found
