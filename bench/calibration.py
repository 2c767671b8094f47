"""What fitting int4 to images gains: the pocket model on held-out screens, with and without.

    python bench/calibration.py -o bench/results/calibration.json

Built with layers and vision tower in int4; calibrated with screens drawn with other seeds. Errors are against float32
on the same tokens, as ppexport verify measures them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

from ppexport.build_bundle import build
from ppexport.calibration import Calibration
from ppexport.models.precision import Wanted
from ppexport.verify import verify
from ppexport.workloads.screens import HELD_OUT, SKILLS, sample

POCKET = Path(__file__).parent.parent / "models" / "pocket"
TOKENS = 24


def draw(directory: Path, count: int, first: int) -> list[tuple[str, str]]:
    """Screens of all skills as files, and their questions."""
    directory.mkdir()
    made = []
    for i in range(count):
        one = sample(SKILLS[i % len(SKILLS)], first + i)
        path = directory / f"{i:03}.png"
        one.image.save(path)
        made.append((str(path), one.question))
    return made


def measure(bundle: Path, screens: list[tuple[str, str]]) -> dict[str, Any]:
    reports = [verify(bundle, POCKET, [image], question, tokens=TOKENS) for image, question in screens]
    tokens = sum(r.tokens for r in reports)
    row = {
        "kl": round(mean(r.kl for r in reports), 5),
        "agreement": round(sum(r.agreement * r.tokens for r in reports) / tokens, 4),
    }
    return row | {
        f"{stage}_cosine": round(mean(getattr(r, stage).cosine for r in reports), 5)
        for stage in ("embeds", "deepstack", "logits")
    }


@click.command()
@click.option("--images", default=32, show_default=True, help="To calibrate with.")
@click.option("--held-out", default=40, show_default=True, help="To measure on.")
@click.option("--blocks", default="32,64,128", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(images: int, held_out: int, blocks: str, output: Path | None) -> None:
    results = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        draw(work / "images", images, 0)
        screens = draw(work / "held-out", held_out, HELD_OUT)
        for block in map(int, blocks.split(",")):
            for calibration in (None, Calibration([work / "images"])):
                bundle = work / f"{block}-{bool(calibration)}"
                build(
                    POCKET, bundle, Wanted("int4", vision="int4", group_size=block), calibration=calibration
                )
                results.append(
                    {"block": block, "calibrated": images if calibration else 0, **measure(bundle, screens)}
                )
                print(json.dumps(results[-1]), flush=True)
    result = {
        "what": "pocket model, layers and vision in int4, against float32: means over held-out screens; a cosine is "
        "the least of any token",
        "held_out": held_out,
        "machine": describe(),
        "results": results,
    }
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
