"""What is asked: pictures that ship with the project, generated screens with known answers, or a user's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..models.checks import shown
from ..models.errors import RequestError
from ..runtime.image import ImageLike, images_in

IMAGES = Path(__file__).parent / "images"
BUILT_IN = {
    "desktop": "a desktop of 1920 x 1080 with a text editor",
    "documents": "a page of a manual, and two of its kind in a browser",
    "screens": "generated screens with questions whose answers are known, which the pocket model was trained for",
}
PICTURES = {
    "desktop": ("gui_mousepad.png",),
    "documents": ("pdf_gnuplot-020.png", "web_gnuplot.png", "web_handbook_ja.png"),
}
SCREENS = 8
QUESTION = "What is shown here?"
FILE = "workload.json"  # in a folder: [{"image": NAME, "prompt": ..., "expected": ...}, ...]


@dataclass(frozen=True)
class Question:
    """One image and what is asked about it."""

    name: str  # of the image
    image: ImageLike
    prompt: str
    expected: str | None = None


def open_workload(name: str, images: Sequence[str], prompt: str | None) -> tuple[str, list[Question]]:
    """A name and its questions. ``images``, files or folders, take the place of the workload called ``name``.

    A folder with a workload.json says itself what to ask. Raises ImageError, RequestError.
    """
    if not images:
        return name, _built_in(name, prompt)
    found = []
    for path in map(Path, images):
        if path.is_dir() and (path / FILE).is_file():
            found += _listed(path, prompt)
        else:
            found += [Question(shown(file.name), str(file), prompt or QUESTION) for file in images_in([path])]
    return ", ".join(Path(path).name for path in images), found


def _built_in(name: str, prompt: str | None) -> list[Question]:
    if name in PICTURES:
        return [Question(file, str(IMAGES / file), prompt or QUESTION) for file in PICTURES[name]]
    if name != "screens":
        raise RequestError(f"workload is {name!r}, expected one of: {', '.join(BUILT_IN)}, or images (-i)")
    if prompt is not None:
        raise RequestError("the workload 'screens' has questions of its own, expected no --prompt")
    from ..workloads.screens import HELD_OUT, sample

    made = []
    for i in range(SCREENS):
        skill = ("read", "yesno")[i % 2]  # those with one right answer
        one = sample(skill, HELD_OUT + i)
        made.append(Question(f"{skill} {i}", np.asarray(one.image), one.question, one.answer))
    return made


def _listed(folder: Path, prompt: str | None) -> list[Question]:
    """The questions of a folder's workload.json."""
    path = folder / FILE
    if prompt is not None:
        raise RequestError(f"{path} has questions of its own, expected no --prompt")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise RequestError(f"{path}: cannot be read ({err}), expected a list of questions in JSON") from err
    if not isinstance(rows, list) or not rows:
        raise RequestError(f"{path}: found {type(rows).__name__}, expected a list of questions")
    found = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not {"image", "prompt"} <= set(row) <= {
            "image",
            "prompt",
            "expected",
        }:
            raise RequestError(
                f"{path}: entry {i} is {row!r:.80}, expected image, prompt and, if known, expected"
            )
        if not all(isinstance(value, str) for value in row.values()):
            raise RequestError(f"{path}: entry {i} holds something else than text")
        file = folder / row["image"]
        if not file.is_file():
            raise RequestError(
                f"{path}: entry {i} has the image {row['image']!r}, which is no file in {folder}"
            )
        found.append(Question(row["image"], str(file), row["prompt"], row.get("expected")))
    return found


def picture(question: Question) -> Image.Image:
    """The image of a question as PIL reads it."""
    from ..runtime.image import read

    return read(question.image)
