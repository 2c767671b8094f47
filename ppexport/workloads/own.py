"""A user's own questions with known answers: {"image": ..., "question": ..., "answer": ...} on each line of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import RequestError
from ..runtime.pdf import file_of

KEYS = ("image", "question", "answer")


@dataclass(frozen=True)
class Task:
    """One question about one image."""

    image: Path
    question: str
    answer: str

    def score(self, found: str) -> float:
        """1 for the right answer, whatever its case and its spaces, else 0."""
        return float(_plain(found) == _plain(self.answer))


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a file; images are looked for beside it. Raises RequestError naming the first line that is none."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as err:
        raise RequestError(
            f"{path}: cannot be read as a workload: {err}; expected 'screens' or a JSONL file"
        ) from err
    tasks = [
        _task(line, f"{path}:{number}", file.parent) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not tasks:
        raise RequestError(f"{path}: holds no questions, expected {{{', '.join(KEYS)}}} on each line")
    return tasks


def _task(line: str, where: str, folder: Path) -> Task:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise RequestError(f"{where}: is no JSON ({err}), expected an object with {', '.join(KEYS)}") from err
    if (
        not isinstance(value, dict)
        or set(value) != set(KEYS)
        or not all(isinstance(value[key], str) for key in KEYS)
    ):
        raise RequestError(
            f"{where}: found {line.strip()!r:.80}, expected an object with texts: {', '.join(KEYS)}"
        )
    for key in ("question", "answer"):
        if not value[key].strip():
            raise RequestError(f"{where}: the {key} is empty, expected a text")
    image = folder / value["image"]
    if not file_of(image).is_file():
        raise RequestError(
            f"{where}: the image {value['image']!r:.80} is missing, expected it beside the file"
        )
    return Task(image, value["question"], value["answer"])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
