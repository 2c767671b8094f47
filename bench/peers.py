"""The first token beside optimum-intel's OpenVINO model and llama.cpp's of the same weights.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 optimum-intel==2.2.0 openvino==2026.4.1 nncf \\
        transformers==4.57.6 pillow sentencepiece && peers/bin/pip uninstall -y torchvision
    peers/bin/pip download llama-cpp-python==0.3.36 --no-deps --no-binary :all:
    tar xzf llama_cpp_python-0.3.36.tar.gz && peers/bin/pip install ./llama_cpp_python-0.3.36  # compiles, some minutes
    python bench/peers.py --shape 300m --peers-python peers/bin/python -o RESULT.json \\
        --llama-source llama_cpp_python-0.3.36/vendor/llama.cpp

All take turns in one run, each in a process of its own: same weights, image, prompt and threads. "first" is the time to
the first token after preprocessing. Pruned are ours only; the whole image is asked of all. Of several runs, after one
that is not counted: medians. For pruned images ours are started several times, in turns the other way round: one
process may decode a tenth faster than another of the same program. The whole image is asked of fresh processes.
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
from workers import HERE, Worker, llama, optimum, ours

import ppexport
from ppexport.models.precision import Wanted

Answers = dict[str, list[dict[str, Any]]]  # worker -> what it answered
SCREENS = ("gui_mousepad.png", "web_gnuplot.png", "web_handbook_ja.png")


def prompt(checkpoint: Path, image: Path) -> list[int]:
    """Token ids of a question about an image, every placeholder of which is there."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    total = ppexport.select(image, patch=config["vision_config"]["patch_size"]).total
    start, token, end = (config[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))
    return [1, 2, 3, start, *[token] * total, end, *QUESTION]


def request(checkpoint: Path, image: Path) -> dict[str, Any]:
    """A question about an image, answered in 17 tokens, for a worker that is told whether to prune."""
    return {"image": str(image), "ids": prompt(checkpoint, image), "asked": len(QUESTION), "tokens": 17}


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
@click.option(
    "--peers-python",
    "python",
    type=click.Path(exists=True, dir_okay=False),
    help="An interpreter with optimum-intel and llama-cpp-python.",
)
@click.option("--openvino-weights", default="int8", show_default=True)
@click.option("--llama-source", type=click.Path(exists=True, path_type=Path), help="llama.cpp's own folder.")
@click.option("--images", default=",".join(SCREENS), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--starts", default=4, type=click.IntRange(min=1), show_default=True, help="Of each of ours.")
@click.option(
    "--runs",
    default=3,
    type=click.IntRange(min=1),
    show_default=True,
    help="Of pruned images, after each start.",
)
@click.option(
    "--whole-runs",
    default=2,
    type=click.IntRange(min=1),
    show_default=True,
    help="Of the first image, unpruned.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(
    shape: str,
    precision: str,
    vision: str,
    devices: str,
    python: str | None,
    openvino_weights: str,
    llama_source: Path | None,
    images: str,
    threads: int,
    starts: int,
    runs: int,
    whole_runs: int,
    output: Path,
) -> None:
    """Measure and write a JSON file."""
    if llama_source is not None and python is None:
        raise click.UsageError("found --llama-source alone, expected --peers-python, which runs it")
    if not output.parent.is_dir():
        raise click.UsageError(f"-o {output}: found no folder {output.parent}, expected one that is there")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        checkpoint = random_checkpoint(shape, work)
        bundle = ppexport.build(checkpoint, work / precision, Wanted(precision, vision=vision))
        files = images.split(",")
        asked = {file: request(checkpoint, IMAGES / file) for file in files}
        pruned: dict[str, Answers] = {file: {} for file in files}
        ready: Answers = {}
        for start in range(starts):
            order = devices.split(";")[:: -1 if start % 2 else 1]
            workers = [ours(bundle, threads, device) for device in order]
            for file, answers in pruned.items():
                turns(answers, workers, runs, start, prune=True, **asked[file])
            close(workers, ready)
        workers = [ours(bundle, threads, device) for device in devices.split(";")]
        if python is not None:
            workers += peers(python, checkpoint, openvino_weights, llama_source, threads, work)
        answers_whole: Answers = {}
        turns(answers_whole, workers, whole_runs, 0, prune=False, **asked[files[0]])
        close(workers, ready)
    rows = {file: medians(answers) for file, answers in pruned.items()}
    whole = medians(answers_whole)
    result = {
        "what": "image to first token and decode on the CPU, milliseconds",
        "shape": shape,
        "precision": f"{precision}, vision {vision}",
        "openvino_weights": openvino_weights,
        "threads": threads,
        "machine": describe(),
        "ready": ready,
        "pruned": rows,
        "whole": {files[0]: whole},
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for file, of_workers in [*rows.items(), (f"{files[0]}, whole", whole)]:
        for worker_name, row in of_workers.items():
            kept = f"{row['kept']} of {row['total']}" if "kept" in row else ""
            click.echo(
                f"{file:32} {worker_name:30} {row['first']:9.0f} {row['decode_per_token']:7.1f} {kept}"
            )


def peers(
    python: str, checkpoint: Path, weights: str, llama_source: Path | None, threads: int, work: Path
) -> list[Worker]:
    """Other programs, given the checkpoint as their users would."""
    export(python, checkpoint, work / "openvino", weights)
    found = [optimum(python, work / "openvino", threads)]
    if llama_source is not None:
        command = [python, str(HERE / "llama_convert.py"), str(llama_source), str(checkpoint)]
        subprocess.run([*command, str(work / "llama")], check=True, stdout=subprocess.DEVNULL)
        found.append(llama(python, work / "llama", threads))
    return found


def turns(answers: Answers, workers: list[Worker], runs: int, start: int, **request: Any) -> None:
    """Add answers to one request to those that are there, after one of each worker that is not counted."""
    for i in range(runs + 1):
        for worker in workers:
            answer = worker.ask(**request)
            if i > 0:
                answers.setdefault(worker.name, []).append({**answer, "start": start})


def medians(answers: Answers) -> dict[str, Any]:
    """Of each worker; of its tokens, those of each start, too."""
    rows = {}
    for name, of_worker in sorted(answers.items()):
        rows[name] = summary(of_worker)
        starts = sorted({answer["start"] for answer in of_worker})
        rows[name]["decode_of_starts"] = [
            summary([answer for answer in of_worker if answer["start"] == start])["decode_per_token"]
            for start in starts
        ]
    return rows


def close(workers: list[Worker], ready: Answers) -> None:
    """End their processes; what they said when they began goes to ``ready``."""
    for worker in workers:
        ready.setdefault(worker.name, []).append({k: v for k, v in worker.ready.items() if k != "ready"})
        worker.close()


if __name__ == "__main__":
    main()
