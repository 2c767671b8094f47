"""prune.json of a bundle: where pixels are pruned on a device, there or on the host, as it was measured there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import BundleError
from .files import write_text
from .strict import StrictError, from_json, to_json

FILE = "prune.json"
SCHEMA = 1
PLACES = ("device", "host")


@dataclass(frozen=True)
class Measured:
    """Both places on one GPU: milliseconds from pixels in the host's memory to pixels and indices on the device."""

    device: str  # as ppexport.load takes it: "cuda", "tensorrt", "tensorrt-rtx"
    gpu: str
    images: int
    on_device_ms: float  # median over the images
    on_host_ms: float

    @property
    def place(self) -> str:
        """The faster one, of PLACES."""
        return "host" if self.on_host_ms < self.on_device_ms else "device"


@dataclass(frozen=True)
class Places:
    """Every device that was measured."""

    schema: int
    measured: tuple[Measured, ...]


def read(bundle: Path) -> Places:
    """What was measured; nothing where there is no file. Raises BundleError for one that is damaged."""
    path = bundle / FILE
    if not path.exists():
        return Places(SCHEMA, ())
    try:
        found = from_json(Places, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, StrictError) as err:
        raise BundleError(f"{path}: is damaged ({err}); remove it") from err
    if found.schema != SCHEMA:
        raise BundleError(f"{path}: found schema {found.schema}, expected {SCHEMA}; remove it")
    for each in found.measured:
        if not (0 < each.on_device_ms < math.inf and 0 < each.on_host_ms < math.inf):
            raise BundleError(f"{path}: holds times that are none, expected milliseconds; remove it")
    return found


def place(bundle: Path, device: str, gpu: str) -> str:
    """Where to prune on a device and GPU, one of PLACES: the device itself unless it was measured to be slower."""
    found = [each.place for each in read(bundle).measured if (each.device, each.gpu) == (device, gpu)]
    return found[-1] if found else "device"


def forget(bundle: Path, device: str) -> None:
    """What was measured on a device does not hold any more. Raises BundleError, SpaceError."""
    known = read(bundle).measured
    left = tuple(each for each in known if each.device != device)
    if left != known:
        _write(bundle, left)


def keep(bundle: Path, measured: Measured) -> None:
    """Write what was measured, in place of what is known of that device and GPU. Raises BundleError, SpaceError."""
    same = (measured.device, measured.gpu)
    others = [each for each in read(bundle).measured if (each.device, each.gpu) != same]
    _write(bundle, (*others, measured))


def _write(bundle: Path, measured: tuple[Measured, ...]) -> None:
    write_text(bundle / FILE, json.dumps(to_json(Places(SCHEMA, measured)), indent=1) + "\n")
