"""The same screens and questions to ``ppexport serve`` and to another server of OpenAI's API, in turns.

    python bench/serving_beside.py --bundle int4.bundle --bundle w8a8.bundle \\
        --other "llama.cpp Q8_0=http://127.0.0.1:8190" --other-fields '{"ignore_eos": true}' -o RESULT.json

Start the other one yourself, with the same weights and as many slots, such as
llama-server -m MODEL.gguf --mmproj MMPROJ.gguf -np 12 -c 12288 -t 2. The checkpoint is that of serving_load.py with a
tokenizer in which every id is some text, so that answers of random weights can be seen; llama.cpp's converter has to be
told that it is of the kind "qwen2" (get_vocab_base_pre), and wants at least one merge in it.
"""

from __future__ import annotations

import contextlib
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
from serving_load import pictures

from ppexport.bench.load import Load, measure, summary

QUESTION = "What is this?"


@click.command()
@click.option("--bundle", "bundles", required=True, multiple=True, type=click.Path(path_type=Path))
@click.option("--other", "others", required=True, multiple=True, metavar="NAME=URL")
@click.option("--other-fields", default="{}", show_default=True, help="Further fields of its requests, JSON.")
@click.option("--at-once", default="1,8", show_default=True)
@click.option("--requests", default=16, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(
    bundles: tuple[Path, ...],
    others: tuple[str, ...],
    other_fields: str,
    at_once: str,
    requests: int,
    tokens: int,
    rounds: int,
    output: Path,
) -> None:
    """Measure and write a JSON file."""
    made: dict[tuple[str, int], list[dict[str, Any]]] = {}
    seed = 10_000
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[tuple[str, str, Any, dict[str, Any]]] = []
        for bundle in bundles:
            url = stack.enter_context(serving(bundle, "--slots", "12")).url
            servers.append((f"ppexport {bundle.stem}", url, "default", {}))
            servers.append((f"ppexport {bundle.stem}, every token kept", url, "off", {}))
        for other in others:
            name, _, url = other.partition("=")
            servers.append((name, url, "default", json.loads(other_fields)))
        for _ in range(rounds):
            for count in map(int, at_once.split(",")):
                shown = pictures(folder, seed, requests)  # new to all of them
                seed += requests
                for name, url, prune, more in servers:
                    load = Load(
                        url, shown, QUESTION, requests, count, max_tokens=tokens, prune=prune, more=more
                    )
                    metrics = summary(*measure(load))
                    made.setdefault((name, count), []).append(metrics)
                    click.echo(f"{name} {count}: {metrics['output_token_throughput']['avg']}", err=True)
    rows = [
        {
            "server": name,
            "at_once": count,
            "failed": sum(each["error_request_count"]["avg"] for each in measured),
            "tokens_per_second": middle(measured, "output_token_throughput", "avg"),
            "ttft_p50_ms": middle(measured, "time_to_first_token", "p50"),
            "ttft_p99_ms": middle(measured, "time_to_first_token", "p99"),
            "per_token_p50_ms": middle(measured, "inter_token_latency", "p50"),
            "latency_p50_ms": middle(measured, "request_latency", "p50"),
            "prompt_tokens": middle(measured, "input_sequence_length", "avg"),
            "output_tokens": middle(measured, "output_sequence_length", "avg"),
        }
        for (name, count), measured in made.items()
    ]
    for row in rows:
        click.echo(json.dumps(row))
    settings = {"requests": requests, "tokens": tokens, "rounds": rounds}
    output.write_text(json.dumps({"machine": describe(), **settings, "rows": rows}, indent=1) + "\n")


def middle(measured: list[dict[str, Any]], metric: str, value: str) -> float:
    """Of the rounds."""
    return round(median(each[metric][value] for each in measured), 2)


if __name__ == "__main__":
    main()
