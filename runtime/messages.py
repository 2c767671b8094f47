"""Chat messages as people write them -> messages as templates take them, and the images that stand in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.errors import RequestError
from .image import ImageLike
from .pdf import expanded

Message = Mapping[str, Any]
PromptLike = str | Sequence[Message]
ROLES = ("system", "user", "assistant", "tool")
SUPPORTED = "expected {'type': 'text', 'text': ...} or {'type': 'image'}, which may hold the 'image' itself"


def images_of(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """The images of a request: a list of them, or one by itself; of "report.pdf#2-5" each page.

    Raises RequestError for something else.
    """
    if isinstance(images, ImageLike):
        return expanded(images)
    if not isinstance(images, (list, tuple)):
        raise RequestError(f"images is a {type(images).__name__}, expected a list of images, or one")
    return [page for image in images for page in expanded(image)]


def with_images(prompt: PromptLike, images: Sequence[ImageLike]) -> tuple[list[Message], list[ImageLike]]:
    """Messages whose image parts are all ``{"type": "image"}``, and the image of each of these parts, in order.

    A question becomes a user message with all images before it; so does the first user message, if no message has an
    image part. Parts that hold their image (Qwen's ``{"type": "image", "image": path}``, or ``image_url`` as OpenAI
    writes it) bring it along; the others take ``images``, in order. Raises RequestError if those are not as many, and
    for messages that are empty, of an unknown role, or hold something else than text and images.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [_page_by_page(_checked(message)) for message in _listed(prompt)]
    waiting = list(images)
    if waiting and not any(_is_image(part) for message in messages for part in _parts(message)):
        messages = _images_first(messages, len(waiting))
    found: list[ImageLike] = []
    for message in messages:
        for part in filter(_is_image, _parts(message)):
            own = _own_image(part)
            if own is None and not waiting:
                raise RequestError(
                    f"the messages have image part {len(found) + 1}, but images has {len(images)}"
                )
            found.append(waiting.pop(0) if own is None else own)
    if waiting:
        raise RequestError(
            f"images has {len(images)}, of which {len(waiting)} are left over: expected one for every image part that "
            "does not hold its own"
        )
    return [_plain(message) for message in messages], found


def _listed(prompt: PromptLike) -> Sequence[Message]:
    wanted = "expected a string or a list of messages with 'role' and 'content'"
    if not isinstance(prompt, Sequence) or not all(
        isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt
    ):
        raise RequestError(f"the prompt is {prompt!r:.80}, {wanted}")
    if not prompt:
        raise RequestError(f"the prompt is an empty list of messages, {wanted}")
    return prompt  # type: ignore[return-value]


def _checked(message: Message) -> Message:
    role = message["role"]
    content = message["content"]
    if role not in ROLES:
        raise RequestError(f"a message has the role {role!r:.40}, expected one of: {', '.join(ROLES)}")
    if not content and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, (str, list, tuple)):
        raise RequestError(
            f"a message has content of type {type(content).__name__}, expected text or a list of parts"
        )
    if not content:
        raise RequestError(f"a message of the {role} is empty, expected text or parts")
    for part in _parts(message):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "image_url", "text"):
            raise RequestError(f"a message holds the part {part!r:.80}, {SUPPORTED}")
        if kind == "text" and not isinstance(part.get("text"), str):
            raise RequestError(f"a message holds the part {part!r:.80} without text, {SUPPORTED}")
    return message


def _page_by_page(message: Message) -> Message:
    """With an image part for each page, where one holds several of a PDF."""
    pages = [
        [{"type": "image", "image": page} for page in expanded(_own_image(part))]
        if _is_image(part)
        else [part]
        for part in _parts(message)
    ]
    if all(len(each) == 1 for each in pages):
        return message
    return {**message, "content": [part for each in pages for part in each]}


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    """The parts of a message; none where the content is text."""
    content = message["content"]
    return [] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url")


def _own_image(part: Mapping[str, Any]) -> ImageLike | None:
    """What an image part holds: under "image", "path", "url" or "image_url", there maybe under "url" once more."""
    value = next(
        (part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None
    )
    if isinstance(value, Mapping):
        value = value.get("url")
    if value is not None and not isinstance(value, ImageLike):
        raise RequestError(
            f"an image part holds a {type(value).__name__}, expected a path, bytes, a picture or an array"
        )
    return value


def _images_first(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages with ``count`` image parts before the content of the first user's."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RequestError(f"images has {count}, but no message of a user, expected one to show them in")
    content = messages[first]["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    shown = {**messages[first], "content": [*({"type": "image"} for _ in range(count)), *text]}
    return [*messages[:first], shown, *messages[first + 1 :]]


def _plain(message: Message) -> Message:
    """Image parts without what they hold: templates look at nothing else."""
    if isinstance(message["content"], str):
        return message
    return {
        **message,
        "content": [{"type": "image"} if _is_image(part) else part for part in message["content"]],
    }
