"""What PixelPrune would drop before CLIP: exact repetition of 14 x 14 blocks in the views of LLaVA models.

    python bench/clip_blocks.py -o bench/results/clip_blocks.json [IMAGE ...]

No model is run: the share of the tokens that CLIP would see, whole image (LLaVA-1.5) and tiles (LLaVA-NeXT), with the
real images that ship with the package where no others are named; and how long the selection takes for all views.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.exporters.random_checkpoint import random_config
from ppexport.models.families import FAMILIES
from ppexport.runtime.image import cut, frames_of
from ppexport.runtime.selector import packaged_selector

IMAGES = Path(__file__).parent.parent / "ppexport" / "bench" / "images"


@click.command()
@click.argument("images", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--runs", default=9, show_default=True)
def main(images: tuple[Path, ...], output: Path, runs: int) -> None:
    """Measure and write a JSON file."""
    rows = []
    for image in images or sorted(IMAGES.glob("*.png")):
        row: dict[str, object] = {"image": image.name}
        for name in ("llava", "llava_next"):
            family = FAMILIES[name]
            model = family.parse(random_config(name, "7b"))
            frames, shown = frames_of(image, partial(family.views, model, family.preprocessing))
            selector = packaged_selector(model.vision.block)
            views = [selector.backend.upload(cut(frames, view)) for view in shown.views]
            times = []
            for _ in range(runs):
                begin = time.perf_counter()
                found = [selector.select(view, ppexport.PixelPrune())[1] for view in views]
                times.append((time.perf_counter() - begin) * 1e3)
            row[f"{name}_views"] = len(views)
            row[f"{name}_kept"] = sum(selection.kept for selection in found)
            row[f"{name}_total"] = sum(selection.total for selection in found)
            row[f"{name}_ms"] = round(median(times), 2)
        rows.append(row)
        click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe(), "runs": runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
