"""How first token, decode and memory grow with the context on the CPU: a hybrid decoder beside one of attention alone.

    python bench/context.py --rounds 2 -o bench/results/context_300m.json
    python bench/context.py --shape 2b --rounds 1 -o bench/results/context_2b.json --plot docs/context.svg

Random checkpoints of both families at the same published size, in one precision, each bundle in a process of its own,
in turns. A prompt of random tokens, then TOKENS - 1 more; "state_mb" is what the decoder remembers of so many, by the
states of its bundle. The first rows are of a desktop of 1920 x 1080 pixels with a question, pruned and whole.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import build, random_checkpoint
from machine import describe
from workers import Worker, ours

import ppexport
from ppexport.models.dtype import BY_NAME, BY_PRECISION
from ppexport.runtime.bundle import open_bundle

FAMILIES = ("qwen3_vl", "qwen3_5")
DESKTOP = Path(__file__).parent.parent / "ppexport" / "bench" / "images" / "gui_mousepad.png"
TOKENS = 33
SMALLEST_ID = 300  # of the random tokens; special ones lie below


def requests(configs: list[dict[str, Any]], lengths: list[int]) -> dict[str, dict[str, Any]]:
    """By their names in the results: what a worker is asked; both families have the same blocks and image token."""
    shown = ppexport.select(DESKTOP, patch=configs[0]["vision_config"]["patch_size"])
    vocab = min(config["text_config"]["vocab_size"] for config in configs)
    rng = np.random.default_rng(0)
    question = rng.integers(SMALLEST_ID, vocab, 24).tolist()
    of_desktop = {
        "image": str(DESKTOP),
        "ids": [*question[:4], *[configs[0]["image_token_id"]] * shown.total, *question[4:]],
    }
    found = {
        "desktop, pruned": {**of_desktop, "prune": True},
        "desktop, whole": {**of_desktop, "prune": False},
    }
    for length in lengths:
        ids = rng.integers(SMALLEST_ID, vocab, length).tolist()
        found[str(length)] = {"image": None, "ids": ids, "prune": False}
    return found


def state_bytes(bundle: Path, tokens: int) -> int:
    """Of one sequence."""
    _, manifest = open_bundle(bundle)
    computed = BY_PRECISION[manifest.compute].name
    return sum(
        math.prod(state.sized(1, tokens)) * BY_NAME[state.stored(computed)].nbytes
        for state in manifest.model.states
    )


def measure(
    workers: dict[str, Worker], bundles: dict[str, Path], asked: dict[str, dict[str, Any]], rounds: int
) -> dict[str, Any]:
    """Medians of every request, by model, after one that is not counted."""
    for worker in workers.values():
        worker.ask(**next(iter(asked.values())), tokens=3)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in workers}
    for _ in range(rounds):
        for name, request in asked.items():
            for family, worker in workers.items():
                answer = worker.ask(**request, tokens=TOKENS)
                found[family].setdefault(name, []).append(answer)
                decode = median(answer["decode"])
                print(f"{family} {name}: first {answer['first']:.0f} ms, decode {decode:.2f} ms", flush=True)
    return {
        family: {
            name: {
                "prompt": answers[0]["prompt"],
                "first_ms": round(median(answer["first"] for answer in answers), 1),
                "decode_ms": round(median(ms for answer in answers for ms in answer["decode"]), 2),
                "state_mb": round(state_bytes(bundles[family], answers[0]["prompt"] + TOKENS) / 1e6, 1),
                "peak_rss_so_far_gb": round(answers[0]["rss"] / 1e9, 2),
            }
            for name, answers in of_family.items()
        }
        for family, of_family in found.items()
    }


def draw(results: dict[str, Any], shape: str, path: Path) -> None:
    """Three plots over the length of the prompt."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ppexport"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    columns = (
        ("first_ms", "first token, ms"),
        ("decode_ms", "decode, ms a token"),
        ("state_mb", "state, MB"),
    )
    for axis, (key, label) in zip(axes, columns, strict=True):
        for family, colour in zip(results, ("tab:gray", "tab:green"), strict=True):
            rows = [row for name, row in results[family].items() if name.isdigit()]
            axis.plot(
                [row["prompt"] for row in rows],
                [row[key] for row in rows],
                "o-",
                color=colour,
                label=f"{family} {shape}",
            )
        scale = "linear" if key == "decode_ms" else "log"
        axis.set(xscale="log", yscale=scale, xlabel="tokens of the prompt", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


@click.command()
@click.option("--shape", default="300m", show_default=True, type=click.Choice(["tiny", "300m", "2b", "4b"]))
@click.option("--precision", default="w8a8", show_default=True)
@click.option("--lengths", default="1000,8000,32000", show_default=True, help="Tokens of the prompts.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="An SVG file to draw.")
def main(
    shape: str,
    precision: str,
    lengths: str,
    threads: int,
    rounds: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        workers = {}
        bundles = {}
        configs = []
        for family in FAMILIES:
            work = Path(name) / family
            work.mkdir()
            checkpoint = random_checkpoint(shape, work, family)
            configs.append(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
            bundles[family] = build(checkpoint, work, precision)
            workers[family] = ours(bundles[family], threads)
        asked = requests(configs, [int(length) for length in lengths.split(",")])
        results = measure(workers, bundles, asked, rounds)
        for worker in workers.values():
            worker.close()
    if output:
        given = {
            "what": f"first token, and {TOKENS - 1} more, on the CPU",
            "shape": shape,
            "precision": precision,
            "threads": threads,
            "rounds": rounds,
            "machine": describe(),
            "results": results,
        }
        output.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    if plot:
        draw(results, shape, plot)


if __name__ == "__main__":
    main()
