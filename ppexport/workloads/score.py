"""Is an answer right?"""

from __future__ import annotations

import re

from .canvas import Sample


def score(made: Sample, found: str) -> float:
    """1 for a right answer, 0 for a wrong one; for transcribe 1 - edit distance / length, at least 0."""
    if made.skill == "transcribe":
        return max(0.0, 1 - edit_distance(made.answer, found) / len(made.answer))
    if made.skill == "locate":
        numbers = re.findall(r"\d+", found)
        if len(numbers) != 2 or made.box is None:
            return 0.0
        x, y = (int(n) / 1000 * side for n, side in zip(numbers, made.image.size, strict=True))
        left, top, right, bottom = made.box
        return float(left <= x <= right and top <= y <= bottom)
    return float(found == made.answer)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of characters."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
