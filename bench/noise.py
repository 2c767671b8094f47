"""What pruning costs where nothing can be dropped: photo-like noise, from pixels to first token, with and without.

    python bench/noise.py -o bench/results/noise.json

On a random model of 373 M parameters, and on the pocket model, whose towers are so small that selection weighs most.
Tried are tau = 0, and tau = 0.05 with two tokens that match inexactly, so that anchored selection walks through the
whole picture. Settings take turns.
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
from selector import photo_like

import ppexport
from ppexport.build_bundle import build
from ppexport.exporters.random_checkpoint import random_config, write_random, write_text_files

POCKET = Path(__file__).parent.parent / "models" / "pocket"


def measure(
    pipe: ppexport.Pipeline, prune: ppexport.PixelPrune, image: np.ndarray, repeats: int
) -> dict[str, object]:
    times: dict[bool, list[float]] = {False: [], True: []}
    stages: list[float] = []
    for i in range(repeats + 5):
        for pruned in (False, True) if i % 2 else (True, False):
            answer = pipe.generate("What is the Total?", [image], prune if pruned else None, max_new_tokens=1)
            answer.text()
            assert answer.stats.kept == answer.stats.total
            if i >= 5:
                times[pruned].append(answer.stats.ttft)
                stages += [answer.stats.milliseconds["prune"]] if pruned else []
    ratios = [b / a for a, b in zip(times[False], times[True], strict=True)]
    rng = Random(0)
    drawn = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "tau": prune.tau,
        "repeats": repeats,
        "unpruned_median_ms": round(median(times[False]), 2),
        "pruned_median_ms": round(median(times[True]), 2),
        "prune_stage_median_ms": round(median(stages), 3),
        "ratio_median": round(median(ratios), 4),
        "ratio_95_percent": [round(drawn[25], 4), round(drawn[974], 4)],
    }


@click.command()
@click.option(
    "--repeats", default=200, show_default=True, help="With the pocket model; a tenth with the other."
)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(repeats: int, output: Path | None) -> None:
    result = {
        "what": "time to first token on photo-like noise of 640 x 480, 300 tokens, none of which can be dropped"
    }
    result |= {"machine": describe(), "rows": []}
    with tempfile.TemporaryDirectory() as name:
        write_random(random_config("qwen3_vl", "300m"), Path(name) / "300m")
        write_text_files(Path(name) / "300m")
        for checkpoint, count in ((Path(name) / "300m", repeats // 10), (POCKET, repeats)):
            bundle = build(checkpoint, Path(name) / f"{checkpoint.name}.bundle")
            pipe = ppexport.load(bundle)
            for tau, flat in ((0.0, False), (0.05, True)):
                row = measure(pipe, ppexport.PixelPrune(tau=tau), photo_like(640, 480, flat), count)
                result["rows"].append({"model": checkpoint.name, **row})
                print(json.dumps(result["rows"][-1]), flush=True)
            del pipe
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
