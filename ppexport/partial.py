"""Directories that are complete or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .models.errors import BundleError

try:
    import fcntl
except ImportError:  # Windows: what was left behind stays
    fcntl = None  # type: ignore[assignment]


def is_free(output: Path) -> bool:
    """May ``output`` be written? It is absent, or a directory that holds nothing but what partial_directory made."""
    if not output.exists():
        return not output.is_symlink()
    return output.is_dir() and all(_is_partial(entry, output) for entry in output.iterdir())


@contextlib.contextmanager
def partial_directory(output: Path, last: str) -> Iterator[Path]:
    """A new directory that becomes ``output`` at the end; on an error nothing of it is left.

    It lies beside ``output`` and is renamed. Where ``output`` exists as an empty directory, which may be a mount or the
    current directory, it lies inside, and its entries are moved up, the one called ``last`` after all others: what has
    it is complete. What killed processes left behind of the same output is removed; what another one is still writing
    stays. ``output`` is an absolute path. Raises BundleError if somebody else filled it meanwhile.
    """
    inside = output.is_dir()
    folder = output if inside else output.parent
    if fcntl is not None:
        _remove_abandoned(output, folder)
    # locked before it has the name of a directory that may be removed
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=folder))
    with _locked(made):
        work = made.rename(made.with_name(f"{made.name}.partial"))
        moved: list[Path] = []
        try:
            yield work
            if not is_free(output):
                raise BundleError(
                    f"{output}: was filled while the bundle was being built; choose another name"
                )
            if inside:
                for entry in sorted(work.iterdir(), key=lambda entry: entry.name == last):
                    moved.append(entry.rename(output / entry.name))
                work.rmdir()
            else:
                work.chmod(0o755)
                if output.is_dir():
                    output.rmdir()  # appeared meanwhile, and is empty
                work.rename(output)
        except BaseException:
            for entry in moved:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
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


def _is_partial(entry: Path, output: Path) -> bool:
    """Is it a directory that partial_directory made for this output?"""
    return re.fullmatch(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}\.partial", entry.name) is not None


def _remove_abandoned(output: Path, folder: Path) -> None:
    """Directories of earlier processes that nobody holds locked."""
    for work in [entry for entry in folder.iterdir() if _is_partial(entry, output)]:
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
