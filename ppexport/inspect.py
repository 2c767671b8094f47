"""``ppexport inspect``: what would be pruned of images, as numbers and as pictures. No model is needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from PIL import Image

from .models.checks import shown, writable
from .models.errors import ImageError, RequestError, SpaceError
from .models.files import write_whole
from .models.pruners.pixelprune import PREDICTORS, PixelPrune
from .overlay import overlay as drawn
from .runtime.image import MAX_PIXELS, MIN_PIXELS, ImageLike, prepare
from .runtime.pdf import expanded, file_of
from .runtime.prune import Selection
from .runtime.selector import packaged_selector, select, select_frames

if TYPE_CHECKING:
    from .runtime.sequence import PruneLike

LEVELS = (0, 1, 2, 3, 5, 8, 13, 20, 32, 64)  # tau in 1 / 255, of a sweep
PLOTS = (".png", ".svg", ".pdf")
Shares = dict[str, list[tuple[int, float]]]  # method -> (level, kept share)


def main(
    images: Sequence[str],
    prune: PruneLike,
    bundle: str | None = None,
    frames: bool = False,
    as_json: bool = False,
    overlay: str | None = None,
    sweep: str | None = None,
    **sizes: int,
) -> None:
    """Print what is kept of each image (``frames``: of one recording), or a sweep; draw the pictures asked for.

    ``bundle``: its pruners run, on its features, too; frames and sweeps are of pixels only.
    """
    images = [page for image in images for page in expanded(image)]
    if sweep is not None:
        assert isinstance(prune, PixelPrune)
        target = check_picture(sweep, images, PLOTS)
        check_matplotlib()
        with click.progressbar(length=len(images), label="sweep", file=sys.stderr) as bar:
            shares = over_tau(images, prune, lambda: bar.update(1), **sizes)
        plot(
            shares, target, f"{len(images)} image{'s' * (len(images) > 1)}, {prune.metric}, {mode_of(prune)}"
        )
        click.echo(json.dumps(shares) if as_json else "\n".join([*table(shares), f"plot    {sweep}"]))
        return
    pictures: list[Path | None] = [None] * len(images)
    if overlay is not None:
        pictures[:] = [check_picture(overlay, images)] if len(images) == 1 else overlay_files(overlay, images)
    found = _selections(images, prune, bundle, frames, sizes)  # of all, before anything is written
    if overlay is not None and len(images) > 1:
        _make_folder(Path(overlay))
    for image, views, picture in zip(images, found, pictures, strict=True):
        if picture:
            write_overlay(image, views, picture)
        if not as_json:
            told = [line for selection in views for line in lines(image, selection)]
            click.echo("\n".join(told + ([f"overlay {picture}"] if picture else [])))
    if as_json:
        named = [
            {"image": shown(image), **as_dict(selection)}
            for image, views in zip(images, found, strict=True)
            for selection in views
        ]
        click.echo(json.dumps(named))
    elif len(found) > 1:
        click.echo(together(found))


def _selections(
    images: Sequence[str], prune: PruneLike, bundle: str | None, frames: bool, sizes: dict[str, int]
) -> list[tuple[Selection, ...]]:
    """Of each image, of each of its views."""
    if bundle is not None:
        from .runtime.pipeline import load  # pixels alone need no model

        limits = (sizes.get("min_pixels"), sizes.get("max_pixels"))
        with load(bundle, "auto", *limits) as pipe:
            return [pipe.encode(image, prune).selections for image in images]
    assert isinstance(prune, PixelPrune)
    if frames:
        return [(found,) for found in select_frames(images, prune, **sizes)]
    return [(select(image, prune, **sizes),) for image in images]


def mode_of(prune: PixelPrune) -> str:
    """ "anchored" or "sliding"."""
    return "anchored" if prune.anchored else "sliding"


def as_dict(selection: Selection) -> dict[str, object]:
    """The selection and the setting it was made with, as plain JSON types."""
    prune = selection.prune
    setting = None
    if prune is not None:
        setting = {"method": prune.method, "metric": prune.metric, "tau": prune.tau, "mode": mode_of(prune)}
        setting |= {"max_tokens": prune.max_tokens, "seed": prune.seed}
    return {
        "view": selection.number,
        "prune": setting,
        "width": selection.width,
        "height": selection.height,
        "grid": {"rows": selection.rows, "cols": selection.cols},
        "tokens": selection.total,
        "kept": selection.kept,
        "share": round(selection.share, 6),
        "reason": selection.reason,
        "dropped": [asdict(each) for each in selection.dropped],
        "keep": selection.keep.tolist(),
    }


def lines(image: str, selection: Selection) -> list[str]:
    """The selection for a person."""
    prune = selection.prune
    s = selection
    why = f", {s.reason}" if s.reason else ""
    if prune is not None and prune.max_tokens is not None and not s.reason:
        why = f", tau {prune.tau:.4g}"
    each = [f"dropped {d.tokens} by {d.pruner}{f', {d.reason}' if d.reason else ''}" for d in s.dropped]
    of_view = f", view {s.number + 1}" if s.number else ""
    around = s.rows * s.cols - s.total
    beside = f", {around} of them beside the image" if around else ""
    return [
        f"image   {image}{of_view}: {s.width} x {s.height} pixels after resizing",
        f"grid    {s.rows} x {s.cols} = {s.rows * s.cols} tokens{beside}",
        f"kept    {s.kept} ({s.share:.1%}){why}",
        *(each if len(each) > 1 else []),
    ]


def check_matplotlib() -> None:
    """Raise RequestError if it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise RequestError("a plot needs matplotlib; install it with: pip install 'ppexport[plot]'") from err


def over_tau(
    images: Sequence[str], prune: PixelPrune, progress: Callable[[], None] = lambda: None, **sizes: int
) -> Shares:
    """The share of all tokens of the images that each method keeps, over tau; metric and mode as in ``prune``.

    ``progress`` is called after every image.
    """
    selector = packaged_selector(sizes.get("patch", 16) * sizes.get("merge", 2))
    limits = (sizes.get("min_pixels", MIN_PIXELS), sizes.get("max_pixels", MAX_PIXELS))
    kept: dict[tuple[str, int], int] = {}
    total = 0
    for image in images:
        pixels = selector.backend.upload(prepare(image, selector.block, *limits))
        for method, level in _settings():
            exact = method == "unique"
            tried = (
                PixelPrune(method)
                if exact
                else replace(prune, method=method, tau=level / 255, max_tokens=None)
            )
            found = selector.select(pixels, tried)[1]
            kept[method, level] = kept.get((method, level), 0) + found.kept
        total += found.total
        progress()
    shares: Shares = {}
    for (method, level), count in kept.items():
        shares.setdefault(method, []).append((level, count / total))
    return shares


def _settings() -> Iterator[tuple[str, int]]:
    for method in PREDICTORS:
        for level in LEVELS:
            yield method, level
    yield "unique", 0


def table(shares: Shares) -> list[str]:
    """A sweep as lines of text, tau from top to bottom."""
    rows = [f"{'tau':>8}" + "".join(f"{method:>12}" for method in shares)]
    for level in LEVELS:
        cells = [dict(points).get(level) for points in shares.values()]
        rows.append(f"{f'{level}/255':>8}" + "".join(f"{'' if c is None else f'{c:.1%}':>12}" for c in cells))
    return rows


def plot(shares: Shares, path: Path, title: str) -> None:
    """A sweep as a picture. Raises ImageError if it cannot be written."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for (method, points), style in zip(
        shares.items(), ("o-", "s-", "d--", "x"), strict=True
    ):  # two may coincide
        axis.plot([x for x, _ in points], [100 * y for _, y in points], style, label=method)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xticks(LEVELS, [str(level) for level in LEVELS])
    axis.set_xlabel("tau, in 1/255")
    axis.set_ylabel("tokens kept, %")
    axis.set_ylim(0, 105 * max(share for points in shares.values() for _, share in points))
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    _write(path, lambda partial: figure.savefig(partial, dpi=150))
    pyplot.close(figure)


def write_overlay(image: ImageLike, selection: Selection | Sequence[Selection], path: str | Path) -> None:
    """Draw and save the overlay, of an image in several views all of them; the format follows the file name.

    Raises ImageError if it cannot be written.
    """
    target = check_picture(path, [image])
    _write(target, lambda partial: drawn(image, selection).save(partial))


def overlay_files(folder: str, images: Sequence[str]) -> list[Path]:
    """A file in a new or existing folder for the overlay of each of several images; raises ImageError."""
    target = Path(folder)
    if target.suffix.lower() in _savable() or (target.exists() and not target.is_dir()):
        raise ImageError(f"{folder}: is a file, expected a folder for the overlays of {len(images)} images")
    if not target.parent.is_dir():
        raise ImageError(f"{folder}: cannot be made, expected a folder in an existing one")
    files = [target / f"{i:03d}-{Path(image).stem[:100]}.png" for i, image in enumerate(images, 1)]
    return [check_picture(file, images) if target.is_dir() else file for file in files]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as err:
        raise ImageError(f"{folder}: cannot be made: {err}") from err


def check_picture(
    path: str | Path, images: Sequence[ImageLike] = (), suffixes: Sequence[str] | None = None
) -> Path:
    """The path if a picture can be written there; raises ImageError before any work is done.

    ``images``: what must not be replaced by it; ``suffixes``: of its name, by default all that Pillow can write.
    """
    target = Path(path)
    if target.suffix.lower() not in (suffixes or _savable()):
        names = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if suffixes else ".png or .jpg"
        raise ImageError(f"{path}: the picture cannot be written, expected a name that ends in {names}")
    if target.is_dir() or not target.parent.is_dir():
        raise ImageError(f"{path}: the picture cannot be written, expected a file in an existing directory")
    try:
        return writable(target, [file_of(image) for image in images if isinstance(image, (str, os.PathLike))])
    except (RequestError, SpaceError) as err:
        raise ImageError(str(err)) from err


def _savable() -> set[str]:
    """The suffixes of files that Pillow can write."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}


def _write(target: Path, save: Callable[[Path], object]) -> None:
    """Save into a file beside ``target`` and rename it, so an existing file is replaced whole or not at all."""
    try:
        write_whole(target, save)
    except (OSError, ValueError) as err:
        raise ImageError(f"{target}: the picture cannot be written: {err}") from err


def together(found: Sequence[Sequence[Selection]]) -> str:
    """A line about several images."""
    kept = [sum(selection.kept for selection in views) for views in found]
    total = [sum(selection.total for selection in views) for views in found]
    median = np.median([a / b for a, b in zip(kept, total, strict=True)])
    share = sum(kept) / sum(total)
    return f"all     {len(found)} images: kept {sum(kept)} of {sum(total)} ({share:.1%}), median {median:.1%}"
