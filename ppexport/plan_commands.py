"""What ``ppexport plan`` does: sizes for engines, what they take on a device, and where pixels are pruned there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from . import plan as planner
from .device_memory import told
from .models import profiles
from .models.profiles import Profiles
from .models.pruners.pixelprune import PixelPrune
from .runtime.pdf import expanded


def write_profiles(
    images: Sequence[str],
    output: str,
    bundle: str | None,
    prune: planner.PruneLike | Any,
    information: bool,
    sizes: dict[str, Any],
) -> Profiles:
    """Write the profile file and say what it was made from. ``prune``: "default" for that of the bundle."""
    if bundle is not None:
        prune, sizes = planner.as_bundle(bundle, prune, sizes)
    elif prune == "default":
        prune = PixelPrune()
    target = profiles.writable(output)
    pages = pages_of(images)
    with click.progressbar(length=len(pages), label="select", file=sys.stderr) as bar:
        made = planner.plan(pages, prune, progress=lambda done, total: bar.update(1), **sizes)
    written = made.profiles
    if bundle is not None and information:
        with click.progressbar(length=len(pages), label="vision", file=sys.stderr) as bar:
            found = planner.information(bundle, pages, prune, lambda done, total: bar.update(1))
        written = replace(written, information=round(found, 6))
    profiles.write(written, target)
    for line in planner.report(made):
        click.echo(line)
    if written.information is not None:
        click.echo(
            f"information {written.information:.4f} on average; --dynamic {output} shares budgets by it"
        )
    click.echo(f"wrote {output}")
    return written


def tell_memory(bundle: str, planned: Profiles | None, sizes: dict[str, Any]) -> None:
    """What engines of a bundle take: of planned sizes, else of those that ``build`` takes by itself."""
    for line in told(bundle, planned, sizes.get("capacity"), sizes.get("max_pixels")):
        click.echo(line)


def tell_measured(images: Sequence[str], bundle: str, device: str, prune: planner.PruneLike | Any) -> None:
    """Measure both places, say which is faster and that the bundle keeps it."""
    pages = pages_of(images)
    with click.progressbar(length=len(pages), label="measure", file=sys.stderr) as bar:
        made = planner.measure(bundle, device, pages, prune, lambda done, total: bar.update(1))
    click.echo(
        f"{made.images} images on {made.gpu}: pixels are pruned on the device in {made.on_device_ms:.2f} ms, on the "
        f"host in {made.on_host_ms:.2f} ms (medians)"
    )
    click.echo(f"{bundle} prunes on the {made.place} with --device {device} from now on")


def pages_of(images: Sequence[str]) -> list[str]:
    """Images, and every page of PDF documents among them."""
    return [page for image in images for page in expanded(image)]
