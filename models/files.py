"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path


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
