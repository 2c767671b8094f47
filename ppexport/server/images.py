"""Images in messages: data: URLs, and addresses of hosts that the server allows by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import invalid
from .protocol import ContentPart, Message
from .remote import fetch

ROLES = {"developer": "system"}


@dataclass(frozen=True)
class ImageRules:
    """What images a server takes."""

    most: int = 16  # of a request
    most_bytes: int = 32 << 20  # of one, as a file
    hosts: tuple[str, ...] = ()  # that images may be fetched from


def messages_of(messages: Sequence[Message], rules: ImageRules) -> list[dict[str, Any]]:
    """As ppexport.runtime.messages takes them, with every image. Raises ApiError."""
    count = sum(part.type == "image_url" for message in messages for part in _parts(message))
    if count > rules.most:
        raise invalid(f"the messages hold {count} images, expected up to {rules.most}", "messages")
    found = []
    for i, message in enumerate(messages):
        content: Any = message.content
        if isinstance(content, list):
            content = [_part(part, rules, f"messages.{i}.content.{j}") for j, part in enumerate(content)]
        found.append({"role": ROLES.get(message.role, message.role), "content": content})
    return found


def _parts(message: Message) -> Sequence[ContentPart]:
    return message.content if isinstance(message.content, list) else ()


def _part(part: ContentPart, rules: ImageRules, where: str) -> dict[str, Any]:
    if part.image_url is None:
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": image_of(part.image_url.url, rules, where)}


def image_of(url: str, rules: ImageRules, where: str) -> str | bytes:
    """A data: URL as it is, or the bytes of a file from an allowed host."""
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        if len(url) > rules.most_bytes * 4 // 3 + 100:
            most = f"{rules.most_bytes >> 20} MiB"
            raise invalid(f"{where}: the image takes more than {most}", where, 413, "image_too_large")
        return url
    if scheme in ("http", "https"):
        return fetch(url, rules.hosts, rules.most_bytes, where)
    raise invalid(
        f"{where}: found the URL {url!r:.60}, expected an image as a data: URL", where, code="invalid_image"
    )
