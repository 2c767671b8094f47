"""Opening a bundle directory: its manifest, and whether its files are the ones it was built with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..models import manifest
from ..models.errors import BundleError
from ..models.manifest import Manifest


def open_bundle(path: str | Path, verify: bool = False) -> tuple[Path, Manifest]:
    """Read bundle.json and check every file: size always, hash of the small ones, of all with ``verify``.

    Raises BundleError with what was found, what was expected and what to do.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise BundleError(f"{directory}: no such directory; expected a bundle made by 'ppexport build'")
    contents = manifest.read(directory)
    for name, record in contents.files.items():
        _check(directory / name, record, verify)
    return directory, contents


def _check(file: Path, record: manifest.FileRecord, verify: bool) -> None:
    if not file.is_file():
        raise BundleError(f"{file}: is missing from the bundle; copy the whole directory or build it again")
    size = file.stat().st_size
    if size != record.bytes:
        raise BundleError(f"{file}: found {size} bytes, expected {record.bytes}; copy it or build the bundle again")
    if verify or size <= manifest.SMALL_FILE:
        with file.open("rb") as opened:
            found = _sha256(opened)
        if found != record.sha256:
            raise BundleError(
                f"{file}: is damaged, found sha256 {found[:12]}..., expected {record.sha256[:12]}...; "
                "copy it or build the bundle again"
            )


def _sha256(opened: object) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(4 << 20))
    while count := opened.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()
