"""Directories that are complete or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: what was left behind stays
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def partial_directory(output: Path) -> Iterator[Path]:
    """A new directory beside ``output``, which becomes ``output`` at the end; on an error it is removed.

    Before that, what killed processes left behind of the same output is removed; what another one is still writing
    stays. ``output`` may exist as an empty directory.
    """
    if fcntl is not None:
        _remove_abandoned(output)
    # locked before it has the name of a directory that may be removed
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    with _locked(made):
        work = made.rename(made.with_name(f"{made.name}.partial"))
        try:
            yield work
            work.chmod(0o755)
            if output.is_dir():
                output.rmdir()  # an empty one
            work.rename(output)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Inside, the directory is locked, also under another name; the system unlocks it if the process is killed."""
    if fcntl is None:
        yield
        return
    file = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _remove_abandoned(output: Path) -> None:
    """Directories of earlier processes that nobody holds locked."""
    for work in output.parent.glob(f".{_escaped(output.name)}.*.partial"):
        try:
            file = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # is gone, or is no directory
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # still being written, or a file system without locks
        else:
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(file)


def _escaped(name: str) -> str:
    """The name as itself in a pattern of glob."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
