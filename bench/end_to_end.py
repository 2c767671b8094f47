"""From image to answer on the CPU, stage by stage: pruned and not, beside the authors' PyTorch reference.

    python bench/end_to_end.py --shape 300m -o bench/results/end_to_end_300m.json \\
        [--reference PATH_OF_PIXELPRUNE --reference-python PYTHON_WITH_TRANSFORMERS_4.57.6]

Makes a random checkpoint of that shape (or takes --checkpoint), builds it in each precision and asks all of them the
same, each in a process of its own, taking turns: same weights, same image, same prompt, same threads. "first" is the
time to the first token after preprocessing (reading and resizing; "preprocess"), for the pruned image, for the whole
one, and for a second question about the pruned one. Of several runs: medians.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import build, random_checkpoint
from machine import describe
from workers import Worker, ours, reference

import ppexport

IMAGES = Path(__file__).parent.parent / "ppexport" / "bench" / "images"
QUESTION = list(range(20, 36))  # any tokens


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of several answers to one request."""
    row: dict[str, Any] = {
        name: round(median(a[name] for a in answers), 1)
        for name in ("preprocess", "first")
        if name in answers[0]
    }
    row["decode_per_token"] = round(median(ms for a in answers for ms in a["decode"]), 2)
    row["peak_rss_gb"] = round(max(a["rss"] for a in answers) / 1e9, 3)
    row["runs"] = len(answers)
    if "stages" in answers[0]:
        names = answers[0]["stages"]
        row["stages"] = {name: round(median(a["stages"][name] for a in answers), 1) for name in names}
    row |= {name: answers[0][name] for name in ("kept", "total", "prompt") if name in answers[0]}
    row["tokens"] = answers[0]["tokens"]
    return row


def measure(workers: list[Worker], image: Path, ids: list[int], runs: int, full: int) -> dict[str, Any]:
    """{worker: {"pruned", "full", "again"}: medians}; workers take turns."""
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {w.name: {} for w in workers}
    other = [*ids[: -len(QUESTION)], *reversed(QUESTION)]
    for i in range(1 + runs):  # the first round is a warm-up
        for worker in workers:
            found = answers[worker.name]
            pruned = worker.ask(image=str(image), prune=True, ids=ids, tokens=17)
            again = worker.ask(image=str(image), prune=True, ids=other, tokens=2, reuse=True)
            if i:
                found.setdefault("pruned", []).append(pruned)
                found.setdefault("again", []).append(again)
    for _ in range(full):  # last: it decides the peak of memory
        for worker in workers:
            found = answers[worker.name]
            found.setdefault("full", []).append(worker.ask(image=str(image), prune=False, ids=ids, tokens=17))
    return {name: {what: summary(rows) for what, rows in found.items()} for name, found in answers.items()}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What the figures come to."""
    best = min(
        (n for n in found if n.startswith("ppexport")), key=lambda name: found[name]["pruned"]["first"]
    )
    mine, result = found[best], {"best": best}
    if "full" in mine:
        result["full_over_pruned"] = round(mine["full"]["first"] / mine["pruned"]["first"], 2)
    result["first_over_second_question"] = round(mine["pruned"]["first"] / mine["again"]["first"], 2)
    for name, theirs in found.items():
        if name.startswith("reference"):
            dtype = name.split()[1]
            result[f"first_vs_{dtype}"] = round(theirs["pruned"]["first"] / mine["pruned"]["first"], 2)
            for own in [n for n in found if n.startswith("ppexport")]:
                key = own.split()[1]
                result[f"{key}_decode_vs_{dtype}"] = round(
                    theirs["pruned"]["decode_per_token"] / found[own]["pruned"]["decode_per_token"], 2
                )
                result[f"{key}_first_vs_{dtype}"] = round(
                    theirs["pruned"]["first"] / found[own]["pruned"]["first"], 2
                )
    return result


@click.command()
@click.option("--family", default="qwen3_vl", show_default=True)
@click.option("--shape", default="300m", show_default=True, help="Of that family, random weights.")
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="An existing checkpoint instead."
)
@click.option("--precisions", default="fp32,w8a8,int8,int4", show_default=True)
@click.option("--image", type=click.Path(exists=True, path_type=Path), default=IMAGES / "gui_mousepad.png")
@click.option("--reference", "path", help="Checkout of the authors' code.")
@click.option("--reference-python", "python", help="An interpreter with transformers 4.57.6.")
@click.option("--reference-dtypes", default="float32,bfloat16", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option(
    "--full-runs", default=1, show_default=True, help="Of the whole image, which takes long; 0: not at all."
)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    family: str,
    shape: str,
    checkpoint: Path | None,
    precisions: str,
    image: Path,
    path: str | None,
    python: str | None,
    reference_dtypes: str,
    threads: int,
    runs: int,
    full_runs: int,
    output: Path | None,
) -> None:
    if (path is None) != (python is None):
        raise click.UsageError("--reference and --reference-python go together")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if checkpoint is None:
            checkpoint = random_checkpoint(shape, work, family)
        bundles = [build(checkpoint, work, precision) for precision in precisions.split(",")]
        sizes = {b.name: sum(f.stat().st_size for f in b.iterdir()) for b in bundles}
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        total = ppexport.select(image, patch=config["vision_config"]["patch_size"]).total
        around = [
            config["vision_start_token_id"],
            *[config["image_token_id"]] * total,
            config["vision_end_token_id"],
        ]
        ids = [1, 2, 3, *around, *QUESTION]
        workers = [ours(bundle, threads) for bundle in bundles]
        if path and python:
            workers += [
                reference(python, path, checkpoint, dtype, threads) for dtype in reference_dtypes.split(",")
            ]
        found = measure(workers, image, ids, runs, full_runs)
        for worker in workers:
            worker.close()
    result = {
        "what": "image to first token and decode on the CPU, milliseconds",
        "family": config["model_type"],
        "shape": shape,
        "image": image.name,
        "threads": threads,
        "machine": describe(),
        "bundle_gb": {name: round(size / 1e9, 3) for name, size in sizes.items()},
        "ratios": ratios(found),
        "results": found,
    }
    print(json.dumps(result["ratios"], indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
