"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import SpaceError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place; on any error the place is as it was.

    Raises what ``write`` raises, and OSError.
    """
    partial = path.with_name(
        f".{path.stem[:100]}.{os.getpid()}-{threading.get_native_id()}.partial{path.suffix}"
    )
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; a link stays one, a device or pipe is written to. Raises SpaceError."""
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            write_whole(target.resolve(), lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as err:
        raise SpaceError(f"{path}: cannot be written: {err.strerror or err}") from err
