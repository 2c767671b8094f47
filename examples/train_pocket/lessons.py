"""What the pocket model is taught, as arrays: pages and lines of text, screens with questions, in a curriculum."""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

import numpy as np

from ppexport.models.bytelevel import IDS, byte_tokenizer
from ppexport.models.layout import lay_out, on_grid
from ppexport.models.pruners.pixelprune import PixelPrune
from ppexport.runtime.image import prepare
from ppexport.runtime.prune import Selection
from ppexport.runtime.selector import packaged_selector
from ppexport.workloads import words
from ppexport.workloads.canvas import FONT_SIZES, Canvas, Sample
from ppexport.workloads.score import score
from ppexport.workloads.screens import about, sample

MIN_PIXELS, MAX_PIXELS = 9216, 307200
CELLS, CLASSES = 2, 128  # a patch is split in halves of 8 pixels; ASCII, 0 where no character has its centre
PLACES = 20  # along each side of a picture, for an auxiliary loss
BLOCK, PATCH = 32, 16
PAGE = (192, 96)  # pixels of a page of random characters
ALPHABET = string.ascii_letters + string.digits + ".,:$%-[]/"
IGNORE = -100
MORE = 5  # questions about a screen after the first


@dataclass(frozen=True)
class Item:
    """A sample as arrays."""

    pixels: np.ndarray  # uint8 [4 K, 768]
    y: np.ndarray  # float32 [4 K], patch coordinates
    x: np.ndarray
    grid: tuple[int, int]  # patches
    ids: np.ndarray  # int32 [S]
    positions: np.ndarray  # int32 [3, S]
    targets: np.ndarray  # int64 [S], the token to predict at each position
    cells: np.ndarray  # int64 [4 K, CELLS], characters under each kept patch
    turns: tuple[Sample, ...]  # the questions, in their order
    looks: tuple[
        tuple[np.ndarray, np.ndarray], ...
    ]  # positions that predict an answer, image positions that show it


class Reader:
    """Samples -> arrays."""

    def __init__(self, pruned_share: float):
        self.pruned_share, self.tokenizer = pruned_share, byte_tokenizer()
        self.selector = packaged_selector(BLOCK)

    def item(self, made: Sample, rng: Random, more: int = 0) -> Item:
        """Resize, select, tokenize; turns as the chat template writes them, up to ``more`` after the first."""
        turns = [made, *further(made, rng, more)]
        image = prepare(np.asarray(made.image), BLOCK, MIN_PIXELS, MAX_PIXELS)
        prune = PixelPrune() if rng.random() < self.pruned_share else None
        _, selection = self.selector.select(self.selector.backend.upload(image), prune)
        rows, cols = np.divmod(selection.keep, selection.cols)
        H, W = image.shape[:2]
        pixels = blocks(image)[rows, cols].reshape(-1, 768)
        within_y, within_x = np.repeat([0, 1], 2), np.tile([0, 1], 2)
        y, x = (rows[:, None] * 2 + within_y).reshape(-1), (cols[:, None] * 2 + within_x).reshape(-1)
        ids, targets = self._tokens(turns, selection)
        prompt = lay_out(ids, IDS["<|image_pad|>"], [selection.as_kept()], 3, on_grid)
        is_image = ids == IDS["<|image_pad|>"]
        stays = ~is_image
        stays[np.flatnonzero(is_image)[selection.keep]] = True
        targets = targets[stays]
        tokens = np.flatnonzero(is_image[stays])
        looks = tuple(
            (run, tokens[seen])
            for run, turn in zip(runs_of(targets), turns, strict=True)
            if turn.look is not None and (seen := overlap(turn, rows, cols, H, W)).any()
        )
        return Item(
            pixels,
            y.astype(np.float32),
            x.astype(np.float32),
            (H // 16, W // 16),
            prompt.ids,
            prompt.positions,
            targets,
            cells_of(made, H, W)[y, x],
            tuple(turns),
            looks,
        )

    def _tokens(self, turns: list[Sample], selection: Selection) -> tuple[np.ndarray, np.ndarray]:
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        ids = [*encode("<|im_start|>user\n<|vision_start|>"), *[IDS["<|image_pad|>"]] * selection.total]
        targets = [IGNORE] * len(ids)
        for i, turn in enumerate(turns):
            opening = "<|vision_end|>" if i == 0 else "\n<|im_start|>user\n"
            asked = encode(f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n")
            answer = [*encode(turn.answer), IDS["<|im_end|>"]]
            ids += asked + answer
            targets += [IGNORE] * (len(asked) - 1) + answer + [IGNORE]
        return np.array(ids[:-1], np.int32), np.array(targets[:-1], np.int64)

    def scores(self, items: list[Item], found: np.ndarray) -> list[tuple[str, float]]:
        """(skill, score) of each question, from the most likely tokens under teacher forcing [B, S]."""
        return [
            (turn.skill, score(turn, self.tokenizer.decode(list(row[run]))))
            for item, row in zip(items, found, strict=True)
            for turn, run in zip(item.turns, runs_of(item.targets), strict=True)
        ]


def further(made: Sample, rng: Random, most: int) -> list[Sample]:
    """More questions about the same picture: several turns teach more than one for the same picture tokens.

    Some ask for the place of something that is not a button: what ``read`` has learned to find helps ``locate``.
    """
    turns = []
    for element in rng.sample(made.elements, len(made.elements)):
        if element.kind == "text":
            continue
        turn = about(made, element, where=rng.random() < 0.4)
        if turn.question != made.question:
            turns.append(turn)
    return turns[:most]


def runs_of(targets: np.ndarray) -> list[np.ndarray]:
    """The positions of each answer's targets."""
    at = np.flatnonzero(targets != IGNORE)
    return np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)


def overlap(made: Sample, rows: np.ndarray, cols: np.ndarray, H: int, W: int) -> np.ndarray:
    """bool [K]: which merged tokens of the picture resized to H x W show what the answer is to be read from."""
    left, top, right, bottom = (
        np.array(made.look) * (np.array([W, H, W, H]) / np.tile(made.image.size, 2)) / BLOCK
    )
    return (cols < right) & (cols + 1 > left) & (rows < bottom) & (rows + 1 > top)


def blocks(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [rows, cols, 2, 2, 16, 16, 3], patch by patch as the tower takes them."""
    H, W, _ = image.shape
    return image.reshape(H // 32, 2, 16, W // 32, 2, 16, 3).transpose(0, 3, 1, 4, 2, 5, 6)


def cells_of(made: Sample, H: int, W: int) -> np.ndarray:
    """The character whose centre lies in each half of each patch of the resized picture: [H / 16, W / 16, CELLS]."""
    cells = np.zeros((H // PATCH, W // PATCH, CELLS), np.int64)
    for cx, cy, character in made.characters:
        x, y = cx * W / made.image.width, cy * H / made.image.height
        if ord(character) < CLASSES and 0 <= x < W and 0 <= y < H:
            cells[int(y // PATCH), int(x // PATCH), int(x % PATCH * CELLS // PATCH)] = ord(character)
    return cells


def places_of(y: np.ndarray, x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """In which twentieth of the picture's height and width each merged token lies: y, x [4 K] -> int64 [K, 2]."""
    middle = np.stack([y[::4] + 1, x[::4] + 1], axis=1)  # in patches; the first of four is the upper left one
    return (middle / grid * PLACES).astype(np.int64)


def page(rng: Random) -> Sample:
    """A page full of random characters, in every size and colour."""
    c = Canvas(rng, *PAGE, rng.random() < 0.3, rng.choice(FONT_SIZES))
    top = rng.randint(0, 10)
    while top + c.size < c.height:
        left = rng.randint(0, 12)
        while True:
            word = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 8)))
            if left + c.length(word) > c.width:
                break
            c.text(left, top, word)
            left += c.length(word) + rng.randint(4, 10)
        top += c.line + rng.randint(0, 6)
    return Sample(c.image, "page", "", "", None, None, (), tuple(c.characters))


def line(rng: Random) -> Sample:
    """One line of text, half of its words random, to be transcribed."""
    known = [*words.BUTTONS, *words.TITLES, *words.FIELDS]
    while True:
        width = rng.choice((96, 128, 160, 192))
        c = Canvas(rng, width, 96, rng.random() < 0.3, rng.choice(FONT_SIZES))
        left, text = rng.randint(2, 30), ""
        while True:
            made_up = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 7)))
            longer = f"{text} {made_up if rng.random() < 0.5 else rng.choice(known)}".strip()
            if left + c.length(longer) > width:
                break
            text = longer
        if text:
            c.text(left, rng.randint(2, 60), text)
            return Sample(
                c.image, "transcribe", "Transcribe the text.", text, None, None, (), tuple(c.characters)
            )


# progress from which it holds, shares of the skills, largest pictures (one of them for each step)
CURRICULUM: tuple[tuple[float, dict[str, float], tuple[tuple[int, int], ...]], ...] = (
    (0.0, {"transcribe": 0.2, "read": 0.5, "locate": 0.17, "yesno": 0.13}, ((288, 192),)),
    (0.067, {"transcribe": 0.2, "read": 0.5, "locate": 0.17, "yesno": 0.13}, ((384, 256),)),
    (0.333, {"transcribe": 0.17, "read": 0.37, "locate": 0.27, "yesno": 0.19}, ((640, 480),)),
    (0.467, {"transcribe": 0.1, "read": 0.27, "locate": 0.4, "yesno": 0.23}, ((384, 256), (640, 480))),
    (
        0.56,
        {"transcribe": 0.12, "read": 0.2, "locate": 0.34, "yesno": 0.34},
        ((288, 192), (384, 256), (640, 480)),
    ),
    (
        0.84,
        {"transcribe": 0.35, "read": 0.35, "locate": 0.17, "yesno": 0.13},
        ((288, 192), (384, 256), (640, 480)),
    ),
)


def batches(step: int, steps: int, count: int, positions: int, reader: Reader) -> list[list[Item]]:
    """``count`` samples in batches of like length, each of at most ``positions`` with padding.

    The same ones for the same step.
    """
    _, shares, sizes = [stage for stage in CURRICULUM if stage[0] <= step / steps][-1]
    rng = Random(f"pocket {step}")
    largest = rng.choice(sizes)
    items = []
    for _ in range(count):
        skill = rng.choices(list(shares), list(shares.values()))[0]
        items.append(reader.item(sample(skill, rng.randrange(10**9), largest), rng, MORE))
    items.sort(key=lambda item: len(item.ids))
    groups: list[list[Item]] = [[]]
    for item in items:
        if groups[-1] and (len(groups[-1]) + 1) * len(item.ids) > positions:
            groups.append([])
        groups[-1].append(item)
    rng.shuffle(groups)
    return groups
