"""PruneSID's selection beside that of its authors' code, on the same features, one thread each, in turns.

    python bench/prunesid.py -o bench/results/prunesid.json [--reference PATH_OF_PRUNESID]

576 tokens of 1024 values (CLIP's, as LLaVA-1.5 has them), made like those of pictures (tests/prunesid_spec.py), and
five such crops (LLaVA-NeXT): ours one after the other, theirs as one batch. Also: how many of the selected tokens are
those of an exact singular value decomposition in float64, and how far two calls agree with each other.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import prunesid_spec
from machine import describe

import ppexport
from ppexport.models.pruners.prunesid import GROUPS

BUDGETS = (64, 128, 192)  # tokens with the class token, as the authors count them
HEADS = 16


class Reference:
    """The authors' selection, given what CLIP's tower gives it."""

    def __init__(self, path: Path):
        file = path / "prunesid" / "prunesid_llava" / "clip_encoder.py"
        spec = importlib.util.spec_from_file_location("reference", file)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.forward = module.CLIPVisionTower_PruneSID.forward

    def select(self, crops: np.ndarray, scores: np.ndarray, need: int) -> list[list[int]]:
        """Tokens kept of each of the crops [n, T, C], by scores [n, T]."""
        n, T, C = crops.shape
        hidden = torch.cat((torch.zeros(n, 1, C), torch.from_numpy(crops)), dim=1)
        attention = torch.zeros(n, HEADS, T + 1, T + 1)
        attention[:, :, 0, 1:] = torch.from_numpy(scores)[:, None] / HEADS
        out = SimpleNamespace(attentions=[attention, attention], hidden_states=[hidden, hidden])
        tower = SimpleNamespace(
            device="cpu", dtype=torch.float32, need_token_num=need, vision_tower=lambda *_, **__: out
        )
        _, order = self.forward(tower, torch.zeros(n, 3, 1, 1))
        return [(row[1:] - 1).tolist() for row in order]


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def overlap(found: list[int], expected: list[int]) -> float:
    """Share of the expected tokens."""
    return len(set(found) & set(expected)) / len(expected)


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path, exists=True), help="A checkout of PruneSID.")
@click.option("--pictures", default=6, show_default=True)
@click.option("--runs", default=9, show_default=True)
def main(output: Path, reference: Path | None, pictures: int, runs: int) -> None:
    """Measure and write a JSON file."""
    torch.set_num_threads(1)
    theirs = Reference(reference) if reference else None
    crops = np.stack(list(prunesid_spec.pictures(pictures)))
    scores = np.stack([np.abs(x).sum(1) ** 3 / 1e9 for x in crops]).astype(np.float32)
    rows = []
    for need in BUDGETS:
        prune = ppexport.PruneSID(need - 1, variant="llava", order="reference")

        def ours(i: int, prune: ppexport.PruneSID = prune) -> list[int]:
            found: list[int] = ppexport.select_tokens(crops[i], prune, scores[i], threads=1).keep.tolist()
            return found

        exact = [
            prunesid_spec.select("llava", x, prunesid_spec.exact_components(x, GROUPS), need - 1, score)
            for x, score in zip(crops, scores, strict=True)
        ]
        row: dict[str, object] = {"tokens": crops.shape[1], "values": crops.shape[2], "budget": need}
        row["ours_overlap_with_exact"] = float(np.mean([overlap(ours(i), e) for i, e in enumerate(exact)]))
        row["ours_repeats_itself"] = float(np.mean([ours(i) == ours(i) for i in range(pictures)]))
        times: dict[str, list[float]] = {
            "ours_ms": [],
            "ours_5_ms": [],
            "reference_ms": [],
            "reference_5_ms": [],
        }
        if theirs:
            once = [theirs.select(crops[i : i + 1], scores[i : i + 1], need)[0] for i in range(pictures)]
            twice = [theirs.select(crops[i : i + 1], scores[i : i + 1], need)[0] for i in range(pictures)]
            row["reference_overlap_with_exact"] = float(np.mean(list(map(overlap, once, exact))))
            row["reference_overlap_with_itself"] = float(np.mean(list(map(overlap, once, twice))))
        for _ in range(runs):
            times["ours_ms"].append(timed(lambda: ours(0)))
            times["ours_5_ms"].append(timed(lambda: [ours(i) for i in range(5)]))
            if theirs:
                times["reference_ms"].append(timed(lambda n=need: theirs.select(crops[:1], scores[:1], n)))
                times["reference_5_ms"].append(timed(lambda n=need: theirs.select(crops[:5], scores[:5], n)))
        row |= {name: round(median(found), 1) for name, found in times.items() if found}
        if theirs:
            row["ratio"] = round(row["reference_ms"] / row["ours_ms"], 2)  # type: ignore[operator]
            row["ratio_5"] = round(row["reference_5_ms"] / row["ours_5_ms"], 2)  # type: ignore[operator]
        rows.append(row)
        click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": describe(), "runs": runs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
