"""Checks of plain arguments, with one kind of message: what was found, what was expected."""

from __future__ import annotations

import math
import numbers
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import RequestError, SpaceError


def integer(name: str, value: Any, at_least: int = 0, at_most: int | None = None) -> int:
    """``value`` as an int in range; raises RequestError."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise RequestError(f"{name} is {value!r:.80}, expected a whole number of at least {at_least}")
    found = int(value)
    if found < at_least or (at_most is not None and found > at_most):
        limit = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise RequestError(f"{name} is {found}, expected {limit}")
    return found


def number(
    name: str, value: Any, expected: str, low: float, high: float = math.inf, above_low: bool = False
) -> float:
    """``value`` as a finite float in low ... high (more than low with ``above_low``); raises RequestError."""
    try:
        found = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and low <= found <= high) or (above_low and found == low):
        raise RequestError(f"{name} is {value!r:.80}, expected {expected}")
    return found


def writable(path: str | Path, reads: Iterable[str | Path] = ()) -> Path:
    """The path if a file can be made there, told before minutes of work; raises SpaceError.

    ``reads``: files and folders that are read, which nothing replaces: raises RequestError for one of them, or what is
    in one of them.
    """
    target = Path(path)
    try:
        if not str(path) or target.is_dir() or not target.absolute().parent.is_dir():
            raise SpaceError(
                f"{path}: cannot be written, expected the name of a file in an existing directory"
            )
        if target.exists():
            if not os.access(target, os.W_OK):
                raise SpaceError(f"{path}: cannot be written, expected a file that may be")
        else:
            with tempfile.TemporaryFile(dir=target.absolute().parent):
                pass
    except (OSError, ValueError) as err:
        raise SpaceError(f"{path}: cannot be written: {getattr(err, 'strerror', None) or err}") from err
    for each in reads:
        if target.exists() and os.path.exists(each) and _holds(Path(each), target):
            found = "lies in a folder" if os.path.isdir(each) else "is a file"
            raise RequestError(f"{path}: {found} that is read, expected another name")
    return target


def _holds(source: Path, target: Path) -> bool:
    """Is a file that exists this one, or does it lie in this folder?"""
    return source.resolve() in target.resolve().parents if source.is_dir() else target.samefile(source)


def utf8(path: str | Path) -> str:
    """A path for libraries that take UTF-8 only, also where the locale made Python read it as ASCII.

    Raises SpaceError for a name that is not UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as err:
        raise SpaceError(
            f"{str(path)!r}: the name is not valid UTF-8 ({err}), expected a name that is"
        ) from err


def shown(name: str | Path) -> str:
    """The name of a file as text for people and for JSON, whatever the locale and whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "replace")
