"""Synthetic documents and screens with questions and answers, drawn from a seed with Pillow alone.

    python -m ppexport.workloads.screens --skill read --seed 7 -o out.png

Skills: ``read`` (the value of a field), ``transcribe`` (all text in reading order), ``locate`` (a point on a button, in
0..1000 of width and height) and ``yesno`` (is an option on). The font is Pillow's own scalable default.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from random import Random

import click

from . import words
from .canvas import FONT_SIZES, Canvas, Element, Sample, busy_share

SKILLS = ("read", "transcribe", "locate", "yesno")
HELD_OUT = 1_000_000_000  # seeds from here on are never trained on
MOST_BUSY = 0.42  # real screens are mostly flat
ON = "\x01"
OFF = "\x02"  # among the characters: the marks of options


def _rows(c: Canvas, top: int, fields: dict[str, Callable[[Random], str]], count: int) -> int:
    """Lines of "label: value"; returns the first free y."""
    labels = c.rng.sample(sorted(fields), min(count, len(fields)))
    left = c.rng.randint(2, max(2, c.width // 10))
    aligned = c.rng.random() < 0.4 and c.width >= 256
    column = left + max((c.length(label + ": ") for label in labels), default=0) + 6
    for label in labels:
        if top + c.line > c.height or c.full():
            break
        value = fields[label](c.rng)
        x = column if aligned else left + c.length(label + ": ")
        if x + c.length(value) > c.width:
            continue
        c.text(left, top, label + ":")
        c.elements.append(Element("value", label, value, c.text(x, top, value)))
        top += c.line + c.rng.choice((0, 0, 2, 6))
    return top


def _heading(c: Canvas) -> int:
    """A title bar or nothing; returns the first free y."""
    if c.rng.random() < 0.5 or c.height < 5 * c.line:
        return c.rng.randint(2, 10)
    c.rectangle((0, 0, c.width, c.line + 4), fill=c.accent)
    c.text(c.rng.randint(4, 12), 3, c.rng.choice(words.TITLES), (255, 255, 255))
    return c.line + 4 + c.rng.randint(4, 14)


def form(c: Canvas) -> None:
    """Labels and values."""
    _rows(c, _heading(c), words.FIELDS, c.rng.randint(2, 9))


def settings(c: Canvas) -> None:
    """Switches or check boxes, and a few values."""
    top = _heading(c)
    options = c.rng.sample(words.OPTIONS, c.rng.randint(2, 7))
    boxes = c.rng.random() < 0.5
    right = c.rng.random() < 0.5
    left = c.rng.randint(3, 20)
    for i, option in enumerate(options):
        if top + c.line > c.height or c.full() or (i >= 2 and c.rng.random() < 0.1):
            break
        on = c.rng.random() < 0.5
        mark_width = c.size if boxes else 2 * c.size
        x = min(c.width - mark_width - 6, left + 12 * c.size) if right else left
        text_left = left if right else left + mark_width + 8
        if text_left + c.length(option) > c.width:
            continue
        _mark(c, x, top, on, boxes)
        mark = (x, top + 1, x + mark_width, top + 1 + c.size)
        box = c.text(text_left, top, option)
        c.elements.append(Element("option", option, "yes" if on else "no", box, mark))
        top += c.line + 4
    _rows(c, top + 2, words.SETTINGS, c.rng.randint(0, 3))


def _mark(c: Canvas, x: int, y: int, on: bool, box: bool) -> None:
    """A check box or a switch, on or off."""
    s = c.size
    c.characters.append((x + (s if not box else s / 2), y + s / 2, ON if on else OFF))
    if box:
        c.rectangle((x, y + 1, x + s, y + 1 + s), fill=c.accent if on else c.paper, outline=c.ink)
        if on:
            c.draw.line(
                (x + 3, y + s // 2, x + s // 2 - 1, y + s - 3, x + s - 2, y + 4),
                fill=(255, 255, 255),
                width=2,
            )
        return
    c.draw.rounded_rectangle(
        (x, y + 1, x + 2 * s, y + 1 + s), s // 2, fill=c.accent if on else (150, 150, 150)
    )
    knob = x + s if on else x
    c.draw.ellipse((knob + 2, y + 3, knob + s - 2, y + s - 1), fill=(255, 255, 255))


def table(c: Canvas) -> None:
    """Items in rows, their properties in columns."""
    top = _heading(c)
    columns = c.rng.sample(words.COLUMNS, 3 if c.width > 24 * c.size else 2 if c.width > 17 * c.size else 1)
    items = c.rng.sample(words.ITEMS.split(), c.rng.randint(2, 7))
    first = c.rng.randint(3, 10)
    lefts = [
        first + 5 * c.size + i * (c.width - first - 5 * c.size) // len(columns) for i in range(len(columns))
    ]
    c.text(first, top, "Item")
    for x, column in zip(lefts, columns, strict=True):
        c.text(x, top, column)
    top += c.line
    c.draw.line((0, top - 3, c.width, top - 3), fill=c.accent, width=2)
    for item in items:
        if top + c.line > c.height or c.full():
            break
        c.text(first, top, item)
        for x, column in zip(lefts, columns, strict=True):
            value = words.CELLS[column](c.rng)
            if x + c.length(value) <= c.width:
                c.elements.append(Element("value", f"{column} of {item}", value, c.text(x, top, value)))
        top += c.line
    _rows(c, top + 4, {k: words.FIELDS[k] for k in ("Total", "Tax", "Due")}, c.rng.randint(0, 2))


def invoice(c: Canvas) -> None:
    """A heading, a few fields, a total under a line."""
    c.text(c.rng.randint(4, 20), 3, c.rng.choice(("INVOICE", "Receipt", "Order form")), c.accent)
    fields = {k: v for k, v in words.FIELDS.items() if k not in ("Total", "Tax", "Seat", "Room")}
    top = _rows(c, 3 + c.line + 2, fields, c.rng.randint(2, 6))
    c.draw.line((0, top + 2, c.width, top + 2), fill=c.ink)
    _rows(c, top + 6, {k: words.FIELDS[k] for k in ("Total", "Tax")}, 2)


def window(c: Canvas) -> None:
    """A window on a desktop with a title bar, maybe a menu, and buttons."""
    if c.rng.random() < 0.6 and c.width >= 224 and c.height >= 160:
        c.rectangle((0, 0, c.width, c.height), fill=c.accent if c.dark else (70, 100, 120))
        x = c.rng.randint(0, c.width // 6)
        y = c.rng.randint(0, c.height // 6)
        right = c.width - c.rng.randint(0, c.width // 6)
        bottom = c.height - c.rng.randint(0, c.height // 6)
    else:
        x = 0
        y = 0
        right = c.width
        bottom = c.height  # the whole picture, without a frame
    c.rectangle((x, y, right, bottom), fill=c.paper, outline=c.ink if x else None)
    c.rectangle((x, y, right, y + c.line), fill=c.accent)
    c.text(x + 6, y + 2, c.rng.choice(words.TITLES), (255, 255, 255))
    for i in range(2):  # icons
        side = c.size - 6
        c.rectangle(
            (right - 6 - (i + 1) * (side + 6), y + 5, right - 12 - i * (side + 6), y + 5 + side), fill=c.paper
        )
    names = c.rng.sample(words.BUTTONS, c.rng.randint(2, 7))
    at_x = x + c.rng.randint(4, 20)
    at_y = y + c.line + c.rng.randint(6, 24)
    for name in names:
        width = c.length(name) + c.rng.choice((12, 20, 28))
        if at_x + width > right - 2:
            at_x = x + c.rng.randint(4, 20)
            at_y = at_y + c.line + 8 + c.rng.randint(2, 20)
        if at_y + c.line + 4 > bottom or at_x + width > right - 2 or c.full():
            break
        box = (at_x, at_y, at_x + width, at_y + c.line + 4)
        filled = c.rng.random() < 0.5
        c.draw.rounded_rectangle(box, 4, fill=c.accent if filled else c.paper, outline=c.ink)
        text_x = at_x + (width - c.length(name)) // 2
        c.text(text_x, at_y + 4, name, (255, 255, 255) if filled else c.ink)
        c.elements.append(Element("button", name, name, box))
        at_x += width + c.rng.randint(6, 40)


LAYOUTS = {"read": (form, invoice, table, settings, form), "locate": (window,), "yesno": (settings,)}
LAYOUTS["transcribe"] = (form, invoice, table, settings, window)
KIND = {"read": "value", "locate": "button", "yesno": "option"}


def sample(skill: str, seed: int, largest: tuple[int, int] = (640, 480)) -> Sample:
    """The sample of a skill that a seed stands for, at most ``largest`` (width, height) pixels; always the same one."""
    rng = Random(f"{skill} {seed} {largest}")
    for attempt in itertools.count():
        c = _canvas(rng, largest)
        rng.choice(LAYOUTS[skill])(c)
        made = _question(c, skill)
        if made is not None and busy_share(made.image) <= MOST_BUSY + attempt // 8 * 0.05:
            return made
    raise AssertionError("unreachable: every limit is passed in the end")


def _canvas(rng: Random, largest: tuple[int, int]) -> Canvas:
    small = rng.random() < 0.5
    width = rng.randint(160, max(160, min(largest[0], 320 if small else 640)))
    height = rng.randint(96, max(96, min(largest[1], 224 if small else 480)))
    if rng.random() < 0.5:  # half of the pictures need no resizing
        width = max(160, width // 32 * 32)
        height = max(96, height // 32 * 32)
    size = rng.choice(FONT_SIZES if width >= 320 else FONT_SIZES[:2])
    return Canvas(rng, width, height, rng.random() < 0.3, size)


def about(c: Canvas | Sample, element: Element, where: bool = False) -> Sample:
    """A question about an element of a picture; ``where``: about its place."""
    image = c.image
    box = None
    look = element.box
    if element.kind == "value" and not where:
        skill = "read"
        question = f"What is the {element.name}?"
        answer = element.text
    elif element.kind == "option" and not where:
        skill = "yesno"
        question = f"Is {element.name} on?"
        answer = element.text
        look = element.mark or look
    else:
        box = left, top, right, bottom = element.box
        x = (left + right) / 2 / image.width
        y = (top + bottom) / 2 / image.height
        skill = "locate"
        question = f"Click {element.name}"
        answer = f"[{x * 1000:.0f}, {y * 1000:.0f}]"
    return Sample(image, skill, question, answer, box, look, tuple(c.elements), tuple(c.characters))


def _question(c: Canvas, skill: str) -> Sample | None:
    """A question about what was drawn, or None if there is nothing to ask."""
    if skill == "transcribe":
        text = c.transcript()
        if not text or len(text) > 160:
            return None
        return Sample(
            c.image, skill, "Transcribe the text.", text, None, None, tuple(c.elements), tuple(c.characters)
        )
    asked = [e for e in c.elements if e.kind == KIND[skill]]
    return about(c, c.rng.choice(asked)) if asked else None


@click.command()
@click.option("--skill", type=click.Choice(SKILLS), required=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(), required=True, help="The picture; its question goes to stdout."
)
def main(skill: str, seed: int, output: str) -> None:
    """Draw one sample."""
    made = sample(skill, seed)
    made.image.save(output)
    click.echo(json.dumps({"question": made.question, "answer": made.answer, "box": made.box}))


if __name__ == "__main__":
    main()
