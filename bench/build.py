"""Time, peak memory and size of ``ppexport build`` on a checkpoint of real dimensions.

    python bench/build.py -o bench/results/build.json
    python bench/build.py --target tensorrt-rtx --runs 1 -o bench/results/build_rtx.json
    python bench/build.py --model qwen3_vl:2b --model qwen2_5_vl:3b --runs 1 -o bench/results/build_families.json

Makes a random checkpoint of each model (or takes --checkpoint), builds it once per run in a fresh process, and
reports wall time, that process's peak resident set (mapped file pages included) and bytes on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import random_checkpoint
from machine import describe


def build_once(checkpoint: Path, work: Path, precision: str, target: str | None) -> dict[str, float]:
    """One build in a child process; seconds, peak RSS in bytes, bundle size in bytes."""
    output = work / "bundle"
    command = [sys.executable, "-m", "ppexport.cli", "build", str(checkpoint), "-o", str(output), "-q"]
    command += ["--precision", precision, *(["--target", target] if target else [])]
    begin = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"the build failed with status {os.waitstatus_to_exitcode(status)}")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    row = {"seconds": round(seconds, 2), "peak_rss_bytes": usage.ru_maxrss * 1024, "bundle_bytes": size}
    if target:
        record = json.loads((output / "engines" / target / "record.json").read_text(encoding="utf-8"))
        for graph, engine in record["engines"].items():
            row |= {
                f"{graph}_compile_seconds": engine["build_seconds"],
                f"{graph}_engine_bytes": engine["bytes"],
            }
    shutil.rmtree(output)
    return row


def measured(checkpoint: Path, work: Path, precision: str, target: str | None, runs: int) -> dict[str, Any]:
    """All builds of one checkpoint, and what they say together."""
    rows = [build_once(checkpoint, work, precision, target) for _ in range(runs)]
    return {
        "checkpoint_gb": round(sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e9, 3),
        "runs": rows,
        "median_seconds": median(r["seconds"] for r in rows),
        "peak_rss_gb": round(max(r["peak_rss_bytes"] for r in rows) / 1e9, 3),
        "bundle_gb": round(rows[0]["bundle_bytes"] / 1e9, 3),
    }


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["qwen3_vl:2b"],
    show_default=True,
    help="FAMILY:SHAPE; several.",
)
@click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path), help="An existing checkpoint instead."
)
@click.option("--precision", default="auto", show_default=True)
@click.option("--target", type=click.Choice(["tensorrt-rtx", "tensorrt"]), help="Compile engines, too.")
@click.option("--runs", default=3, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    models: tuple[str, ...],
    checkpoint: Path | None,
    precision: str,
    target: str | None,
    runs: int,
    output: Path | None,
) -> None:
    found = {}
    for model in [checkpoint.name] if checkpoint else models:
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            family, _, shape = model.partition(":")
            source = checkpoint or random_checkpoint(shape, work, family)
            found[model] = measured(source, work, precision, target, runs)
    result = {
        "what": "ppexport build",
        "precision": precision,
        "target": target,
        "machine": describe(),
        "models": found,
    }
    print(json.dumps(result, indent=1))
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
