"""Accuracy of the pocket model over the share of tokens that PruneSID, PixelPrune, both, or chance leave, by skill.

python bench/accuracy_prunesid.py BUNDLE -n 100 -o bench/results/accuracy_prunesid.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.eval import evaluate
from ppexport.models.pruners import Pruner
from ppexport.models.pruners.prunesid import PruneSID
from ppexport.runtime.prune import Dropped, FeaturePruners, Left
from ppexport.runtime.sequence import PruneLike
from ppexport.runtime.vision import Seen
from ppexport.workloads.screens import SKILLS

RANDOM = "random"  # this name and the number of tokens
SETTINGS: dict[str, PruneLike] = {
    "off": None,
    "PixelPrune": ppexport.PixelPrune(),
    **{f"PruneSID {n}": ppexport.PruneSID(n) for n in (96, 64, 48, 32, 16)},
    **{f"both {n}": [ppexport.PixelPrune(), ppexport.PruneSID(n)] for n in (48, 32, 16)},
    **{f"PixelPrune, {n} at most": ppexport.PixelPrune(max_tokens=n) for n in (48, 32, 16)},
    **{f"{RANDOM} {n}": ppexport.PruneSID(n) for n in (96, 64, 48, 32, 16)},
}


class Random(FeaturePruners):
    """Keeps as many features as PruneSID would, any of them."""

    def prune(self, seen: Sequence[Seen], pruners: Sequence[Pruner]) -> list[Left]:
        """See FeaturePruners; a budget of one view."""
        ((pruner,), (view,)) = (pruners, seen)
        assert isinstance(pruner, PruneSID)
        tokens = view.features.shape[1]
        count = min(pruner.max_tokens, tokens)
        drawn = np.random.default_rng(tokens).choice(tokens, count, replace=False)
        rows = np.sort(drawn).astype(np.int32)
        features = self.backend.upload(self.backend.download(view.features)[:, rows])
        return [Left(features, rows, (Dropped(RANDOM, tokens - count),), None)]


@click.command()
@click.argument("bundle")
@click.option("-n", "count", default=100, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(bundle: str, count: int, output: Path) -> None:
    """Ask, and write a JSON file."""
    rows = []
    with ppexport.load(bundle, reuse=0) as pipe:
        exact = pipe.feature_pruners
        chance = Random(pipe.backend, Path(bundle), pipe.manifest.model.vision.block)
        for name, prune in SETTINGS.items():
            pipe.feature_pruners = chance if name.startswith(RANDOM) else exact
            for skill in SKILLS:
                found = asdict(evaluate(pipe, skill, prune, count))
                found.pop("answers")
                rows.append({"pruned": name, **found})
                click.echo(f"{name:24} {skill:10} {found['accuracy']:.3f} kept {found['kept_share']:.3f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
