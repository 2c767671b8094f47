"""Requests with pictures to ``ppexport serve``: tokens per second and times to the first token, 1 to 12 at once.

    python -m ppexport.exporters.random_checkpoint CHECKPOINT --shape 300m
    python bench/serving_load.py --checkpoint CHECKPOINT -o bench/results/serving_load_300m.json

Every request shows a synthetic screen of its own, so that nothing is reused; answers have ``--tokens`` tokens. The
numbers at once take turns, in ``--rounds``; with every token of the pictures, at 8, for comparison.
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
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from machine import describe
from serving import serving

from ppexport import build
from ppexport.bench.load import Load, measure, summary
from ppexport.workloads.screens import sample

# what random weights say is no text else: most of their tokens are in no tokenizer
TEXT = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 10_000}}}
SETTINGS: list[tuple[int, Any]] = [*((n, "default") for n in (1, 2, 4, 8, 12)), (8, "off")]


def pictures(folder: Path, first: int, count: int) -> tuple[str, ...]:
    """Screens that nobody has seen before."""
    made = []
    for number in range(first, first + count):
        path = folder / f"{number}.png"
        sample("transcribe", number).image.save(path)
        made.append(str(path))
    return tuple(made)


@click.command()
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path))
@click.option("--precisions", default="int4,w8a8", show_default=True)
@click.option("--requests", default=24, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(checkpoint: Path, precisions: str, requests: int, tokens: int, rounds: int, output: Path) -> None:
    """Measure and write a JSON file."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seed = 0
        for precision in precisions.split(","):
            bundle = build(checkpoint, folder / precision, precision)
            with serving(bundle, "--slots", "12") as server:
                made: dict[tuple[int, Any], list[dict[str, Any]]] = {each: [] for each in SETTINGS}
                for _ in range(rounds):
                    for at_once, prune in SETTINGS:
                        shown = pictures(folder, seed, requests)
                        seed += requests
                        load = Load(
                            server.url,
                            shown,
                            requests=requests,
                            concurrency=at_once,
                            max_tokens=tokens,
                            prune=prune,
                            more={"response_format": TEXT},
                        )
                        found, seconds = measure(load)
                        made[at_once, prune].append(summary(found, seconds))
                for (at_once, prune), measured in made.items():
                    row = {
                        "precision": precision,
                        "at_once": at_once,
                        "pruned": prune != "off",
                        "failed": sum(each["error_request_count"]["avg"] for each in measured),
                        "tokens_per_second": _middle(measured, "output_token_throughput", "avg"),
                        "requests_per_second": _middle(measured, "request_throughput", "avg"),
                        "ttft_p50_ms": _middle(measured, "time_to_first_token", "p50"),
                        "ttft_p99_ms": _middle(measured, "time_to_first_token", "p99"),
                        "per_token_p50_ms": _middle(measured, "inter_token_latency", "p50"),
                        "prompt_tokens": _middle(measured, "input_sequence_length", "avg"),
                    }
                    rows.append(row)
                    click.echo(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"requests": requests, "tokens": tokens, "rounds": rounds}
    output.write_text(json.dumps({"machine": describe(), **settings, "rows": rows}, indent=1) + "\n")


def _middle(measured: list[dict[str, Any]], metric: str, value: str) -> float:
    return round(median(each[metric][value] for each in measured), 2)


if __name__ == "__main__":
    main()
