"""A picture being drawn, with a record of what is on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFont

FONT_SIZES = (20, 24, 28)  # pixels; a 32 x 32 token then holds at most a few characters of one line
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Element:
    """Something on a screen that a question can be about."""

    kind: str  # "text", "value", "button" or "option"
    name: str  # what a question calls it
    text: str  # the answer: a value, a label, "yes" or "no"
    box: Box
    mark: Box | None = None  # of an option: the check box or switch


@dataclass(frozen=True)
class Sample:
    """One picture with one question."""

    image: Image.Image
    skill: str
    question: str
    answer: str
    box: Box | None  # locate: the element; the answer is right if its point lies inside
    look: Box | None  # where the answer is to be seen, for an auxiliary loss
    elements: tuple[Element, ...]
    characters: tuple[tuple[float, float, str], ...]  # centre x, y in pixels, for an auxiliary loss


@dataclass
class Canvas:
    """A picture being drawn, and a record of what is on it."""

    rng: Random
    width: int
    height: int
    dark: bool
    size: int  # font size in pixels
    elements: list[Element] = field(default_factory=list)
    lines: list[tuple[int, int, str]] = field(default_factory=list)  # top, left, text
    characters: list[tuple[float, float, str]] = field(default_factory=list)
    busy: set[tuple[int, int]] = field(default_factory=set)  # blocks of 32 pixels with text

    def __post_init__(self) -> None:
        rng = self.rng
        base = rng.choice(((18, 18, 24), (30, 34, 42), (0, 0, 0))) if self.dark else None
        self.paper: Colour = base or rng.choice(
            ((255, 255, 255), (244, 244, 240), (232, 238, 246), (250, 246, 230))
        )
        self.ink: Colour = (
            (235, 235, 235) if self.dark else rng.choice(((0, 0, 0), (30, 30, 50), (50, 20, 20)))
        )
        self.accent: Colour = rng.choice(
            ((40, 90, 200), (190, 50, 50), (20, 130, 80), (120, 60, 170), (200, 110, 20))
        )
        self.image = Image.new("RGB", (self.width, self.height), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.font = _font(self.size)
        self.line = self.size + self.size // 2  # height of a line of text

    def length(self, text: str) -> int:
        """Width of a text in pixels."""
        return int(self.font.getlength(text)) + 1

    def full(self) -> bool:
        """No more text, please: real screens are mostly flat."""
        return len(self.busy) > 0.36 * (self.width / 32) * (self.height / 32)

    def text(self, x: int, y: int, text: str, colour: Colour | None = None) -> Box:
        """Write a text with its top left corner at (x, y); returns its box."""
        self.draw.text((x, y), text, fill=colour or self.ink, font=self.font)
        at = float(x)
        for character in text:
            step = self.font.getlength(character)
            if character != " ":
                self.characters.append((at + step / 2, y + self.size * 0.6, character))
            at += step
        self.lines.append((y, x, text))
        right = x + self.length(text)
        bottom = y + self.size + 2
        self.busy |= {
            (i, j) for i in range(y // 32, bottom // 32 + 1) for j in range(x // 32, right // 32 + 1)
        }
        return (x, y, right, bottom)

    def rectangle(self, box: Box, fill: Colour | None = None, outline: Colour | None = None) -> None:
        """A filled or outlined rectangle."""
        self.draw.rectangle(box, fill=fill, outline=outline)

    def transcript(self) -> str:
        """All text in reading order: lines from top to bottom, parts of a line from left to right."""
        rows: dict[int, list[tuple[int, str]]] = {}
        for top, left, text in self.lines:
            key = next((k for k in rows if abs(k - top) < self.size // 2), top)
            rows.setdefault(key, []).append((left, text))
        return "\n".join(" ".join(t for _, t in sorted(parts)) for _, parts in sorted(rows.items()))


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def busy_share(image: Image.Image) -> float:
    """About the share of 32 x 32 blocks that hold more than one colour."""
    w, h = image.size
    across = ImageChops.difference(image.crop((1, 0, w, h)), image.crop((0, 0, w - 1, h)))
    down = ImageChops.difference(image.crop((0, 1, w, h)), image.crop((0, 0, w, h - 1)))
    edges = ImageChops.lighter(across.crop((0, 0, w - 1, h - 1)), down.crop((0, 0, w - 1, h - 1)))
    red, green, blue = edges.split()
    changed = ImageChops.lighter(ImageChops.lighter(red, green), blue).point(_any)
    blocks = (
        changed.reduce(8).point(_any).reduce(4).point(_any)
    )  # in two steps: the mean of 1024 would round to 0
    return blocks.histogram()[255] / (blocks.width * blocks.height)


def _any(value: int) -> int:
    return 255 if value else 0
