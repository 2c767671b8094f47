"""What pruning costs where nothing can be dropped: noise, from file to first token, with and without.

    python bench/noise.py -o bench/results/noise.json

The pocket model, whose towers are so small that selection weighs most. The two settings take turns, in one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import median

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.build import build

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def measure(pipe: ppexport.Pipeline, repeats: int) -> dict[str, object]:
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    times: dict[str, list[float]] = {"off": [], "pred_2d": []}
    stages: list[float] = []
    for i in range(repeats + 5):
        for setting in ("off", "pred_2d") if i % 2 else ("pred_2d", "off"):
            prune = None if setting == "off" else ppexport.Prune()
            answer = pipe.generate("What is the Total?", [image], prune, max_new_tokens=1)
            answer.text()
            if i >= 5:
                times[setting].append(answer.stats.ttft)
                stages += [] if prune is None else [answer.stats.milliseconds["prune"]]
    ratios = [b / a for a, b in zip(times["off"], times["pred_2d"], strict=True)]
    rng = Random(0)
    drawn = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "repeats": repeats,
        "off_median_ms": round(median(times["off"]), 2),
        "pred_2d_median_ms": round(median(times["pred_2d"]), 2),
        "prune_stage_median_ms": round(median(stages), 3),
        "ratio_median": round(median(ratios), 4),
        "ratio_95_percent": [round(drawn[25], 4), round(drawn[974], 4)],
    }


@click.command()
@click.option("--repeats", default=200, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(repeats: int, output: Path | None) -> None:
    result = {"what": "time to first token on noise, 300 tokens, none of which can be dropped", "machine": describe()}
    with tempfile.TemporaryDirectory() as name:
        build(POCKET, Path(name) / "pocket")
        result |= measure(ppexport.load(Path(name) / "pocket"), repeats)
    print(json.dumps(result, indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
