"""Accuracy against the share of tokens kept, on held-out screens: the tables and the plot of docs/accuracy.md.

python bench/accuracy.py POCKET_BUNDLE --never-pruned OTHER_BUNDLE -o bench/results/accuracy.json --docs docs
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

import ppexport
from ppexport.eval import Result, evaluate
from ppexport.models.pruners.pixelprune import PixelPrune
from ppexport.runtime.pipeline import Pipeline
from ppexport.workloads.screens import SKILLS

LEVELS = (0, 2, 5, 10, 25)  # tau in 1 / 255
METHODS = ("pred_2d", "raster", "unique", "random")
Row = dict[str, Any]


def measure(
    pipe: Pipeline, prune: PixelPrune | None, level: int | None, count: int, full: dict[str, Result]
) -> list[Row]:
    """One row per skill; ``full`` holds the unpruned results, to compare sample by sample."""
    rows = []
    for skill in SKILLS:
        found = evaluate(pipe, skill, prune, count)
        if prune is None:
            full[skill] = found
        rows.append(
            {
                "method": prune.method if prune else "off",
                "level": level,
                "skill": skill,
                "accuracy": round(found.accuracy, 4),
                "interval": [round(found.low, 4), round(found.high, 4)],
                "kept_share": round(found.kept_share, 4),
                "milliseconds": round(found.seconds / count * 1e3, 1),
                "difference": difference(full[skill], found),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def difference(full: Result, found: Result) -> list[float]:
    """Points against the unpruned model on the same samples: [middle, low, high], 95 % by bootstrap over samples."""
    pairs = [
        (b - a, len(expected) if full.skill == "transcribe" else 1)
        for (expected, _, a), (_, _, b) in zip(full.answers, found.answers, strict=True)
    ]
    rng = Random(0)
    mean = lambda drawn: sum(d * w for d, w in drawn) / sum(w for _, w in drawn) * 100  # noqa: E731
    means = sorted(mean(rng.choices(pairs, k=len(pairs))) for _ in range(1000))
    return [round(v, 2) for v in (mean(pairs), means[25], means[974])]


def sweep(bundle: Path, levels: tuple[int, ...], count: int) -> list[Row]:
    pipe, full = ppexport.load(bundle), {}
    rows = measure(pipe, None, None, count, full)
    for method in METHODS:
        for level in levels_of(method, levels):
            rows += measure(pipe, PixelPrune(method, tau=level / 255), level, count, full)
    return rows


def levels_of(method: str, levels: tuple[int, ...]) -> tuple[int, ...]:
    """The levels that a method knows: "unique" finds exact copies."""
    return levels[:1] if method == "unique" else levels


def pick(rows: list[Row], method: str, level: int | None) -> dict[str, Row]:
    return {row["skill"]: row for row in rows if row["method"] == method and row["level"] == level}


def accuracy_table(rows: list[Row], levels: tuple[int, ...]) -> str:
    lines = [
        f"| method | tau | kept | {' | '.join(SKILLS)} |",
        "| --- | ---: | ---: " + "| ---: " * len(SKILLS) + "|",
    ]
    for method, level in [("off", None), *((m, v) for m in METHODS for v in levels_of(m, levels))]:
        at = pick(rows, method, level)
        kept = sum(row["kept_share"] for row in at.values()) / len(at)
        cells = " | ".join(f"{at[s]['accuracy']:.1%}" for s in SKILLS)
        lines.append(f"| {method} | {'' if level is None else f'{level}/255'} | {kept:.0%} | {cells} |")
    return "\n".join(lines)


def difference_table(rows: list[Row], methods: tuple[str, ...]) -> str:
    lines = [
        "| skill | unpruned | " + " | ".join(f"{m}, tau = 0" for m in methods) + " |",
        "| --- | ---: " + "| ---: " * len(methods) + "|",
    ]
    for skill in SKILLS:
        full = pick(rows, "off", None)[skill]
        low, high = full["interval"]
        line = f"| {skill} | {full['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        for method in methods:
            row = pick(rows, method, 0)[skill]
            middle, low, high = row["difference"]
            line += f" | {row['accuracy']:.1%}: {middle:+.1f} points ({low:+.1f} to {high:+.1f})"
        lines.append(line + " |")
    return "\n".join(lines)


def draw(rows: list[Row], levels: tuple[int, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ppexport"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SKILLS), figsize=(12, 3.4), sharey=True, layout="constrained")
    for axis, skill in zip(axes, SKILLS, strict=True):
        axis.axhline(
            100 * pick(rows, "off", None)[skill]["accuracy"], color="gray", linestyle=":", label="unpruned"
        )
        for method, marker in zip(METHODS, "osdx", strict=True):
            at = [pick(rows, method, level)[skill] for level in levels_of(method, levels)]
            axis.plot(
                [100 * r["kept_share"] for r in at],
                [100 * r["accuracy"] for r in at],
                marker=marker,
                label=method,
            )
        axis.set_title(skill)
        axis.set_xlabel("tokens kept, %")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def fill(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks ``<!-- name -->`` and ``<!-- end of name -->`` of a page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8")
    before, rest = old.split(begin)
    page.write_text(before + begin + text + "\n" + end + rest.split(end)[1], encoding="utf-8")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--never-pruned",
    type=click.Path(path_type=Path, exists=True),
    help="Of the model trained without pruning.",
)
@click.option("-n", "--count", default=200, show_default=True, help="Held-out samples per skill.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option(
    "--docs", type=click.Path(path_type=Path, exists=True), help="Directory with accuracy.md, to be updated."
)
def main(bundle: Path, never_pruned: Path | None, count: int, output: Path | None, docs: Path | None) -> None:
    begin = time.time()
    rows = sweep(bundle, LEVELS, count)
    other = sweep(never_pruned, (0,), count) if never_pruned else []
    result = {
        "what": "accuracy on held-out pocket screens",
        "count": count,
        "minutes": round((time.time() - begin) / 60, 1),
        "machine": describe(),
        "rows": rows,
        "never_pruned": other,
    }
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if docs:
        fill(docs / "accuracy.md", "reached", difference_table(rows, METHODS))
        fill(docs / "accuracy.md", "sweep", accuracy_table(rows, LEVELS))
        if other:
            fill(docs / "accuracy.md", "never pruned", difference_table(other, METHODS))
        draw(rows, LEVELS, docs / "accuracy.svg")


if __name__ == "__main__":
    main()
