"""Memory of a process that sees images of many sizes, with the tower on each device.

    python bench/lengths.py --shape 300m -o bench/results/lengths_300m.json

Square images from small to large, back, and in disorder: what activations of one size leave behind shows in the next.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from machine import describe
from workers import HERE, Worker

import ppexport
from ppexport.models.precision import Wanted


@click.command()
@click.option("--shape", default="300m", show_default=True, help="Of Qwen3-VL, random weights.")
@click.option("--devices", default="cpu;vision=openvino", show_default=True, help="With ; between.")
@click.option("--starts", default=2, type=click.IntRange(min=1), show_default=True, help="Of each process.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def main(shape: str, devices: str, starts: int, output: Path) -> None:
    """Measure and write a JSON file."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bundle = ppexport.build(
            random_checkpoint(shape, work), work / "bundle", Wanted("w8a8", vision="w8a8")
        )
        for _ in range(starts):
            for device in devices.split(";"):
                command = [sys.executable, str(HERE / "worker_lengths.py"), str(bundle), device]
                worker = Worker(device, command)
                row = {"device": device, **worker.ready}
                rows.append(row)
                worker.close()
                click.echo(
                    " ".join(f"{key} {value:.3g}" if key != "device" else value for key, value in row.items())
                )
    result = {"what": "megabytes of a process that encodes images of many sizes", "machine": describe()}
    output.write_text(json.dumps({**result, "shape": shape, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
