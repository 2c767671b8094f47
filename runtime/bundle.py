"""Opening a bundle directory: its manifest, and whether its files are the ones it was built with."""

from __future__ import annotations

import os
from pathlib import Path

from ..models import manifest
from ..models.errors import BundleError
from ..models.manifest import Manifest


def open_bundle(path: str | Path, verify: bool = False) -> tuple[Path, Manifest]:
    """Read bundle.json and check every file: size always, hash of the small ones, of all with ``verify``.

    Raises BundleError with what was found, what was expected and what to do.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BundleError(
            f"the bundle is {path!r:.80}, expected the path of a directory made by 'ppexport build'"
        )
    directory = Path(path)
    try:
        is_file = directory.is_file()
    except (OSError, ValueError) as err:
        raise BundleError(f"{directory}: cannot be opened: {err}") from err
    if is_file:
        raise BundleError(f"{directory}: is a file; expected a bundle directory made by 'ppexport build'")
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such directory; expected a bundle made by 'ppexport build'")
    contents = manifest.read(directory)
    for name, record in contents.files.items():
        _check(directory / name, record, verify)
    return directory, contents


def check_takes_images(bundle: str | Path, contents: Manifest, purpose: str) -> None:
    """Raise BundleError for the bundle of a model that takes text only; ``purpose``: what images are wanted for."""
    if not contents.model.sees:
        raise BundleError(
            f"{bundle}: found a {contents.family} model, which takes text only, expected one that takes images, since "
            f"{purpose}; name another bundle"
        )


def _check(file: Path, record: manifest.FileRecord, verify: bool) -> None:
    if not file.is_file():
        raise BundleError(f"{file}: is missing from the bundle; copy the whole directory or build it again")
    if not os.access(file, os.R_OK):
        raise BundleError(f"{file}: cannot be read; expected files that this user may read")
    size = file.stat().st_size
    if size != record.bytes:
        raise BundleError(
            f"{file}: found {size} bytes, expected {record.bytes}; copy it or build the bundle again"
        )
    if verify or size <= manifest.SMALL_FILE:
        found = manifest.sha256(file)
        if found != record.sha256:
            raise BundleError(
                f"{file}: is damaged, found sha256 {found[:12]}..., expected {record.sha256[:12]}...; "
                "copy it or build the bundle again"
            )
