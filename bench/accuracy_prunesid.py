"""Accuracy of the pocket model over the share of tokens that PruneSID, PixelPrune, or both leave, skill by skill.

python bench/accuracy_prunesid.py BUNDLE -n 100 -o bench/results/accuracy_prunesid.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.eval import evaluate
from ppexport.runtime.sequence import PruneLike
from ppexport.workloads.screens import SKILLS

SETTINGS: dict[str, PruneLike] = {
    "off": None,
    "PixelPrune": ppexport.PixelPrune(),
    **{f"PruneSID {n}": ppexport.PruneSID(n) for n in (96, 64, 48, 32, 16)},
    **{f"both {n}": [ppexport.PixelPrune(), ppexport.PruneSID(n)] for n in (48, 32, 16)},
    **{f"PixelPrune, {n} at most": ppexport.PixelPrune(max_tokens=n) for n in (48, 32, 16)},
}


@click.command()
@click.argument("bundle")
@click.option("-n", "count", default=100, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(bundle: str, count: int, output: Path) -> None:
    """Ask, and write a JSON file."""
    rows = []
    with ppexport.load(bundle, reuse=0) as pipe:
        for name, prune in SETTINGS.items():
            for skill in SKILLS:
                found = asdict(evaluate(pipe, skill, prune, count))
                found.pop("answers")
                rows.append({"pruned": name, **found})
                click.echo(f"{name:24} {skill:10} {found['accuracy']:.3f} kept {found['kept_share']:.3f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
