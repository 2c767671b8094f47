"""The first token beside optimum-intel's OpenVINO model of the same weights; our tower on OpenVINO and ONNX Runtime.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 optimum-intel==2.2.0 openvino==2026.4.1 nncf \\
        transformers==4.57.6 pillow && peers/bin/pip uninstall -y torchvision
    python bench/peers.py --shape 300m --openvino-python peers/bin/python -o RESULT.json

All take turns in one run, each in a process of its own: same weights, image, prompt and threads. "first" is the time to
the first token after preprocessing. Pruned are ours only; the whole image is asked of all. Of several runs: medians.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from end_to_end import IMAGES, QUESTION, summary
from machine import describe
from workers import Worker, optimum, ours

import ppexport
from ppexport.models.precision import Wanted

SCREENS = ("gui_mousepad.png", "web_gnuplot.png", "web_handbook_ja.png")


def prompt(checkpoint: Path, image: Path) -> list[int]:
    """Token ids of a question about an image, every placeholder of which is there."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    total = ppexport.select(image, patch=config["vision_config"]["patch_size"]).total
    start, token, end = (config[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))
    return [1, 2, 3, start, *[token] * total, end, *QUESTION]


def export(python: str, checkpoint: Path, output: Path, weights: str) -> None:
    """As optimum-intel's users do it."""
    command = [str(Path(python).parent / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "image-text-to-text", "--weight-format", weights, str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@click.command()
@click.option("--shape", default="300m", show_default=True, help="Of Qwen3-VL, random weights.")
@click.option("--precision", default="w8a8", show_default=True, help="Of the decoder.")
@click.option("--vision", default="w8a8", show_default=True, help="Of the tower; int8 on CPUs without VNNI.")
@click.option("--devices", default="cpu;vision=openvino", show_default=True, help="Ours, with ; between.")
@click.option("--openvino-python", "python", help="An interpreter with optimum-intel.")
@click.option("--openvino-weights", default="int8", show_default=True)
@click.option("--images", default=",".join(SCREENS), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Of pruned images.")
@click.option("--whole-runs", default=1, show_default=True, help="Of the first image, unpruned.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(
    shape: str,
    precision: str,
    vision: str,
    devices: str,
    python: str | None,
    openvino_weights: str,
    images: str,
    threads: int,
    runs: int,
    whole_runs: int,
    output: Path,
) -> None:
    """Measure and write a JSON file."""
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoint = random_checkpoint(shape, work)
        bundle = ppexport.build(checkpoint, work / precision, Wanted(precision, vision=vision))
        workers = [ours(bundle, threads, device) for device in devices.split(";")]
        if python is not None:
            export(python, checkpoint, work / "openvino", openvino_weights)
            workers.append(optimum(python, work / "openvino", threads))
        for file in images.split(","):
            ids = prompt(checkpoint, IMAGES / file)
            asked = [w for w in workers if w.name.startswith("ppexport")]
            rows[file] = turns(asked, runs, image=str(IMAGES / file), prune=True, ids=ids, tokens=17)
        first = IMAGES / images.split(",")[0]
        ids = prompt(checkpoint, first)
        whole = turns(workers, whole_runs, False, image=str(first), prune=False, ids=ids, tokens=17)
        loaded = {w.name: {k: w.ready[k] for k in ("load", "rss")} for w in workers if "load" in w.ready}
        for worker in workers:
            worker.close()
    result = {
        "what": "image to first token and decode on the CPU, milliseconds",
        "shape": shape,
        "precision": f"{precision}, vision {vision}",
        "openvino_weights": openvino_weights,
        "threads": threads,
        "machine": describe(),
        "loaded": loaded,
        "pruned": rows,
        "whole": {first.name: whole},
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for file, found in [*rows.items(), (f"{first.name}, whole", whole)]:
        for worker_name, row in found.items():
            kept = f"{row['kept']} of {row['total']}" if "kept" in row else ""
            click.echo(
                f"{file:32} {worker_name:30} {row['first']:9.0f} {row['decode_per_token']:7.1f} {kept}"
            )


def turns(workers: list[Worker], runs: int, warm: bool = True, **request: Any) -> dict[str, Any]:
    """{worker: medians} of one request; ``warm``: after one that is not counted."""
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for i in range(runs + warm):
        for worker in workers:
            answer = worker.ask(**request)
            if i >= warm:
                found[worker.name].append(answer)
    return {name: summary(answers) for name, answers in found.items()}


if __name__ == "__main__":
    main()
